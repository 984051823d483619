// SPDX-License-Identifier: GPL-2.0
/*
 * A row of aging: the kernel looks which pages a guest has used (multi-generational LRU, by its debugfs file).
 */
#include <stdio.h>
#include <string.h>

#include "bench.h"

#define LRU_GEN	"/sys/kernel/debug/lru_gen"
#define SIZE	(64 * MIB)
#define PAGES	(SIZE / PAGE_SIZE)
#define PASSES	3

/* The memory cgroup of this process is the root's, and there is one node. */
struct lru {
	unsigned int memcg;
	unsigned long youngest;
};

static bool find_lru(struct lru *lru)
{
	FILE *file = fopen(LRU_GEN, "r");
	bool is_root = false, found = false;
	unsigned long generation;
	char line[256], path[128];

	while (file && fgets(line, sizeof(line), file)) {
		unsigned int memcg;

		if (sscanf(line, "memcg %u %127s", &memcg, path) == 2) {
			is_root = !strcmp(path, "/");
			if (is_root)
				lru->memcg = memcg;
		} else if (is_root && sscanf(line, "%lu", &generation) == 1) {
			lru->youngest = generation;
			found = true;
		}
	}
	if (file)
		fclose(file);
	return found;
}

/* One pass over all page tables of the cgroup's processes. */
static uint64_t look(void)
{
	struct lru lru;
	uint64_t begin;
	FILE *file;

	if (!find_lru(&lru))
		bail("%s does not tell the root's generations: %m", LRU_GEN);
	file = fopen(LRU_GEN, "w");
	if (!file || setvbuf(file, NULL, _IOFBF, 128))
		bail(LRU_GEN ": %m");
	fprintf(file, "+ %u 0 %lu 1 1\n", lru.memcg, lru.youngest);
	begin = now_ns();
	if (fclose(file))
		bail("the kernel makes no generation %lu: %m", lru.youngest + 1);
	return now_ns() - begin;
}

static void age(const struct row *row)
{
	struct touch order = { .base = VM_TEST_GPA, .pages = PAGES, .count = PAGES };
	uint8_t *base = backing_map(ANON, SIZE, true);
	uint64_t used = 0, idle = 0;
	struct vcpu *vcpu;
	struct vm vm;

	bench_vm(&vm);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SIZE, base, 0));
	vcpu = touch_vcpu(&vm);
	for (int pass = 0; pass <= PASSES; pass++) {
		uint64_t took;

		touch(vcpu, order);
		took = look();
		/* In the first pass the host's own entries are young, too. */
		if (pass > 0) {
			used += took;
			idle += look();
		}
	}
	report(row, "used", "time", (double)used / PASSES);
	report(row, "idle", "time", (double)idle / PASSES);
	vm_destroy(&vm);
	backing_unmap(base, SIZE);
}

const struct row age_rows[] = {
	{ "age 64M of 4K", AROUND_DEFAULT, age, { 0 } },
	{ 0 },
};

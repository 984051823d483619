// SPDX-License-Identifier: GPL-2.0
/*
 * A VM that rmmu owns and one that stays with in-tree KVM, at the same time in one process:
 * each runs a vCPU over memory of its own while the host discards parts of both.
 */
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vm.h"

#define SIZE	(8 * MIB)
#define ROUNDS	20
#define OWN	"/sys/module/kvm_rmmu/parameters/own_new_vms"
#define STATS	"/sys/kernel/debug/rmmu/stats"

struct order {
	uint64_t value;
};

static guest_code void write_then_check(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		uint32_t wrong = 0;

		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
			store(VM_TEST_GPA + at, order->value + at);
		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
			wrong += load(VM_TEST_GPA + at) != order->value + at;
		guest_sync(wrong);
	}
}

struct side {
	const char *name;
	struct vm vm;
	struct vcpu *vcpu;
	uint8_t *base;
	unsigned long wrong;
};

static void set_owning(const char *value)
{
	int fd = open(OWN, O_WRONLY);

	if (fd < 0 || write(fd, value, 1) != 1)
		bail("%s: %m", OWN);
	close(fd);
}

static unsigned long rmmu_stat(const char *name)
{
	FILE *file = fopen(STATS, "r");
	char line_name[64];
	unsigned long value;

	if (!file)
		bail("%s: %m", STATS);
	while (fscanf(file, "%63s %lu", line_name, &value) == 2)
		if (!strcmp(line_name, name)) {
			fclose(file);
			return value;
		}
	bail("%s has no %s", STATS, name);
}

static void *play(void *argument)
{
	struct side *side = argument;

	for (uint64_t round = 0; round < ROUNDS; round++) {
		uint64_t value = (uint64_t)(uintptr_t)side + (round << 40);

		*(struct order *)side->vm.shared = (struct order){ value };
		side->wrong += vcpu_run_to_sync(side->vcpu);
		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
			side->wrong += *(uint64_t *)(side->base + at) != value + at;
		must(madvise(side->base + (round % 4) * (SIZE / 4), SIZE / 4, MADV_DONTNEED));
	}
	return NULL;
}

static void create(struct side *side, const char *name, const char *owned)
{
	side->name = name;
	set_owning(owned);
	vm_create(&side->vm);
	side->base = memory(SIZE, false);
	must(vm_slot(&side->vm, 1, VM_TEST_GPA, SIZE, side->base, 0));
	side->vcpu = vm_vcpu(&side->vm, write_then_check, VM_SHARED_GPA);
}

int main(void)
{
	unsigned long owned_before, tables_before;
	struct side sides[2] = { 0 };
	pthread_t threads[2];

	if (access(OWN, W_OK))
		skip_all("kvm_rmmu is not loaded");
	plan(6);
	owned_before = rmmu_stat("vms_owned");
	tables_before = rmmu_stat("table_pages");
	create(&sides[0], "owned by rmmu", "1");
	ok(rmmu_stat("vms_owned") == owned_before + 1, "a VM made with own_new_vms=1 is rmmu's");
	create(&sides[1], "in-tree", "0");
	ok(rmmu_stat("vms_owned") == owned_before + 1, "a VM made with own_new_vms=0 is not");
	set_owning("1");
	for (int i = 0; i < 2; i++)
		if (pthread_create(&threads[i], NULL, play, &sides[i]))
			bail("pthread_create failed");
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < 2; i++)
		ok(!sides[i].wrong, "%s: all data is right (%lu wrong)", sides[i].name, sides[i].wrong);
	ok(rmmu_stat("table_pages") > tables_before, "the owned VM has page tables of rmmu's");
	for (int i = 0; i < 2; i++)
		vm_destroy(&sides[i].vm);
	for (uint64_t end = deadline_ms(5000); rmmu_stat("table_pages") != tables_before && now_ms() < end;)
		usleep(20000);
	ok(rmmu_stat("vms_owned") == owned_before && rmmu_stat("table_pages") == tables_before,
	   "afterwards every VM and page-table page is returned");
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * What the shadow MMU maps in advance, around a page that faulted, is nobody's access: pages that the host has clean stay
 * clean. Here these are pages that were given up by MADV_FREE: one that is marked dirty is not given up any more.
 */
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define TDP_MMU	"/sys/module/kvm_rmmu/parameters/tdp_mmu"
/* What is mapped in advance is of an aligned group of so many. */
#define GROUP	8UL
#define GROUPS	8UL
#define PAGES	(GROUP * GROUPS)
#define KPF_DIRTY 4

static guest_code void read_one_of_each_group(uint64_t gpa)
{
	for (;;) {
		for (uint64_t group = 0; group < GROUPS; group++)
			load(gpa + group * GROUP * PAGE_SIZE);
		guest_sync(1);
	}
}

static uint64_t word_at(const char *path, uint64_t index)
{
	int fd = must(open(path, O_RDONLY));
	uint64_t word;

	if (pread(fd, &word, sizeof(word), index * sizeof(word)) != sizeof(word))
		bail("%s: %m", path);
	close(fd);
	return word;
}

static bool dirty(uint8_t *page)
{
	uint64_t entry = word_at("/proc/self/pagemap", (uintptr_t)page / PAGE_SIZE);

	if (!(entry >> 63))
		bail("a page is gone that nobody needed");
	return word_at("/proc/kpageflags", entry & ((1UL << 55) - 1)) >> KPF_DIRTY & 1;
}

static unsigned long count_dirty(uint8_t *base, bool first)
{
	unsigned long count = 0;

	for (unsigned long page = 0; page < PAGES; page++)
		count += (page % GROUP == 0) == first && dirty(base + page * PAGE_SIZE);
	return count;
}

int main(void)
{
	uint8_t *base = memory(HUGE_SIZE, false);
	struct vcpu *vcpu;
	struct vm vm;

	if (access(TDP_MMU, W_OK))
		skip_all("kvm_rmmu is not loaded");
	if (access("/proc/kpageflags", R_OK))
		skip_all("this kernel does not say which pages are dirty");
	plan(3);
	must(write_file(TDP_MMU, "0") ? 0 : -1);
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, HUGE_SIZE, base, 0));
	vcpu = vm_vcpu(&vm, read_one_of_each_group, VM_TEST_GPA);
	for (unsigned long page = 0; page < PAGES; page++)
		base[page * PAGE_SIZE] = 1;
	must(madvise(base, PAGES * PAGE_SIZE, MADV_FREE));
	ok(!count_dirty(base, true) && !count_dirty(base, false), "those that are given up are clean");
	vcpu_run_to_sync(vcpu);
	ok(count_dirty(base, true) == GROUPS, "those that the guest has got are dirty: it may write to them");
	unsigned long others = count_dirty(base, false);

	note("%lu others are", others);
	ok(!others, "the others are not");
	vm_destroy(&vm);
	write_file(TDP_MMU, "1");
	return finish();
}

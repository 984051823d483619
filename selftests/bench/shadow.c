// SPDX-License-Identifier: GPL-2.0
/*
 * Rows of shadow paging (kvm_amd npt=0, kvm_intel ept=0): what a guest's work on its own page tables costs, as processes
 * of an operating system make it. KVM sees each change of CR3, each fault and each INVLPG.
 */
#include <string.h>
#include <sys/ioctl.h>

#include "bench.h"

/*
 * Address spaces of the guest: each has its own top-level table, whose first entry is that of all others, for code and
 * stack; and its own 4K pages at SPACE_GVA.
 */
#define SPACES		8
#define SPACE_GVA	(1UL << 39)
#define SPACE_PAGES	16UL
#define SPACE_TABLES	4UL
#define TABLES_GPA	(SAMPLES_GPA + MAX_SAMPLES * 8)
#define TABLE(space, n)	(TABLES_GPA + ((space) * SPACE_TABLES + (n)) * PAGE_SIZE)
#define DATA_SIZE	(2 * MIB)
#define LEAF		0x67UL	/* present, writable, user, accessed, dirty */
#define NONLEAF		0x27UL

/* What the guest is to do, on the shared page. */
struct work {
	uint64_t spaces, rounds;
	uint64_t touch;		/* pages to write in each space */
	uint64_t remap;		/* map them anew each time, and take them away */
};

_Static_assert(TABLE(SPACES, 0) <= VM_LOW_SIZE, "the tables are in the low slot");

static uint64_t *table(struct vm *vm, uint64_t gpa)
{
	return (void *)(vm->low + gpa);
}

static void make_spaces(struct vm *vm)
{
	struct kvm_sregs sregs;
	uint64_t top;

	must(ioctl(vm->vcpus[0].fd, KVM_GET_SREGS, &sregs));
	top = *table(vm, sregs.cr3);
	for (uint64_t space = 0; space < SPACES; space++) {
		memset(table(vm, TABLE(space, 0)), 0, SPACE_TABLES * PAGE_SIZE);
		table(vm, TABLE(space, 0))[0] = top;
		table(vm, TABLE(space, 0))[SPACE_GVA >> 39] = TABLE(space, 1) | NONLEAF;
		for (uint64_t level = 1; level < SPACE_TABLES - 1; level++)
			table(vm, TABLE(space, level))[0] = TABLE(space, level + 1) | NONLEAF;
		for (uint64_t page = 0; page < SPACE_PAGES; page++)
			table(vm, TABLE(space, SPACE_TABLES - 1))[page] =
				(VM_TEST_GPA + (space * SPACE_PAGES + page) * PAGE_SIZE) | LEAF;
	}
}

/* Goes around the spaces, like a scheduler around processes. */
static guest_code void switch_spaces(uint64_t shared)
{
	volatile struct work *work = (void *)shared;

	for (;;) {
		uint64_t spaces = work->spaces, rounds = work->rounds, pages = work->touch, remap = work->remap;

		for (uint64_t round = 0; round < rounds; round++)
			for (uint64_t space = 0; space < spaces; space++) {
				uint64_t entries = TABLE(space, SPACE_TABLES - 1);
				uint64_t frames = VM_TEST_GPA + space * SPACE_PAGES * PAGE_SIZE;

				__asm__ volatile("movq %0, %%cr3" : : "r"(TABLE(space, 0)) : "memory");
				for (uint64_t page = 0; page < pages; page++) {
					uint64_t address = SPACE_GVA + page * PAGE_SIZE;

					if (remap)
						store(entries + page * 8, (frames + page * PAGE_SIZE) | LEAF);
					store(address, round);
					if (!remap)
						continue;
					store(entries + page * 8, 0);
					__asm__ volatile("invlpg (%0)" : : "r"(address) : "memory");
				}
			}
		guest_sync(1);
	}
}

/* arg: spaces, pages to touch after a switch, whether to map them anew. The time of one switch with what comes after it. */
static void spaces(const struct row *row)
{
	struct work work = { .spaces = row->arg[0], .rounds = 64, .touch = row->arg[1], .remap = row->arg[2] };
	/* An emulator is slow where a guest's translations change all the time. */
	uint64_t rounds = (work.remap ? 4096 : 16384) / work.spaces / (work.touch + 1), begin, time;
	struct vcpu *vcpu;
	uint8_t *base;
	struct vm vm;

	bench_vm(&vm);
	base = backing_map(ANON, DATA_SIZE, true);
	must(vm_slot(&vm, 0, VM_TEST_GPA, DATA_SIZE, base, 0));
	vcpu = vm_vcpu(&vm, switch_spaces, VM_SHARED_GPA);
	make_spaces(&vm);
	for (int measured = 0; measured < 2; measured++) {
		if (measured)
			work.rounds = rounds;
		memcpy(vm.shared, &work, sizeof(work));
		begin = now_ns();
		if (vcpu_run_to_sync(vcpu) != 1)
			bail("the guest did not finish");
		time = now_ns() - begin;
	}
	report(row, NULL, "time", (double)time / (work.rounds * work.spaces));
	vm_destroy(&vm);
	backing_unmap(base, DATA_SIZE);
}

const struct row shadow_rows[] = {
	{ SHADOW "populate 256M of 4K", AROUND_DEFAULT, populate, { ANON, SEQUENTIAL, 1, 0 } },
	{ SHADOW "switch between 2 address spaces", AROUND_DEFAULT, spaces, { 2, 0, 0 } },
	{ SHADOW "switch among 8 address spaces, 4 pages written", AROUND_DEFAULT, spaces, { 8, 4, 0 } },
	{ SHADOW "a page mapped, written, unmapped", AROUND_DEFAULT, spaces, { 1, 1, 1 } },
	{ SHADOW "switch among 8 address spaces, 4 pages mapped anew", AROUND_DEFAULT, spaces, { 8, 4, 1 } },
	{ 0 },
};

// SPDX-License-Identifier: GPL-2.0
/*
 * Rows of a nested guest: the guest is a hypervisor with SVM and nested paging, whose tables KVM shadows.
 */
#include <string.h>

#include "bench.h"
#include "svm.h"

#define TABLES		VM_SCRATCH_GPA
#define VMCB		(TABLES + SVM_IDENTITY_PAGES * PAGE_SIZE)
#define SAVE_AREA	(VMCB + PAGE_SIZE)
#define INNER_STACK	(SAVE_AREA + 2 * PAGE_SIZE)
/* Tables of the last level, for the rows whose hypervisor maps pages of 4K. */
#define SMALL_TABLES	INNER_STACK
#define SIZE	(64 * MIB)

_Static_assert(SMALL_TABLES + SIZE / 512 <= VM_LOW_SIZE, "the tables are in the low slot");

/* What the hypervisor is to do, on the shared page. */
struct work {
	uint64_t rounds;
	uint64_t pages;		/* for its guest to write in a round */
	uint64_t remap;		/* map them before, and take them away afterwards */
	uint64_t inner;		/* its guest's code */
};

static guest_code void write_pages(uint64_t pages)
{
	for (uint64_t page = 0; page < pages; page++)
		store(VM_TEST_GPA + page * PAGE_SIZE, page);
	for (;;)
		__asm__ volatile("vmmcall");
}

static guest_code void hypervisor(uint64_t shared)
{
	volatile struct work *work = (void *)shared;

	for (;;) {
		uint64_t rounds = work->rounds, pages = work->pages, remap = work->remap, inner = work->inner;

		for (uint64_t round = 0; round < rounds; round++) {
			uint64_t exit;

			for (uint64_t page = 0; remap && page < pages; page++)
				store(SMALL_TABLES + page * 8, (VM_TEST_GPA + page * PAGE_SIZE) | SVM_ENTRY);
			exit = svm_run(VMCB, INNER_STACK, inner, pages);
			if (exit != EXIT_VMMCALL)
				guest_sync(exit);
			for (uint64_t page = 0; remap && page < pages; page++)
				store(SMALL_TABLES + page * 8, 0);
			if (remap)
				*(volatile uint8_t *)(VMCB + VMCB_TLB_CONTROL) = 1;
		}
		guest_sync(1);
	}
}

/* The hypervisor maps the region in pages of 4K; its entries are empty unless `present`. */
static void map_small(struct vm *vm, bool present)
{
	uint64_t *entry = (void *)(vm->low + SMALL_TABLES);

	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		*entry++ = present ? (VM_TEST_GPA + at) | SVM_ENTRY : 0;
	for (uint64_t at = 0; at < SIZE; at += HUGE_SIZE)
		*svm_identity_entry(vm, TABLES, VM_TEST_GPA + at) = (SMALL_TABLES + at / 512) | SVM_ENTRY;
}

static uint64_t time_of(struct vcpu *vcpu, const struct work *work)
{
	uint32_t said;
	uint64_t begin;

	memcpy(vcpu->vm->shared, work, sizeof(*work));
	begin = now_ns();
	said = vcpu_run_to_sync(vcpu);
	if (said != 1)
		bail("the nested guest ended with exit code 0x%x", said);
	return now_ns() - begin;
}

enum mapping { BY_2M, BY_4K, ANEW };

/* arg: pages, rounds, how the hypervisor maps them. The time of one round. */
static void nested(const struct row *row)
{
	struct work work = { .rounds = 1, .pages = 0, .inner = vm_code(write_pages) };
	uint64_t pages = row->arg[0], rounds = row->arg[1], faults;
	enum mapping mapping = row->arg[2];
	struct vcpu *vcpu;
	uint8_t *base;
	struct vm vm;

	if (!svm_offered())
		return;
	bench_vm(&vm);
	base = backing_map(ANON, SIZE, true);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SIZE, base, 0));
	vcpu = vm_vcpu(&vm, hypervisor, VM_SHARED_GPA);
	svm_identity(vcpu, VMCB, SAVE_AREA, TABLES);
	if (mapping != BY_2M)
		map_small(&vm, mapping == BY_4K);
	/* The first time loads roots, and maps code and stack. */
	time_of(vcpu, &work);
	work.rounds = rounds;
	work.pages = pages;
	work.remap = mapping == ANEW;
	faults = kvm_stat(vcpu->fd, "pf_taken");
	report(row, NULL, "time", (double)time_of(vcpu, &work) / rounds);
	if (pages)
		report(row, "faults", "count", (double)(kvm_stat(vcpu->fd, "pf_taken") - faults) / rounds);
	vm_destroy(&vm);
	backing_unmap(base, SIZE);
}

#define NESTED	"nested guest: "

const struct row nested_rows[] = {
	{ NESTED "VMRUN and back", AROUND_DEFAULT, nested, { 0, 2048, BY_2M } },
	{ NESTED "populate 64M of 4K, mapped by 4K", AROUND_DEFAULT, nested, { SIZE / PAGE_SIZE, 1, BY_4K } },
	{ NESTED "populate 64M of 4K, mapped by 2M", AROUND_DEFAULT, nested, { SIZE / PAGE_SIZE, 1, BY_2M } },
	{ NESTED "a page mapped, written, unmapped", AROUND_DEFAULT, nested, { 1, 1024, ANEW } },
	{ NESTED "64 pages mapped, written, unmapped", AROUND_DEFAULT, nested, { 64, 64, ANEW } },
	{ 0 },
};

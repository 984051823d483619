// SPDX-License-Identifier: GPL-2.0
/*
 * The least a VM must do: what the guest writes arrives in the host's memory and the other way
 * round, and KVM's page statistics tell what is mapped, and that it is gone again.
 */
#include <sys/mman.h>

#include "vm.h"

#define PAGES	2048UL
#define SIZE	(PAGES * PAGE_SIZE)

static guest_code void count_up(uint64_t gpa)
{
	for (;;) {
		for (uint64_t page = gpa; page < gpa + SIZE; page += PAGE_SIZE)
			store(page, load(page) + page);
		guest_sync(1);
	}
}

static bool all_pages_hold(uint8_t *base, uint64_t factor, uint64_t offset)
{
	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		if (*(uint64_t *)(base + at) != factor * (VM_TEST_GPA + at) + offset)
			return false;
	return true;
}

static void with_memory(bool huge)
{
	const char *kind = huge ? "2M" : "4K";
	const char *stat = huge ? "pages_2m" : "pages_4k";
	uint64_t expected = huge ? SIZE / HUGE_SIZE : PAGES;
	uint8_t *base = memory(SIZE, huge);
	uint64_t before, mapped, left, fixed, taken;
	struct vcpu *vcpu;
	struct vm vm;

	vm_create(&vm);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SIZE, base, 0));
	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		*(uint64_t *)(base + at) = 7;
	vcpu = vm_vcpu(&vm, count_up, VM_TEST_GPA);
	before = kvm_stat(vm.fd, stat);
	ok(vcpu_run_to_sync(vcpu) == 1 && all_pages_hold(base, 1, 7),
	   "%s: the guest sees what the host wrote, the host what the guest wrote", kind);
	mapped = kvm_stat(vm.fd, stat) - before;
	ok(mapped >= expected, "%s: %s counts the mapped pages (%lu, at least %lu)", kind, stat, mapped, expected);
	/* One fault may map several pages. */
	fixed = kvm_stat(vcpu->fd, "pf_fixed");
	taken = kvm_stat(vcpu->fd, "pf_taken");
	ok(fixed > 0 && fixed <= taken, "%s: pf_fixed (%lu) counts faults out of pf_taken (%lu)", kind, fixed, taken);
	ok(vcpu_run_to_sync(vcpu) == 1 && all_pages_hold(base, 2, 7), "%s: a second pass works on the same memory", kind);
	must(munmap(base, SIZE));
	left = kvm_stat(vm.fd, stat);
	ok(left <= before + mapped - expected, "%s: %s goes down when the memory goes away (%lu left)", kind, stat, left);
	must(vm_slot(&vm, 0, 0, 0, NULL, 0));
	vm_destroy(&vm);
}

int main(void)
{
	plan(10);
	with_memory(false);
	with_memory(true);
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * KVM_PRE_FAULT_MEMORY maps memory before the guest touches it: the statistics show the
 * pages, the guest then runs without a fault on them, and its data is right.
 */
#include <errno.h>
#include <sys/ioctl.h>

#include "host.h"
#include "vm.h"

#define PAGES	1024UL
#define SIZE	(PAGES * PAGE_SIZE)

static guest_code void sum_pages(uint64_t gpa)
{
	for (;;) {
		uint64_t sum = 0;

		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
			sum += load(gpa + at);
		guest_sync((uint32_t)sum);
	}
}

static int prefault(struct vcpu *vcpu, uint64_t gpa, uint64_t size)
{
	struct kvm_pre_fault_memory range = { .gpa = gpa, .size = size };
	int ret;

	do {
		ret = ioctl(vcpu->fd, KVM_PRE_FAULT_MEMORY, &range);
	} while (ret == 0 && range.size);
	return ret;
}

static void with_memory(bool huge)
{
	const char *stat = huge ? "pages_2m" : "pages_4k";
	uint64_t expected = huge ? SIZE / HUGE_SIZE : PAGES;
	uint8_t *base = memory(SIZE, huge);
	uint64_t before, after, faults, sum = 0;
	struct vcpu *vcpu;
	struct vm vm;

	vm_create(&vm);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SIZE, base, 0));
	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		sum += *(uint64_t *)(base + at) = at * 3 + 1;
	vcpu = vm_vcpu(&vm, sum_pages, VM_TEST_GPA);
	before = kvm_stat(vm.fd, stat);
	if (prefault(vcpu, VM_TEST_GPA, SIZE))
		bail("KVM_PRE_FAULT_MEMORY: %m");
	after = kvm_stat(vm.fd, stat);
	ok(after - before == expected, "%s went up by what was pre-faulted (%lu of %lu)", stat, after - before, expected);
	faults = kvm_stat(vcpu->fd, "pf_fixed");
	ok(vcpu_run_to_sync(vcpu) == (uint32_t)sum, "%s: the guest reads the right data", stat);
	faults = kvm_stat(vcpu->fd, "pf_fixed") - faults;
	if (kvm_tracks_use_by_faults())
		ok(faults >= expected && faults < expected + 64,
		   "%s: and faults once on each page that was pre-faulted (%lu faults)", stat, faults);
	else
		ok(faults < 64, "%s: and faults on what was not pre-faulted only (%lu faults)", stat, faults);
	ok(prefault(vcpu, VM_TEST_GPA, SIZE) == 0 && kvm_stat(vm.fd, stat) - before - expected < 64,
	   "%s: pre-faulting again adds nothing", stat);
	ok(prefault(vcpu, VM_TEST_GPA + SIZE, PAGE_SIZE) && errno == ENOENT, "%s: no slot, no pre-fault (ENOENT)", stat);
	vm_destroy(&vm);
}

int main(void)
{
	struct vm vm;

	vm_create(&vm);
	if (vm_cap(&vm, KVM_CAP_PRE_FAULT_MEMORY) <= 0)
		skip_all("KVM has no KVM_PRE_FAULT_MEMORY in this mode");
	vm_destroy(&vm);
	plan(10);
	with_memory(false);
	with_memory(true);
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * A cached MMIO translation must not outlive a change of the memory slots: an address that
 * was MMIO a thousand times is memory as soon as a slot covers it, and the other way round.
 */
#include <string.h>

#include "host.h"
#include "vm.h"

#define SIZE	(1 * MIB)

static guest_code void read_on_and_on(uint64_t gpa)
{
	for (;;)
		guest_sync((uint32_t)load(gpa));
}

static bool mmio_then_value(struct vcpu *vcpu, uint64_t gpa, uint64_t answer)
{
	if (vcpu_run(vcpu))
		bail("KVM_RUN: %m");
	if (!exit_is_mmio(vcpu, gpa, false))
		return false;
	memcpy(vcpu->run->mmio.data, &answer, sizeof(answer));
	return vcpu_run_to_sync(vcpu) == (uint32_t)answer;
}

int main(void)
{
	uint64_t gpa = VM_TEST_GPA + 0x5000;
	uint8_t *base = memory(SIZE, false);
	bool right = true, cached = true;
	struct vcpu *vcpu, *second;
	uint64_t emulated;
	struct vm vm;

	plan(5);
	vm_create(&vm);
	vcpu = vm_vcpu(&vm, read_on_and_on, gpa);
	second = vm_vcpu(&vm, read_on_and_on, gpa);
	*(uint64_t *)(base + 0x5000) = 4242;

	for (uint64_t i = 0; i < 100; i++)
		cached &= mmio_then_value(vcpu, gpa, i);
	ok(cached, "100 reads of a hole all leave as MMIO");
	emulated = kvm_stat(vcpu->fd, "pf_emulate") + kvm_stat(vcpu->fd, "pf_mmio_spte_created");
	note("pf_emulate + pf_mmio_spte_created: %lu", emulated);

	for (uint64_t i = 0; i < 100 && right; i++) {
		must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
		right = vcpu_run_to_sync(vcpu) == 4242 && vcpu_run_to_sync(second) == 4242;
		must(vm_slot(&vm, 1, 0, 0, NULL, 0));
		right = right && mmio_then_value(vcpu, gpa, i) && mmio_then_value(second, gpa, i + 1);
	}
	ok(right, "100 times: a slot over the hole is seen at once by two vCPUs, and its end too");

	/* A slot elsewhere changes the generation only; the hole stays a hole. */
	right = true;
	for (uint64_t i = 0; i < 100 && right; i++) {
		must(vm_slot(&vm, 1, VM_TEST_GPA + 64 * MIB, i & 1 ? 0 : SIZE, base, 0));
		right = mmio_then_value(vcpu, gpa, 1000 + i);
	}
	ok(right, "changes of slots elsewhere leave a hole a hole");
	ok(kvm_caches_mmio() == (kvm_stat(vcpu->fd, "pf_mmio_spte_created") > 0), "MMIO was cached in SPTEs, if KVM does so");
	must(vm_slot(&vm, 2, VM_TEST_GPA, PAGE_SIZE * 5, base, 0));
	ok(mmio_then_value(vcpu, gpa, 7), "a slot that ends right below the address leaves it MMIO");
	vm_destroy(&vm);
	return finish();
}

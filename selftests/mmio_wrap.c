// SPDX-License-Identifier: GPL-2.0
/*
 * An entry for MMIO has only the low bits of the generation of the slots in which it was made. When as many slots have
 * changed as it takes for these bits to come round again, the entry must not pass for a new one.
 */
#include "host.h"
#include "vm.h"

/* Of the generation, in an entry; and how far one change of a slot takes it, with a second address space for SMM. */
#define GENERATIONS	(1UL << 18)
#define STEP		2UL
#define GPA		VM_TEST_GPA
#define ELSEWHERE	(VM_TEST_GPA + 64 * MIB)

static guest_code void read_on_and_on(uint64_t gpa)
{
	for (;;)
		guest_sync((uint32_t)load(gpa));
}

/* Each is a change: log on, log off. */
static void change_slots(struct vm *vm, void *page, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		must(vm_slot(vm, 2, ELSEWHERE, PAGE_SIZE, page, i % 2 ? 0 : KVM_MEM_LOG_DIRTY_PAGES));
}

int main(void)
{
	uint8_t *base = memory(2 * PAGE_SIZE, false);
	uint64_t mapped;
	struct vcpu *vcpu;
	struct vm vm;

	if (!kvm_caches_mmio())
		skip_all("KVM caches no MMIO on this CPU");
	plan(3);
	*(uint64_t *)base = 4242;
	vm_create(&vm);
	must(vm_slot(&vm, 2, ELSEWHERE, PAGE_SIZE, base + PAGE_SIZE, 0));
	vcpu = vm_vcpu(&vm, read_on_and_on, GPA);
	if (vcpu_run(vcpu) || !exit_is_mmio(vcpu, GPA, false))
		bail("the first access is not one to MMIO");
	vcpu_run_to_sync(vcpu);
	ok(kvm_stat(vcpu->fd, "pf_mmio_spte_created") == 1, "an access to no memory leaves an entry behind");
	mapped = kvm_stat(vm.fd, "pages_4k");
	change_slots(&vm, base + PAGE_SIZE, GENERATIONS / STEP - 1);
	/* The last change of the round puts memory there. */
	must(vm_slot(&vm, 1, GPA, PAGE_SIZE, base, 0));
	ok(kvm_stat(vm.fd, "pages_4k") < mapped, "when the generations begin again everything is zapped");
	ok(vcpu_run(vcpu) == 0 && exit_is_sync(vcpu, 4242), "memory of the same generation is memory");
	vm_destroy(&vm);
	return finish();
}

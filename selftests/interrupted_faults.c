// SPDX-License-Identifier: GPL-2.0
/*
 * A guest takes one exception after the other, and interrupts of the host take it out of the guest. Some come just when an
 * exception has been delivered, before the handler's first instruction. The guest has to go on in its handler then: if it
 * comes back to the instruction that caused the exception, it has the handler's stack, which comes to light, and rights.
 */
#include <sys/ioctl.h>

#include "vm.h"

#define ROUNDS		20000UL
#define INTERRUPTS	200

#define IDT_GPA		VM_SCRATCH_GPA
#define CODE_SELECTOR	8UL
#define INTERRUPT_GATE	0x8eUL

/* KVM does not intercept #DE, so that the CPU delivers it by itself. */
static guest_code void divide_by_zero(uint64_t unused)
{
	(void)unused;
	guest_sync(1);
	for (;;) {
		for (uint64_t round = 0; round < ROUNDS; round++)
			__asm__ volatile("divl %%ecx" : : "a"(1), "d"(0), "c"(0) : "cc", "memory");
		guest_sync(1);
	}
}

/* Goes on behind the instruction, which has two bytes. */
static guest_code __attribute__((naked)) void skip_it(uint64_t unused)
{
	(void)unused;
	__asm__ volatile("addq $2, (%rsp)\n\t"
			 "iretq");
}

/* Vector 0 is #DE. */
static void set_handler(struct vcpu *vcpu)
{
	uint64_t *gate = (void *)(vcpu->vm->low + IDT_GPA), handler = vm_code(skip_it);
	struct kvm_sregs sregs;

	gate[0] = (handler & 0xffff) | CODE_SELECTOR << 16 | INTERRUPT_GATE << 40 | (handler >> 16 & 0xffff) << 48;
	gate[1] = handler >> 32;
	must(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs));
	sregs.idt.base = IDT_GPA;
	sregs.idt.limit = 15;
	must(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs));
}

static uint64_t stack_pointer(struct vcpu *vcpu)
{
	struct kvm_regs regs;

	must(ioctl(vcpu->fd, KVM_GET_REGS, &regs));
	return regs.rsp;
}

int main(void)
{
	uint64_t interrupts = 0, exceptions = 0, stack;
	struct vcpu *vcpu;
	struct vm vm;

	plan(1);
	vm_create(&vm);
	vcpu = vm_vcpu(&vm, divide_by_zero, 0);
	set_handler(vcpu);
	vcpu_run_to_sync(vcpu);
	stack = stack_pointer(vcpu);
	while (interrupts < INTERRUPTS && stack_pointer(vcpu) == stack) {
		vcpu_run_to_sync(vcpu);
		exceptions += ROUNDS;
		interrupts = kvm_stat(vcpu->fd, "irq_exits");
	}
	ok(stack_pointer(vcpu) == stack, "the handler of each of %lu exceptions ran, with %lu interrupts of the host",
	   exceptions, interrupts);
	vm_destroy(&vm);
	return finish();
}

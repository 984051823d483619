// SPDX-License-Identifier: GPL-2.0
#include <sys/ioctl.h>

#include "host.h"
#include "remap.h"
#include "svm.h"

#define TABLES		VM_SCRATCH_GPA
#define VMCB		(TABLES + SVM_IDENTITY_PAGES * PAGE_SIZE)
#define SAVE_AREA	(VMCB + PAGE_SIZE)
#define INNER_STACK	(SAVE_AREA + 2 * PAGE_SIZE)
/* Zeroes that are run as code add something to a byte here. */
#define SPARE		(REMAP_TABLE + PAGE_SIZE)

#define DONE		1

/* In the shared page. */
struct message {
	uint64_t order, value, loaded;
	uint64_t nested, code, cr3;
};

static guest_code void play(uint64_t shared)
{
	volatile struct message *message = (void *)shared;
	uint64_t spare;

	for (;;) {
		switch (message->order) {
		case REMAP_LOAD:
			message->loaded = load(REMAP_X);
			break;
		case REMAP_STORE:
			store(REMAP_X, message->value);
			break;
		case REMAP_CALL:
			/* Two zeroes add AL to what RAX points to. Below the stack pointer is the compiler's. */
			spare = SPARE;
			__asm__ volatile("lea -128(%%rsp), %%rsp; call *%1; lea 128(%%rsp), %%rsp" : "+a"(spare) :
					 "r"(REMAP_X + PAGE_SIZE - 2) : "memory", "cc");
			break;
		case REMAP_ENTRY:
			store(REMAP_TABLE, message->value);
			break;
		case REMAP_OTHER:
			store(REMAP_TABLE + PAGE_SIZE - 8, message->value);
			break;
		case REMAP_FLUSH:
			/* The hypervisor lets the nested guest begin again, here. */
			message->order = DONE << 8;
			if (message->nested)
				__asm__ volatile("vmmcall");
			else
				__asm__ volatile("mov %0, %%cr3" : : "r"(message->cr3) : "memory");
			break;
		}
		guest_sync(DONE);
	}
}

static guest_code void hypervisor(uint64_t shared)
{
	volatile struct message *message = (void *)shared;
	uint64_t exit;

	do {
		exit = svm_run(VMCB, INNER_STACK, message->code, shared);
		*(volatile uint8_t *)(VMCB + VMCB_TLB_CONTROL) = 1;
	} while (exit == EXIT_VMMCALL);
	guest_sync(exit);
}

bool remap_possible(void)
{
	return kvm_paging() == SHADOW || svm_offered();
}

/* The directory that maps the GiB of the page: the guest's own, or the hypervisor's. */
static uint64_t *directory(struct remap *remap, uint64_t cr3)
{
	uint8_t *low = remap->vm.low;
	uint64_t *pointers = (void *)(low + TABLES + PAGE_SIZE);

	if (!remap->nested)
		pointers = (void *)(low + (*(uint64_t *)(low + cr3) & ~0xfffUL));
	return (void *)(low + (pointers[REMAP_X / GIB] & ~0xfffUL));
}

void remap_create(struct remap *remap, bool only_own)
{
	struct message *message;
	struct kvm_sregs sregs;
	struct vm *vm = &remap->vm;

	vm_create(vm);
	if (only_own)
		vm_enable(vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	remap->nested = kvm_paging() != SHADOW;
	remap->vcpu = vm_vcpu(vm, remap->nested ? hypervisor : play, VM_SHARED_GPA);
	if (remap->nested)
		svm_identity(remap->vcpu, VMCB, SAVE_AREA, TABLES);
	must(ioctl(remap->vcpu->fd, KVM_GET_SREGS, &sregs));
	directory(remap, sregs.cr3)[REMAP_X % GIB / HUGE_SIZE] = REMAP_TABLE | REMAP_WRITABLE;
	message = vm->shared;
	message->nested = remap->nested;
	message->code = vm_code(play);
	message->cr3 = sregs.cr3;
}

int remap_run(struct remap *remap, enum remap_order order, uint64_t value)
{
	struct message *message = remap->vm.shared;

	message->order = order;
	message->value = value;
	return vcpu_run(remap->vcpu);
}

bool remap_give(struct remap *remap, enum remap_order order, uint64_t value)
{
	return !remap_run(remap, order, value) && exit_is_sync(remap->vcpu, DONE);
}

bool remap_reads(struct remap *remap, uint64_t value)
{
	return remap_give(remap, REMAP_LOAD, 0) && ((struct message *)remap->vm.shared)->loaded == value;
}

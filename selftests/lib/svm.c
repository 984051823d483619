// SPDX-License-Identifier: GPL-2.0
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "svm.h"

#define SEL_CODE64	0x08
#define SEL_DATA	0x10
#define EFER_LME	(1UL << 8)
#define EFER_LMA	(1UL << 10)
#define EFER_SVME	(1UL << 12)
#define CR0		0x80010023UL	/* PG, WP, NE, MP, PE */
#define CR4_PAE		(1UL << 5)
#define MSR_VM_HSAVE_PA	0xc0010117

#define ENTRY_LARGE	(1UL << 7)

bool svm_offered(void)
{
	return access("/sys/module/kvm_amd", F_OK) == 0;
}

static void segment(uint8_t *vmcb, int offset, uint16_t selector, uint16_t attributes)
{
	uint32_t limit = ~0U;

	memcpy(vmcb + offset, &selector, 2);
	memcpy(vmcb + offset + 2, &attributes, 2);
	memcpy(vmcb + offset + 4, &limit, 4);
}

static void set(uint8_t *vmcb, int offset, uint64_t value)
{
	memcpy(vmcb + offset, &value, 8);
}

void svm_prepare(struct vcpu *vcpu, uint64_t vmcb_gpa, uint64_t save_area, uint64_t cr3)
{
	struct { struct kvm_msrs msrs; struct kvm_msr_entry entry; } msr = {
		.msrs.nmsrs = 1, .entry = { .index = MSR_VM_HSAVE_PA, .data = save_area },
	};
	uint8_t *vmcb = vcpu->vm->low + vmcb_gpa;
	uint32_t exceptions = ~0U, asid = 1;
	struct kvm_sregs sregs;

	must(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs));
	sregs.efer |= EFER_SVME;
	must(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs));
	memcpy(vmcb + 0x08, &exceptions, 4);
	set(vmcb, 0x0c, 1UL << 31 | 3UL << 32);	/* shutdown; VMRUN and VMMCALL */
	memcpy(vmcb + 0x58, &asid, 4);
	vmcb[VMCB_TLB_CONTROL] = 1;
	set(vmcb, 0x90, 1);			/* nested paging */
	segment(vmcb, 0x400, SEL_DATA, 0xc93);
	segment(vmcb, 0x410, SEL_CODE64, 0xa9b);
	segment(vmcb, 0x420, SEL_DATA, 0xc93);
	segment(vmcb, 0x430, SEL_DATA, 0xc93);
	set(vmcb, 0x4d0, EFER_SVME | EFER_LME | EFER_LMA);
	set(vmcb, 0x548, CR4_PAE);
	set(vmcb, 0x550, cr3);
	set(vmcb, 0x558, CR0);
	set(vmcb, 0x560, 0x400);
	set(vmcb, 0x568, 0xffff0ff0);
	set(vmcb, 0x570, 2);
	set(vmcb, 0x668, 0x0007040600070406);
	if (ioctl(vcpu->fd, KVM_SET_MSRS, &msr) != 1)
		bail("KVM_SET_MSRS: %m");
}

void svm_identity(struct vcpu *vcpu, uint64_t vmcb, uint64_t save_area, uint64_t tables)
{
	struct vm *vm = vcpu->vm;
	uint64_t *root = (void *)(vm->low + tables), *pointers = root + PAGE_SIZE / 8;
	struct kvm_sregs sregs;

	must(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs));
	svm_prepare(vcpu, vmcb, save_area, sregs.cr3);
	root[0] = (tables + PAGE_SIZE) | SVM_ENTRY;
	for (uint64_t gib = 0; gib < 4; gib++)
		pointers[gib] = (tables + (2 + gib) * PAGE_SIZE) | SVM_ENTRY;
	for (uint64_t gpa = 0; gpa < 4 * GIB; gpa += HUGE_SIZE)
		*svm_identity_entry(vm, tables, gpa) = gpa | SVM_ENTRY | ENTRY_LARGE;
	set(vm->low + vmcb, VMCB_NCR3, tables);
}

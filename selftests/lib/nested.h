/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A guest that runs a guest, by SVM or by VMX, whichever the host has, with nested paging. The nested guest shares its
 * hypervisor's page tables, and ends with each exception.
 */
#ifndef RMMU_NESTED_H
#define RMMU_NESTED_H

#include "vm.h"

/* What nested_prepare() wants in the low slot: this page, the VMCB or VMCS, and a page of the hypervisor's own. */
#define NESTED_SIZE		(3 * PAGE_SIZE)

struct nested {
	uint64_t vmx;		/* or else SVM */
	uint64_t control;	/* the VMCB or VMCS */
	uint64_t own;		/* where SVM saves the hypervisor's state, or the VMXON region */
	uint64_t tables;	/* the root of the tables that map the nested guest's memory */
	uint64_t started, launched;	/* the VMCS is there; and has been used */
	uint64_t flush[2];	/* INVEPT's descriptor */
	uint64_t gpa, info;	/* after NESTED_FAULT; the second is the vendor's */
};

/* Why a nested guest ended. All else is the vendor's code, with NESTED_OTHER. */
enum { NESTED_HYPERCALL = 1, NESTED_FAULT = 2 };
#define NESTED_OTHER		0x10000
#define NESTED_NOT_ENTERED	0x20000

/* Whether KVM has nested guests. */
bool nested_offered(void);
/* Before the vCPU runs: lets it have nested guests. `tables` is a place for NESTED_TABLES pages that map 4 GiB by 2M. */
#define NESTED_TABLES		6
void nested_prepare(struct vcpu *vcpu, uint64_t nested, uint64_t tables);
/* What an entry of the hypervisor's tables has besides an address: present, all permissions, accessed, dirty. */
uint64_t nested_entry(bool leads_to_table);
/* The entry of these tables that maps 2 MiB at `gpa`. */
static inline uint64_t *nested_identity_entry(struct vm *vm, uint64_t tables, uint64_t gpa)
{
	return (uint64_t *)(vm->low + tables + 2 * PAGE_SIZE) + gpa / HUGE_SIZE;
}

/* For the hypervisor: lets its guest run code(argument); why it ended. */
uint64_t nested_run(uint64_t nested, uint64_t stack, uint64_t code, uint64_t argument);
/* For the hypervisor: its tables have changed. */
void nested_flush(uint64_t nested);

/* For the nested guest: to its hypervisor. */
guest_inline void nested_hypercall(uint64_t nested)
{
	if (((volatile struct nested *)nested)->vmx)
		__asm__ volatile("vmcall" : : : "memory");
	else
		__asm__ volatile("vmmcall" : : : "memory");
}

#endif

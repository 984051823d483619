/* SPDX-License-Identifier: GPL-2.0 */
/* What a guest that runs a guest by SVM needs; for C and assembly. */
#ifndef RMMU_SVM_H
#define RMMU_SVM_H

/* Places in a VMCB. */
#define VMCB_TLB_CONTROL	0x05c
#define VMCB_EXIT_CODE		0x070
#define VMCB_EXIT_INFO1		0x078
#define VMCB_EXIT_INFO2		0x080
#define VMCB_NCR3		0x0b0
#define VMCB_RIP		0x578
#define VMCB_RSP		0x5d8
#define VMCB_RAX		0x5f8
#define EXIT_VMMCALL		0x081
#define EXIT_NPF		0x400

#ifndef __ASSEMBLER__

#include "vm.h"

/*
 * Lets a vCPU use SVM, and prepares two pages of its VM's low slot: a VMCB for a guest in 64-bit mode whose page tables are at
 * `cr3` and whose every exception ends up with its hypervisor, with nested paging; and the hypervisor's own save area. RIP,
 * RSP and nested CR3 are for the hypervisor to set.
 */
void svm_prepare(struct vcpu *vcpu, uint64_t vmcb, uint64_t save_area, uint64_t cr3);

/* Whether KVM has nested guests of SVM. */
bool svm_offered(void);

/* An entry of nested page tables: present, writable, user, accessed, dirty. */
#define SVM_ENTRY		0x67UL
/*
 * svm_prepare() for a guest that shares its hypervisor's page tables, and nested page tables, in so many pages at `tables`,
 * that map the first 4 GiB one to one, in 2M pages.
 */
#define SVM_IDENTITY_PAGES	6
void svm_identity(struct vcpu *vcpu, uint64_t vmcb, uint64_t save_area, uint64_t tables);
/* The entry of svm_identity()'s tables that maps 2 MiB at `gpa`, by the place of the tables. */
static inline uint64_t *svm_identity_entry(struct vm *vm, uint64_t tables, uint64_t gpa)
{
	return (uint64_t *)(vm->low + tables + 2 * PAGE_SIZE) + gpa / HUGE_SIZE;
}

/* For the hypervisor: lets its guest run code(argument). Returns the exit code. */
guest_inline uint64_t svm_run(uint64_t vmcb, uint64_t stack, uint64_t code, uint64_t argument)
{
	store(vmcb + VMCB_RIP, code);
	/* As after a call: 8 below a multiple of 16. */
	store(vmcb + VMCB_RSP, stack - 8);
	/* All registers but these are the nested guest's afterwards. Below the stack pointer is the compiler's. */
	__asm__ volatile("lea -128(%%rsp), %%rsp; push %%rbp; vmrun %%rax; pop %%rbp; lea 128(%%rsp), %%rsp"
			 : "+a"(vmcb), "+D"(argument) :
			 : "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
			   "memory", "cc");
	*(volatile uint8_t *)(vmcb + VMCB_TLB_CONTROL) = 0;
	return load(vmcb + VMCB_EXIT_CODE);
}

#endif
#endif

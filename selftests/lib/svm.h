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

#endif
#endif

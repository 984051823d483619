/* SPDX-License-Identifier: GPL-2.0 */
/* What a guest that runs a guest by VMX needs. */
#ifndef RMMU_VMX_H
#define RMMU_VMX_H

#include "nested.h"

/* Bits of an entry of EPT. */
#define EPT_READ	(1UL << 0)
#define EPT_WRITE	(1UL << 1)
#define EPT_EXECUTE	(1UL << 2)
#define EPT_ALL		(EPT_READ | EPT_WRITE | EPT_EXECUTE)
#define EPT_WB		(6UL << 3)
#define EPT_LARGE	(1UL << 7)
#define EPT_ACCESSED	(1UL << 8)
#define EPT_DIRTY	(1UL << 9)

/* Reasons to exit. */
#define VMX_VMCALL		18
#define VMX_EPT_VIOLATION	48
#define VMX_EPT_MISCONFIGURATION	49

/* What EPT can do, in the MSR for it. */
#define VMX_EPT_EXECUTE_ONLY	(1UL << 0)
#define VMX_EPT_AD		(1UL << 21)

bool vmx_offered(void);
/* The host's part: a feature that firmware enables, and the tables. */
void vmx_prepare(struct vcpu *vcpu);
uint64_t vmx_ept_capabilities(struct vcpu *vcpu);
/* The hypervisor's parts. The first makes the VMCS if it is not there yet. */
uint64_t vmx_run(volatile struct nested *nested, uint64_t stack, uint64_t code, uint64_t argument);
void vmx_flush(volatile struct nested *nested);
/* From now on the nested guest's memory is mapped by the tables below that root. */
void vmx_root(volatile struct nested *nested, uint64_t root);

#endif

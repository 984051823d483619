// SPDX-License-Identifier: GPL-2.0
#include <string.h>
#include <sys/ioctl.h>

#include "nested.h"
#include "svm.h"
#include "vmx.h"

bool nested_offered(void)
{
	return svm_offered() || vmx_offered();
}

uint64_t nested_entry(bool leads_to_table)
{
	if (svm_offered())
		return SVM_ENTRY;
	return EPT_ALL | EPT_ACCESSED | (leads_to_table ? 0 : EPT_WB | EPT_DIRTY);
}

void nested_prepare(struct vcpu *vcpu, uint64_t at, uint64_t tables)
{
	struct nested nested = {
		.vmx = !svm_offered(), .control = at + PAGE_SIZE, .own = at + 2 * PAGE_SIZE, .tables = tables,
	};
	uint64_t *root = (void *)(vcpu->vm->low + tables), *pointers = root + PAGE_SIZE / 8;

	memcpy(vcpu->vm->low + at, &nested, sizeof(nested));
	if (!nested.vmx) {
		svm_identity(vcpu, nested.control, nested.own, tables);
		return;
	}
	root[0] = (tables + PAGE_SIZE) | nested_entry(true);
	for (uint64_t gib = 0; gib < 4; gib++)
		pointers[gib] = (tables + (2 + gib) * PAGE_SIZE) | nested_entry(true);
	for (uint64_t gpa = 0; gpa < 4 * GIB; gpa += HUGE_SIZE)
		*nested_identity_entry(vcpu->vm, tables, gpa) = gpa | nested_entry(false) | EPT_LARGE;
	vmx_prepare(vcpu);
}

guest_code uint64_t nested_run(uint64_t at, uint64_t stack, uint64_t code, uint64_t argument)
{
	volatile struct nested *nested = (void *)at;
	uint64_t exit;

	if (nested->vmx)
		return vmx_run(nested, stack, code, argument);
	exit = svm_run(nested->control, stack, code, argument);
	nested->gpa = load(nested->control + VMCB_EXIT_INFO2);
	nested->info = load(nested->control + VMCB_EXIT_INFO1);
	return exit == EXIT_VMMCALL ? NESTED_HYPERCALL : exit == EXIT_NPF ? NESTED_FAULT : exit | NESTED_OTHER;
}

guest_code void nested_flush(uint64_t at)
{
	volatile struct nested *nested = (void *)at;

	if (nested->vmx)
		vmx_flush(nested);
	else
		*(volatile uint8_t *)(nested->control + VMCB_TLB_CONTROL) = 1;
}

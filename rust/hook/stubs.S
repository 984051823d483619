/* SPDX-License-Identifier: GPL-2.0 */
/*
 * One stub an entry point, entered by a jump from the function's patched entry with everything as it was at the call.
 *
 * The stub reads the owner mark of the VM (see rust/kvm/vm.rs) and goes to the Rust handler if the VM is ours, else on into
 * the function itself, past its patched entry. It touches %rax only, which is dead at the entry of a C function. All jumps are
 * direct, so neither IBT nor return thunks nor call depth tracking see anything of it.
 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include "offsets.h"

/* Module text and data lie in the top 2 GiB: the mark's address fits a sign-extended immediate. */
.macro RMMU_TEST_VM
	cmpq	$rmmu_owner_mark, RMMU_KVM_OWNER(%rdi)
.endm

.macro RMMU_TEST_VCPU
	movq	RMMU_VCPU_KVM(%rdi), %rax
	cmpq	$rmmu_owner_mark, RMMU_KVM_OWNER(%rax)
.endm

.macro RMMU_TEST_FILE
	movq	RMMU_FILE_KVM(%rdi), %rax
	cmpq	$rmmu_owner_mark, RMMU_KVM_OWNER(%rax)
.endm

.macro RMMU_STUB func owner
SYM_FUNC_START(rmmu_stub_\func)
	ANNOTATE_NOENDBR
	.ifc \owner, ANY
	jmp	rmmu_\func
	.else
	RMMU_TEST_\owner
	/* One jump for VMs that are not ours. Static calls know conditional jumps, and patch them as they do others. */
	jne	__SCT__rmmu_orig_\func
	jmp	rmmu_\func
	.endif
SYM_FUNC_END(rmmu_stub_\func)
.endm

	.text
#define RMMU_HOOK(func, owner, proto) RMMU_STUB func owner
#include "entry_points.h"

/* SPDX-License-Identifier: GPL-2.0 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <asm/nospec-branch.h>

/* ftrace calls these at the entry of a function, which finds its arguments as they were. */
.macro PAUSE_STUB name handler
SYM_FUNC_START(\name)
	ANNOTATE_NOENDBR
	pushq	%rbp
	movq	%rsp, %rbp
	pushq	%rdi
	pushq	%rsi
	pushq	%rdx
	pushq	%rcx
	pushq	%r8
	pushq	%r9
	CALL_DEPTH_ACCOUNT
	call	\handler
	popq	%r9
	popq	%r8
	popq	%rcx
	popq	%rdx
	popq	%rsi
	popq	%rdi
	popq	%rbp
	RET
SYM_FUNC_END(\name)
.endm

	.text
PAUSE_STUB pause_at_before_stub pause_at_before
PAUSE_STUB pause_at_first_stub pause_at_first
PAUSE_STUB pause_at_second_stub pause_at_second

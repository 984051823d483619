/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The guest in 64-bit mode: it does one op after the other and notes what came of each. RBX points
 * to the op. A page fault ends the op; nothing returns to where it happened.
 */
#include "layout.h"

	.section .rodata
	.code64
	.globl guest64, guest64_end, guest64_user, guest64_user_end
	.globl guest64_pf, guest64_int80, guest64_ud, guest64_df, guest64_gp

	.balign 16
guest64:
	movl	$SEL_TSS, %eax
	ltr	%ax
restart:
	movl	$OPS_ADDR, %ebx
run:
	movl	OP_KIND(%rbx), %eax
	movq	OP_ADDR(%rbx), %rdi
	movq	OP_VALUE(%rbx), %rdx
	testl	$FLAG_INNER, OP_FLAGS(%rbx)
	jnz	inner
	testl	$FLAG_USER, OP_FLAGS(%rbx)
	jnz	user
	testl	$FLAG_AC, OP_FLAGS(%rbx)
	jz	1f
	pushq	$0x40002
	popfq
1:	cmpl	$KIND_READ, %eax
	je	read
	cmpl	$KIND_WRITE, %eax
	je	write
	cmpl	$KIND_EXEC, %eax
	je	exec
	cmpl	$KIND_INVLPG, %eax
	je	invlpg
	cmpl	$KIND_CR3, %eax
	je	cr3
	cmpl	$KIND_CR0, %eax
	je	cr0
	cmpl	$KIND_CR4, %eax
	je	cr4
	cmpl	$KIND_EFER, %eax
	je	efer
	cmpl	$KIND_INVPCID, %eax
	je	invpcid
	cmpl	$KIND_NCR3, %eax
	je	ncr3
	cmpl	$KIND_FLUSH, %eax
	je	flush
	movl	$SYNC_DONE, %eax
	movw	$0x3f0, %dx
	outl	%eax, %dx
	jmp	restart

read:	movq	(%rdi), %rax
done:	movq	%rax, OP_RESULT(%rbx)
next:	addq	$OP_SIZE, %rbx
	pushq	$2
	popfq
	jmp	run
write:	movq	%rdx, (%rdi)
	jmp	next
exec:	call	*%rdi
	jmp	done
invlpg:	invlpg	(%rdi)
	jmp	next
cr3:	movq	%rdx, %cr3
	movq	%cr3, %rax
	jmp	done
cr0:	movq	%rdx, %cr0
	jmp	next
cr4:	movq	%rdx, %cr4
	jmp	next
efer:	movl	%edx, %eax
	xorl	%edx, %edx
	movl	$MSR_EFER, %ecx
	wrmsr
	jmp	next
invpcid:
	movq	%rdx, %rax
	shrq	$INVPCID_TYPE_SHIFT, %rax
	movl	%edx, %edx
	pushq	%rdi
	pushq	%rdx
	invpcid	(%rsp), %rax
	addq	$16, %rsp
	jmp	next

user:
	decl	%eax
	shll	$4, %eax
	addl	$USER_CODE, %eax
	pushq	$SEL_USER_DATA
	pushq	$USER_STACK_END
	pushq	$2
	pushq	$SEL_USER_CODE64
	pushq	%rax
	iretq

inner:
	decl	%eax
	shll	$4, %eax
	addl	$(USER_CODE + 64), %eax
	movq	%rax, VMCB_ADDR + VMCB_RIP
	movq	$USER_STACK_END, VMCB_ADDR + VMCB_RSP
	movl	$VMCB_ADDR, %eax
	vmrun	%rax
	movb	$0, VMCB_ADDR + VMCB_TLB_CONTROL
	movq	VMCB_ADDR + VMCB_EXIT_CODE, %rax
	cmpq	$EXIT_VMMCALL, %rax
	jne	1f
	movq	VMCB_ADDR + VMCB_RAX, %rax
	jmp	done
1:	cmpq	$EXIT_NPF, %rax
	jne	bad
	movq	VMCB_ADDR + VMCB_EXIT_INFO1, %rax
	movl	%eax, OP_ERROR(%rbx)
	movq	VMCB_ADDR + VMCB_EXIT_INFO2, %rax
	jmp	done
ncr3:	movq	%rdx, VMCB_ADDR + VMCB_NCR3
flush:	movb	$1, VMCB_ADDR + VMCB_TLB_CONTROL
	jmp	next

guest64_pf:
	popq	%rax
	movl	%eax, OP_ERROR(%rbx)
	movq	%cr2, %rax
	movl	$STACK_END, %esp
	jmp	done
guest64_int80:
	movl	$STACK_END, %esp
	jmp	done
guest64_ud:
	movl	$6, %eax
	jmp	bad
guest64_df:
	movl	$8, %eax
	jmp	bad
guest64_gp:
	movl	$13, %eax
bad:	addl	$SYNC_BAD, %eax
	movw	$0x3f0, %dx
	outl	%eax, %dx
	jmp	bad
guest64_end:

	/* Each in 16 bytes, in the order of the kinds; then the same for a nested guest. */
	.balign 16
guest64_user:
	movq	(%rdi), %rax
	int	$0x80
	.balign 16
	movq	%rdx, (%rdi)
	int	$0x80
	.balign 16
	call	*%rdi
	int	$0x80
	.balign 16
	ud2
	.balign 16
	movq	(%rdi), %rax
	vmmcall
	.balign 16
	movq	%rdx, (%rdi)
	vmmcall
	.balign 16
	call	*%rdi
	vmmcall
guest64_user_end:

	.section .note.GNU-stack, "", @progbits

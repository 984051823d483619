/* SPDX-License-Identifier: GPL-2.0 */
/* The guest in 32-bit mode; see guest64.S. EBX points to the op. */
#include "layout.h"

	.section .rodata
	.code32
	.globl guest32, guest32_end, guest32_user, guest32_user_end
	.globl guest32_pf, guest32_int80, guest32_ud, guest32_df, guest32_gp

	.balign 16
guest32:
	movl	$SEL_TSS, %eax
	ltr	%ax
restart:
	movl	$OPS_ADDR, %ebx
run:
	movl	OP_KIND(%ebx), %eax
	movl	OP_ADDR(%ebx), %edi
	movl	OP_VALUE(%ebx), %edx
	testl	$FLAG_USER, OP_FLAGS(%ebx)
	jnz	user
	testl	$FLAG_AC, OP_FLAGS(%ebx)
	jz	1f
	pushl	$0x40002
	popfl
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
	movl	$SYNC_DONE, %eax
	movw	$0x3f0, %dx
	outl	%eax, %dx
	jmp	restart

read:	movl	(%edi), %eax
done:	movl	%eax, OP_RESULT(%ebx)
next:	addl	$OP_SIZE, %ebx
	pushl	$2
	popfl
	jmp	run
write:	testl	$FLAG_WIDE, OP_FLAGS(%ebx)
	jz	1f
	movl	OP_VALUE + 4(%ebx), %ecx
	movl	%ecx, 4(%edi)
1:	movl	%edx, (%edi)
	jmp	next
exec:	call	*%edi
	jmp	done
invlpg:	invlpg	(%edi)
	jmp	next
cr3:	movl	%edx, %cr3
	movl	%cr3, %eax
	jmp	done
cr0:	movl	%edx, %cr0
	jmp	next
cr4:	movl	%edx, %cr4
	jmp	next
efer:	movl	%edx, %eax
	xorl	%edx, %edx
	movl	$MSR_EFER, %ecx
	wrmsr
	jmp	next

user:
	decl	%eax
	shll	$4, %eax
	addl	$USER_CODE, %eax
	pushl	$SEL_USER_DATA
	pushl	$USER_STACK_END
	pushl	$2
	pushl	$SEL_USER_CODE32
	pushl	%eax
	iretl

guest32_pf:
	popl	%eax
	movl	%eax, OP_ERROR(%ebx)
	movl	%cr2, %eax
	movl	$STACK_END, %esp
	jmp	done
guest32_int80:
	movl	$STACK_END, %esp
	jmp	done
guest32_ud:
	movl	$6, %eax
	jmp	bad
guest32_df:
	movl	$8, %eax
	jmp	bad
guest32_gp:
	movl	$13, %eax
bad:	addl	$SYNC_BAD, %eax
	movw	$0x3f0, %dx
	outl	%eax, %dx
	jmp	bad
guest32_end:

	.balign 16
guest32_user:
	movl	(%edi), %eax
	int	$0x80
	.balign 16
	movl	%edx, (%edi)
	int	$0x80
	.balign 16
	call	*%edi
	int	$0x80
guest32_user_end:

	.section .note.GNU-stack, "", @progbits

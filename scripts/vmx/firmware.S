/* SPDX-License-Identifier: GPL-2.0 */
/*
 * All the firmware that the machine with VMX has: 64 KiB at the end of the first 4 GiB. scripts/lib/kernelimage.py has
 * put the kernel into memory before the machine starts, with what it expects of a boot loader, so the CPU only has to be
 * brought into 64-bit mode and to jump. The layout of the page at PARAMS is kernelimage.py's.
 */
#define BASE		0xffff0000	/* where this is */
#define PARAMS		0x100000	/* struct boot_params and what else is in its page */
#define FIRST_START	(PARAMS + 0xfe8)	/* not 0 until the kernel has been entered */
#define ENTRY		(PARAMS + 0xff8)	/* the kernel's entry */
#define STACK		(PARAMS + 0xfe0)
#define PAGE_TABLES	(PARAMS + 0x1000)	/* map the first 4 GiB */

#define MSR_MTRR_DEF_TYPE	0x2ff
#define MTRR_ENABLED_WB		0x806
#define MSR_EFER		0xc0000080
#define EFER_LME		0x100
#define CR0_PE			1
#define CR0_PG			0x80000000
#define CR0_CACHES_ON		0x9fffffff
#define CR4_PAE			0x20

/* Offsets in the table of descriptors; those of the 64-bit segments are what the boot protocol wants. */
#define CODE32	0x8
#define CODE64	0x10
#define DATA	0x18

	.text
	.code16
start:
	cli
	cld
	lgdtl	%cs:descriptors - start
	movl	%cr0, %eax
	andl	$CR0_CACHES_ON, %eax
	orl	$CR0_PE, %eax
	movl	%eax, %cr0
	ljmpl	$CODE32, $BASE + protected - start

	.code32
protected:
	movl	$DATA, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	/* The kernel cannot be started twice, because its data is not what it was: a reset is the end. */
	cmpl	$0, FIRST_START
	je	power_off
	movl	$0, FIRST_START
	movl	$PAGE_TABLES, %eax
	movl	%eax, %cr3
	movl	$CR4_PAE, %eax
	movl	%eax, %cr4
	movl	$MSR_MTRR_DEF_TYPE, %ecx
	movl	$MTRR_ENABLED_WB, %eax
	xorl	%edx, %edx
	wrmsr
	movl	$MSR_EFER, %ecx
	rdmsr
	orl	$EFER_LME, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$CR0_PG, %eax
	movl	%eax, %cr0
	ljmpl	$CODE64, $BASE + long_mode - start

power_off:
	movl	$BASE + shutdown - start, %esi
	movl	$shutdown_end - shutdown, %ecx
	movl	$0x8900, %edx
	rep outsb
	hlt
	jmp	power_off

	.code64
long_mode:
	movl	$STACK, %esp
	movl	$PARAMS, %esi
	jmp	*ENTRY

	/* Bochs ends when this is written to that port. */
shutdown:
	.ascii	"Shutdown"
shutdown_end:

	.balign 8
table:
	.quad	0
	.quad	0x00cf9b000000ffff
	.quad	0x00af9b000000ffff
	.quad	0x00cf93000000ffff
descriptors:
	.word	. - table - 1
	.long	BASE + table - start

	/* Where a CPU starts. */
	.org	0xfff0
	.code16
	jmp	start
	.org	0x10000

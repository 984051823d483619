/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Where things are in the guest's physical memory, and what the guest is told to do; for C and
 * assembly.
 *
 * Three zones of 16 frames are what the random page tables and their data are made of: A at 0, B
 * at 4 MiB, C at 6 MiB. Everything else of the low slot is fixed, and mapped by tables that never
 * change. Zone D at 8 MiB is for data only, and zone E at 10 MiB is the same memory.
 */
#ifndef PAGING_LAYOUT_H
#define PAGING_LAYOUT_H

#include "svm.h"

#define ZONE_FRAMES	16
#define ZONE_A		0x000000
#define ZONE_B		0x400000
#define ZONE_C		0x600000
#define ZONE_D		0x800000
#define ZONE_E		0xa00000

#define FIXED_TABLES	0x020000	/* six pages, see machine.c */
#define PDPT_GPA	0x027000	/* the page-directory pointers of PAE: a root each 32 bytes */
#define INNER_TABLES	0x028000	/* seven pages: what a nested guest pages with */
#define OWN_ROOT	0x02f000	/* the hypervisor's, when the random tables are nested ones */
#define GDT_ADDR	0x030000
#define IDT_ADDR	0x031000
#define TSS_ADDR	0x032000
#define VMCB_ADDR	0x033000
#define HSAVE_ADDR	0x034000
#define STACK_END	0x036000
#define USER_CODE	0x037000	/* the only two pages that user mode may access */
#define USER_STACK_END	0x039000
#define CODE_ADDR	0x040000
#define OPS_ADDR	0x100000
#define MAX_OPS		512

/* Segments. 64-bit and 32-bit code, by the supervisor and by users. */
#define SEL_CODE64	0x08
#define SEL_DATA	0x10
#define SEL_USER_CODE32	0x1b
#define SEL_USER_DATA	0x23
#define SEL_USER_CODE64	0x2b
#define SEL_CODE32	0x30
#define SEL_TSS		0x38

#define MSR_EFER	0xc0000080

/* struct op */
#define OP_KIND		0
#define OP_FLAGS	4
#define OP_ADDR		8
#define OP_VALUE	16
#define OP_RESULT	24
#define OP_ERROR	32
#define OP_SIZE		40

#define KIND_END	0
/* Accesses; the guest's stubs are in this order. */
#define KIND_READ	1
#define KIND_WRITE	2
#define KIND_EXEC	3
#define KIND_INVLPG	4
#define KIND_CR3	5
#define KIND_CR0	6
#define KIND_CR4	7
#define KIND_EFER	8
#define KIND_INVPCID	9
/* Of the nested guest. */
#define KIND_NCR3	10
#define KIND_FLUSH	11

#define FLAG_USER	1
#define FLAG_AC		2
#define FLAG_INNER	4	/* by the nested guest */
#define FLAG_WIDE	8	/* 32-bit code: write the upper half, then the lower one */

/* The value of an INVPCID: its type above the PCID. */
#define INVPCID_TYPE_SHIFT 32

/* Values of guest_sync(). */
#define SYNC_DONE	0x600d
#define SYNC_BAD	0xbad0000

#endif

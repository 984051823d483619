/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A guest that maps a page of its addresses to one frame and another, in a table that KVM shadows: with nested paging a nested
 * guest and a table of its hypervisor's, else one of the guest's own.
 */
#ifndef RMMU_REMAP_H
#define RMMU_REMAP_H

#include "vm.h"

/* The page, and the table of the last level whose first entries map it and its neighbours; 512 pages from REMAP_X on. */
#define REMAP_X		(3 * GIB - 64 * MIB)
#define REMAP_TABLE	(VM_SCRATCH_GPA + 0x10000)

/* Entries: accessed, dirty, for users. */
#define REMAP_READ_ONLY	0x65UL
#define REMAP_WRITABLE	0x67UL
#define REMAP_NO_EXEC	(1UL << 63)

/* What the guest can be told to do. */
enum remap_order {
	REMAP_LOAD,	/* the first word of the page */
	REMAP_STORE,	/* a value there */
	REMAP_CALL,	/* the last two bytes of the page, which are zero, and on into the next page */
	REMAP_ENTRY,	/* make a value the page's entry, and flush nothing */
	REMAP_OTHER,	/* make a value the last entry of the table */
	REMAP_FLUSH,	/* everything */
};

struct remap {
	struct vm vm;
	struct vcpu *vcpu;
	bool nested;
};

/* Whether the nested guest, where it takes one, can be had. */
bool remap_possible(void);
/* With `only_own` a deleted slot takes only its own pages with it (KVM_X86_QUIRK_SLOT_ZAP_ALL is off). */
void remap_create(struct remap *remap, bool only_own);
/* Runs the vCPU with an order; what KVM_RUN returns. */
int remap_run(struct remap *remap, enum remap_order order, uint64_t value);
/* The same; whether the order was carried out. */
bool remap_give(struct remap *remap, enum remap_order order, uint64_t value);
/* Whether the guest loads this from the page. */
bool remap_reads(struct remap *remap, uint64_t value);

#endif

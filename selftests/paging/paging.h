/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A guest that rewrites its page tables at random, and a model of what its CPU may make of them.
 *
 * machine.c makes the VM, model.c says what may happen, random.c chooses what to do.
 */
#ifndef PAGING_H
#define PAGING_H

#include "layout.h"
#include "vm.h"

/* Zone E is not counted: its frames are those of zone D. */
#define FRAMES		(4 * ZONE_FRAMES)
/* One more than there are levels: level 1 is the lowest. */
#define LEVELS		6

#define PTE_P		(1UL << 0)
#define PTE_W		(1UL << 1)
#define PTE_U		(1UL << 2)
#define PTE_A		(1UL << 5)
#define PTE_D		(1UL << 6)
#define PTE_PS		(1UL << 7)
#define PTE_G		(1UL << 8)
#define PTE_NX		(1UL << 63)
/* What the CPU sets by itself. The model follows the rest of an entry. */
#define PTE_AD		(PTE_A | PTE_D)

#define PF_P		(1U << 0)
#define PF_W		(1U << 1)
#define PF_U		(1U << 2)
#define PF_RSVD		(1U << 3)
#define PF_I		(1U << 4)
#define NO_FAULT	(~0U)

#define CR0_PE		(1UL << 0)
#define CR0_MP		(1UL << 1)
#define CR0_NE		(1UL << 5)
#define CR0_WP		(1UL << 16)
#define CR0_PG		(1UL << 31)
#define CR4_PSE		(1UL << 4)
#define CR4_PAE		(1UL << 5)
#define CR4_PGE		(1UL << 7)
#define CR4_LA57	(1UL << 12)
#define CR4_PCIDE	(1UL << 17)
#define CR4_SMEP	(1UL << 20)
#define CR4_SMAP	(1UL << 21)

#define EFER_SCE	(1UL << 0)
#define EFER_LME	(1UL << 8)
#define EFER_LMA	(1UL << 10)
#define EFER_NX		(1UL << 11)

/* With this bit in CR3 the CPU keeps what it knows of the address space. */
#define CR3_KEEP	(1UL << 63)
/* Address spaces that the CPU tells apart by their PCIDs; the first has none. */
#define SPACES		3

enum invpcid { INVPCID_ADDRESS, INVPCID_SPACE, INVPCID_ALL, INVPCID_ALL_BUT_GLOBAL, INVPCID_TYPES };

enum paging { BITS32, PAE, LEVEL4, LEVEL5, NESTED };

/* A paging mode. The random part of an address space is chosen by few indices a level. */
struct mode {
	const char *name;
	enum paging paging;
	int levels;		/* of tables in memory: PAE's pointers are not one */
	int entry_bytes;
	bool long_mode;
	bool global;		/* entries may be global */
};

struct op {
	uint32_t kind, flags;
	uint64_t addr, value, result;
	uint32_t error, unused;
};

struct features {
	bool smep, smap, nx, gigabyte, la57, svm, pcid, invpcid;
	int physical_bits;
};

/* The VM. */
struct machine {
	struct vm vm;
	struct vcpu *vcpu;
	const struct mode *mode;
	struct features features;
	uint8_t *zones;		/* of B and C; zone A is in the low slot */
	uint8_t *shared[2];	/* of D and E */
	struct op *ops;
	uint64_t cr0, cr4, efer;
};

/* Frames have numbers: zones A, B, C and D, one after the other. */
uint64_t frame_gpa(int frame);
int gpa_frame(uint64_t gpa);
void *machine_memory(struct machine *machine, uint64_t gpa);

struct features machine_features(void);
void machine_create(struct machine *machine, const struct mode *mode, struct features features);
void machine_destroy(struct machine *machine);
/* Take the slots of the zones away and make them again, with or without the dirty log. */
void machine_renew_slots(struct machine *machine, bool log);
/* KVM_SET_SREGS with the machine's CR0, CR4 and EFER. */
void machine_set_registers(struct machine *machine);
/* As KVM_SET_CPUID2 tells it to the guest. Before the first machine_run(). */
void machine_set_physical_bits(struct machine *machine, int bits);
/* Let the guest do `count` ops; false when it got lost, which is noted. */
bool machine_run(struct machine *machine, int count);

/* What may become of an access. */
struct outcome {
	uint32_t error;		/* NO_FAULT, or the page fault's error code */
	uint64_t gpa;		/* of what was accessed */
	uint64_t value;		/* what is there */
};

#define MAX_OUTCOMES 48

struct outcomes {
	struct outcome list[MAX_OUTCOMES];
	int count;
	int paths;		/* different ways through the tables */
	bool too_many;
	bool fresh;		/* one way, and nothing of it was changed since it was last invalidated */
};

struct word;

/* What the CPU may know of an address space: since when, and of which roots. */
struct space {
	struct word *roots;
	uint32_t not_global;	/* when everything but global pages was invalidated */
	uint32_t *pages;	/* invalidated one by one */
};

struct model {
	const struct mode *mode;
	struct features features;
	uint64_t cr0, cr4, root;
	struct word *words, *pointers, *roots;	/* roots: one for each space */
	struct space spaces[SPACES], *space;
	uint64_t *current;	/* values of the words */
	bool *watched;		/* words that have to be accessed or dirty */
	struct word **changed;	/* words that had another value since the last flush */
	int changed_count;
	bool is_full;		/* time to flush, or old values get lost */
	uint32_t now;
	/* When everything was invalidated, and when pointers were loaded. */
	uint32_t all, pointers_loaded;
	uint32_t *global_pages;	/* when each was invalidated if it is a global one */
	uint64_t violations;
};

void model_create(struct model *model, const struct machine *machine);
void model_destroy(struct model *model);
/* The guest's memory changes: by `bytes`, of which 8 may be two stores of 4. */
void model_store(struct model *model, uint64_t gpa, uint64_t value, int bytes);
uint64_t model_load(struct model *model, uint64_t gpa);
void model_invlpg(struct model *model, uint64_t va);
/* A root for the space, which the CPU uses from now on; it may keep what it knows of the space. */
void model_set_root(struct model *model, uint64_t root, int space, bool keep);
void model_invpcid(struct model *model, enum invpcid type, int space, uint64_t va);
void model_set_cr4(struct model *model, uint64_t cr4);
void model_flush(struct model *model);
/* An access, before it is made. */
void model_access(struct model *model, uint64_t va, uint32_t kind, uint32_t flags, struct outcomes *outcomes);
/* And when it is known not to fault in any way. Accessed and dirty bits follow. */
void model_used(struct model *model, uint64_t va, uint32_t kind, uint32_t flags, const struct outcomes *outcomes);
/* Compare all memory; the number of differences, which are noted. */
int model_compare(struct model *model, struct machine *machine);

/* The random part of the address space. */
int va_pages(const struct mode *mode);
uint64_t va_of_page(const struct mode *mode, int page);
int va_index(const struct mode *mode, uint64_t va, int level);
/* The entry for va in its table of `level` as of now, if there is one; else 0. */
uint64_t model_entry_gpa(struct model *model, uint64_t va, int level);
/* What the function at the end of each frame returns. */
uint32_t frame_stub(uint64_t gpa);

struct options {
	uint64_t seed, ops;
	int invlpg_percent;	/* how many changes are followed by the INVLPG that they need */
	bool reserved_is_present, fault_forgets, compare_events, verbose;
	bool meddle;		/* the host does things to the VM, and frames share pages */
};

/* Do it; the number of violations. */
uint64_t random_run(struct machine *machine, const struct options *options);

#endif

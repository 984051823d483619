/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the rows of the benchmark share: a row measures one thing on one VM, whose owner was chosen before it was created,
 * and reports one or more figures. See main.c for how rows are run.
 */
#ifndef RMMU_BENCH_H
#define RMMU_BENCH_H

#include "vm.h"

/* How a row wants rmmu's fault-around. */
enum around {
	AROUND_DEFAULT,	/* as the module is configured */
	AROUND_OFF,	/* one page a fault, as in-tree */
};

struct row {
	const char *name;
	enum around around;
	void (*run)(const struct row *row);
	/* The row's own business. */
	uint64_t arg[4];
};

extern const struct row fault_rows[], dirty_rows[], zap_rows[], age_rows[], snapshot_rows[], nested_rows[];
/* These need KVM without nested paging, and the others need it with; their names begin with SHADOW. */
extern const struct row shadow_rows[];
#define SHADOW	"npt=0: "

/* arg: backing, pattern, one page in so many, write. The guest touches 256M. */
void populate(const struct row *row);

/* One figure of the row that runs. `what` tells several figures of a row apart; NULL for the only one. */
void report(const struct row *row, const char *what, const char *unit, double value);
/* Nanoseconds of the monotonic clock. */
uint64_t now_ns(void);

/* A VM whose owner is what the round wants; bails out when it is not. */
void bench_vm(struct vm *vm);

/*
 * A guest that touches pages of a region in some order. Its orders are at the shared page; after them, a sample for each
 * page if it is asked for samples.
 */
enum pattern { SEQUENTIAL, STRIDED, RANDOM };

struct touch {
	uint64_t base, pages;		/* the region; `pages` is a power of two */
	uint64_t count;			/* how many pages of it to touch */
	uint64_t pattern, stride;	/* the stride in pages */
	uint64_t write;
	uint64_t samples;		/* gpa for the TSC cycles of each touch, or 0 */
};

#define SAMPLES_GPA	0x310000UL
#define MAX_SAMPLES	8192UL

guest_code void touch_pages(uint64_t shared);
struct vcpu *touch_vcpu(struct vm *vm);
/* Orders, a run to the end of it, and the time of it in ns. */
uint64_t touch(struct vcpu *vcpu, struct touch order);
/* The median of samples that the guest took, in TSC cycles. */
double samples_median(struct vm *vm, uint64_t count);
double cycles_to_ns(struct vcpu *vcpu, double cycles);

/* A file of the page cache (on a disk), for a memory file; -1 if there is none. */
extern const char *bench_file_dir;

/* Memory for a guest: resident, in pages of 4K or 2M. */
enum backing { ANON, HUGE, FILE_PRIVATE, SHMEM, BACKINGS };
uint8_t *backing_map(enum backing kind, uint64_t size, bool resident);
void backing_unmap(uint8_t *base, uint64_t size);

#endif

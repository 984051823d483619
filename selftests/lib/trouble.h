/* SPDX-License-Identifier: GPL-2.0 */
/* What a host may do to memory while a guest uses it. */
#ifndef RMMU_TROUBLE_H
#define RMMU_TROUBLE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Races need two to meet: much of the trouble is about one page of these, and much of the guest's work should be. */
#define HOT_PAGES	8UL
#define HOT_PAGE(i)	((i) % HOT_PAGES * 192 + 3)

struct area {
	/* Anonymous memory, aligned to 2 MiB, a multiple of it in size, 8 MiB at least. */
	uint8_t *base;
	size_t size;
	/* The generator that decides. */
	uint64_t random;
	/* Stores that arrived at memory after it had been moved away. */
	unsigned long late_stores;
};

/* Swap for memory that is paged out, and page merging; false when the machine lacks one of them. */
bool trouble_start(void);
void trouble_stop(void);

int trouble_kinds(void);
const char *trouble_name(int kind);
/* Whether memory may read as zeroes afterwards. */
bool trouble_loses(int kind);
/* Do it, somewhere; what is quickly done, several times. False if the kernel cannot do it here. */
bool trouble_make(struct area *area, int kind);
/* Take all advice back. */
void trouble_calm(struct area *area);

#endif

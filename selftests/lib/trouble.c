// SPDX-License-Identifier: GPL-2.0
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"
#include "trouble.h"
#include "vm.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define CHUNK_PAGES	(HUGE_SIZE / PAGE_SIZE)
#define SWAP_DEVICE	"/dev/zram0"
#define SWAP_SIZE	(64 * MIB)
#define LRU_GEN		"/sys/kernel/debug/lru_gen"
#define SPLIT		"/sys/kernel/debug/split_huge_pages"
/* How long at most a state lasts in which the guest cannot go on, and a late store is waited for. */
#define PAUSE_US	200
#define QUICK		12

struct range {
	uint8_t *start;
	size_t size;
};

static uint64_t below(struct area *area, uint64_t limit)
{
	return next_random(&area->random) % limit;
}

/* Mostly a hot page, often a few pages, sometimes a huge page. Never across the border of one. */
static struct range somewhere(struct area *area)
{
	uint8_t *chunk = area->base + below(area, area->size / HUGE_SIZE) * HUGE_SIZE;
	size_t first, pages;

	if (below(area, 4))
		return (struct range){ area->base + HOT_PAGE(below(area, HOT_PAGES)) * PAGE_SIZE, PAGE_SIZE };
	if (!below(area, 4))
		return (struct range){ chunk, HUGE_SIZE };
	first = below(area, CHUNK_PAGES);
	pages = 1 + below(area, 16);
	if (pages > CHUNK_PAGES - first)
		pages = CHUNK_PAGES - first;
	return (struct range){ chunk + first * PAGE_SIZE, pages * PAGE_SIZE };
}

static struct range some_chunk(struct area *area)
{
	return (struct range){ area->base + below(area, area->size / HUGE_SIZE) * HUGE_SIZE, HUGE_SIZE };
}

static bool advise(struct range range, int advice)
{
	return madvise(range.start, range.size, advice) == 0 || errno != EINVAL;
}

static bool discard(struct area *area)
{
	return advise(somewhere(area), MADV_DONTNEED);
}

static bool free_lazily(struct area *area)
{
	return advise(somewhere(area), MADV_FREE);
}

static bool free_at_once(struct area *area)
{
	struct range range = somewhere(area);

	return advise(range, MADV_FREE) && advise(range, MADV_PAGEOUT);
}

static bool map_anew(struct area *area)
{
	struct range range = somewhere(area);

	must(munmap(range.start, range.size));
	spin_us(below(area, PAUSE_US));
	if (mmap(range.start, range.size, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		bail("mmap: %m");
	return true;
}

static bool page_out(struct area *area)
{
	return advise(somewhere(area), MADV_PAGEOUT);
}

static bool make_cold(struct area *area)
{
	return advise(somewhere(area), MADV_COLD);
}

static bool protect(struct area *area)
{
	struct range range = somewhere(area);

	must(mprotect(range.start, range.size, below(area, 2) ? PROT_READ : PROT_NONE));
	spin_us(below(area, PAUSE_US));
	must(mprotect(range.start, range.size, PROT_READ | PROT_WRITE));
	return true;
}

static bool collapse(struct area *area)
{
	struct range range = some_chunk(area);

	must(madvise(range.start, range.size, MADV_HUGEPAGE));
	/* It may fail for many good reasons. */
	madvise(range.start, range.size, MADV_COLLAPSE);
	return true;
}

static bool split(struct area *area)
{
	struct range range = some_chunk(area);
	char text[64];

	if (access(SPLIT, W_OK))
		return false;
	snprintf(text, sizeof(text), "%d,0x%lx,0x%lx", getpid(), (long)range.start, (long)range.start + range.size);
	write_file(SPLIT, text);
	return true;
}

static bool want_small(struct area *area)
{
	return advise(some_chunk(area), MADV_NOHUGEPAGE);
}

static bool merge(struct area *area)
{
	return advise(some_chunk(area), below(area, 3) ? MADV_MERGEABLE : MADV_UNMERGEABLE);
}

static bool compact(struct area *area)
{
	(void)area;
	return write_file("/proc/sys/vm/compact_memory", "1");
}

static uint64_t sum(struct range range)
{
	uint64_t sum = 0;

	for (size_t at = 0; at < range.size; at += 8)
		sum = sum * 31 + *(volatile uint64_t *)(range.start + at);
	return sum;
}

/* Away, where the guest cannot reach it, and back. */
static bool move_away(struct area *area)
{
	struct range range = somewhere(area);
	uint8_t *away = memory(HUGE_SIZE, false);
	struct range moved = { away, range.size };
	uint64_t before;

	if (mremap(range.start, range.size, range.size, MREMAP_MAYMOVE | MREMAP_FIXED, away) == MAP_FAILED)
		bail("mremap away: %m");
	before = sum(moved);
	spin_us(below(area, PAUSE_US));
	area->late_stores += sum(moved) != before;
	if (mremap(away, range.size, range.size, MREMAP_MAYMOVE | MREMAP_FIXED, range.start) == MAP_FAILED)
		bail("mremap back: %m");
	munmap(away, HUGE_SIZE);
	return true;
}

/* Every page is shared with the child, and taken apart again. */
static bool fork_child(struct area *area)
{
	pid_t child = must(fork());

	(void)area;
	if (!child)
		_exit(0);
	must(waitpid(child, NULL, 0));
	return true;
}

/* Let the multi-generational LRU look which pages are in use. */
static bool age(struct area *area)
{
	unsigned long group = 0, node = 0, newest = 0, number;
	FILE *file = fopen(LRU_GEN, "r");
	char line[128], text[64];

	(void)area;
	if (!file)
		return false;
	while (fgets(line, sizeof(line), file)) {
		/* The group this process is in is the first one, the root. */
		if (sscanf(line, " memcg %lu", &number) == 1) {
			if (group)
				break;
			group = number;
		} else if (sscanf(line, " node %lu", &number) == 1) {
			node = number;
		} else if (sscanf(line, " %lu", &number) == 1) {
			newest = number;
		}
	}
	fclose(file);
	snprintf(text, sizeof(text), "+ %lu %lu %lu 1 1", group, node, newest);
	/* Somebody else may have been faster. */
	write_file(LRU_GEN, text);
	return true;
}

static const struct {
	const char *name;
	bool loses;
	bool (*make)(struct area *area);
	int times;
} kinds[] = {
	{ "discard", true, discard, QUICK },
	{ "free lazily", true, free_lazily, QUICK },
	{ "free at once", true, free_at_once, QUICK },
	{ "map anew", true, map_anew, QUICK },
	{ "page out", false, page_out, QUICK },
	{ "cold", false, make_cold, QUICK },
	{ "protect", false, protect, QUICK },
	{ "collapse", false, collapse, 1 },
	{ "split", false, split, 1 },
	{ "small pages", false, want_small, 1 },
	{ "merge", false, merge, 1 },
	{ "compact", false, compact, 1 },
	{ "move away", false, move_away, QUICK },
	{ "fork", false, fork_child, 1 },
	{ "age", false, age, 1 },
};

int trouble_kinds(void)
{
	return sizeof(kinds) / sizeof(kinds[0]);
}

const char *trouble_name(int kind)
{
	return kinds[kind].name;
}

bool trouble_loses(int kind)
{
	return kinds[kind].loses;
}

bool trouble_make(struct area *area, int kind)
{
	bool done = true;

	for (int i = 0; i < kinds[kind].times && done; i++)
		done = kinds[kind].make(area);
	return done;
}

void trouble_calm(struct area *area)
{
	madvise(area->base, area->size, MADV_UNMERGEABLE);
	madvise(area->base, area->size, MADV_NOHUGEPAGE);
}

/* What mkswap writes: version, last page, and the magic at the end of the first page. */
static bool write_swap_header(void)
{
	uint8_t page[PAGE_SIZE] = { 0 };
	uint32_t *info = (uint32_t *)(page + 1024);
	int device = open(SWAP_DEVICE, O_RDWR | O_CLOEXEC);
	bool written;

	if (device < 0)
		return false;
	info[0] = 1;
	info[1] = SWAP_SIZE / PAGE_SIZE - 1;
	memcpy(page + PAGE_SIZE - 10, "SWAPSPACE2", 10);
	written = write(device, page, sizeof(page)) == sizeof(page);
	close(device);
	return written;
}

static bool start_swap(void)
{
	if (access(SWAP_DEVICE, F_OK) && system("modprobe zram"))
		return false;
	return write_number("/sys/block/zram0/disksize", SWAP_SIZE) && write_swap_header() && !swapon(SWAP_DEVICE, 0);
}

bool trouble_start(void)
{
	bool merging = write_file(KSM_DIR "pages_to_scan", "1000") && write_file(KSM_DIR "sleep_millisecs", "20") &&
		       write_file(KSM_DIR "run", "1");

	return start_swap() && merging;
}

void trouble_stop(void)
{
	/* Takes merged pages apart. */
	write_file(KSM_DIR "run", "2");
	write_file(KSM_DIR "run", "0");
	if (!swapoff(SWAP_DEVICE))
		write_file("/sys/block/zram0/reset", "1");
}

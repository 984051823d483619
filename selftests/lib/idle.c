// SPDX-License-Identifier: GPL-2.0
#include <fcntl.h>
#include <unistd.h>

#include "host.h"
#include "idle.h"

#define BITMAP		"/sys/kernel/mm/page_idle/bitmap"
#define FLUSH_SLOT	30
#define FLUSH_GPA	(3 * GIB)
#define PFN_MASK	((1UL << 55) - 1)

bool idle_available(void)
{
	return access(BITMAP, R_OK | W_OK) == 0;
}

static uint64_t frame(const uint8_t *page)
{
	int fd = must(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
	uint64_t entry = 0;

	must(pread(fd, &entry, sizeof(entry), (uintptr_t)page / PAGE_SIZE * sizeof(entry)));
	close(fd);
	if (!(entry & PFN_MASK) || !(entry >> 63))
		bail("a page is not resident, or this is not root");
	return entry & PFN_MASK;
}

static uint64_t word(uint64_t pfn, uint64_t set)
{
	int fd = must(open(BITMAP, O_RDWR | O_CLOEXEC));
	uint64_t bits = 0;

	if (set)
		must(pwrite(fd, &set, sizeof(set), pfn / 64 * 8));
	else
		must(pread(fd, &bits, sizeof(bits), pfn / 64 * 8));
	close(fd);
	return bits;
}

bool idle(const uint8_t *page)
{
	uint64_t pfn = frame(page);

	return word(pfn, 0) >> pfn % 64 & 1;
}

static uint64_t mark(struct vm *vm, const uint8_t *base, uint64_t pages)
{
	static uint8_t *memory_of_slot;
	uint64_t pfn, left = 0;

	/* New pages are on lists of a CPU's own at first, where nothing is tracked. Compaction begins by emptying these. */
	if (!write_file("/proc/sys/vm/compact_memory", "1"))
		bail("/proc/sys/vm/compact_memory: %m");
	for (uint64_t page = 0; page < pages; page++) {
		pfn = frame(base + page * PAGE_SIZE);
		word(pfn, 1UL << pfn % 64);
	}
	if (!memory_of_slot)
		memory_of_slot = memory(PAGE_SIZE, false);
	must(vm_slot(vm, FLUSH_SLOT, FLUSH_GPA, PAGE_SIZE, memory_of_slot, KVM_MEM_LOG_DIRTY_PAGES));
	must(vm_slot(vm, FLUSH_SLOT, FLUSH_GPA, 0, memory_of_slot, 0));
	for (uint64_t page = 0; page < pages; page++)
		left += !idle(base + page * PAGE_SIZE);
	return left;
}

void idle_mark(struct vm *vm, const uint8_t *base, uint64_t pages)
{
	uint64_t left = 1;

	/* The kernel may have a page in its hands just then. */
	for (int attempt = 0; attempt < 10 && left; attempt++)
		left = mark(vm, base, pages);
	if (left)
		bail("%lu of %lu pages cannot be made idle", left, pages);
}

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

/* Thousands of pages are looked at: files are opened once. */
static int opened(int *fd, const char *path, int flags)
{
	if (!*fd)
		*fd = must(open(path, flags | O_CLOEXEC));
	return *fd;
}

static uint64_t frame(const uint8_t *page)
{
	static int fd;
	uint64_t entry = 0;

	must(pread(opened(&fd, "/proc/self/pagemap", O_RDONLY), &entry, sizeof(entry),
		   (uintptr_t)page / PAGE_SIZE * sizeof(entry)));
	if (!(entry & PFN_MASK) || !(entry >> 63))
		bail("a page is not resident, or this is not root");
	return entry & PFN_MASK;
}

static int bitmap(void)
{
	static int fd;

	return opened(&fd, BITMAP, O_RDWR);
}

bool idle(const uint8_t *page)
{
	uint64_t pfn = frame(page), bits = 0;

	must(pread(bitmap(), &bits, sizeof(bits), pfn / 64 * 8));
	return bits >> pfn % 64 & 1;
}

static void set_idle(const uint8_t *page)
{
	uint64_t pfn = frame(page), bit = 1UL << pfn % 64;

	must(pwrite(bitmap(), &bit, sizeof(bit), pfn / 64 * 8));
}

/* How many pages could not be marked. */
static uint64_t mark(struct vm *vm, const uint8_t *base, uint64_t pages)
{
	static uint8_t *memory_of_slot;
	uint64_t left = 0;

	/* New pages are on lists of a CPU's own at first, where nothing is tracked. This empties them. */
	if (!write_file("/proc/sys/vm/drop_caches", "1"))
		bail("/proc/sys/vm/drop_caches: %m");
	for (uint64_t page = 0; page < pages; page++)
		set_idle(base + page * PAGE_SIZE);
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

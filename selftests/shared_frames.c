// SPDX-License-Identifier: GPL-2.0
/*
 * Frames that share a page of the host: two slots of one memory, memory that is mapped twice, the zero page, pages that are
 * merged. A guest maps a page of its addresses to one frame, and then, without a flush, to the other one with more rights: KVM
 * finds the same page of the host mapped there, for another frame. What happens to that frame afterwards must happen to
 * the mapping, and what happens to the first one must not.
 *
 *   shared_frames [-u]
 *
 * With -u the guest flushes nothing afterwards either: a processor forgets a page that it faulted on, and walks the tables.
 * In-tree KVM goes on with the first frame until the flush.
 *
 * With nested paging the tables are those of a hypervisor for its guest, else the guest's own.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "audit.h"
#include "host.h"
#include "remap.h"

#define SLOT_A		1
#define SLOT_B		2
#define SLOT_CODE	3
#define GPA_A		GIB
#define GPA_B		(2 * GIB)
#define GPA_CODE	(2 * GIB + 16 * MIB)

#define PFN_MASK	((1UL << 55) - 1)

struct memory {
	const char *name;
	void (*make)(void);
	/* A store leaves the frames with one page; and both have the same address in the host. */
	bool stores, one_address;
};

static struct remap guest;
static uint8_t *a, *b, *function;
static size_t size;
static uint64_t stored, shared_pages, all_pages;
static const struct memory *memory_kind;
static bool flushes = true;

static void fill(uint8_t *page)
{
	memset(page, 0, PAGE_SIZE);
	*(uint64_t *)page = stored;
}

static void make_two_slots(void)
{
	a = b = memory(HUGE_SIZE, false);
	fill(a);
}

static void make_two_mappings(void)
{
	int file = must(memfd_create("shared", MFD_CLOEXEC));

	size = PAGE_SIZE;
	must(ftruncate(file, size));
	a = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	b = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (a == MAP_FAILED || b == MAP_FAILED)
		bail("mmap: %m");
	close(file);
	fill(a);
}

static void make_zero(void)
{
	a = memory(HUGE_SIZE, false);
	b = memory(HUGE_SIZE, false);
	stored = 0;
}

static void make_merged(void)
{
	a = memory(HUGE_SIZE, false);
	b = memory(HUGE_SIZE, false);
	fill(a);
	fill(b);
	must(madvise(a, PAGE_SIZE, MADV_MERGEABLE));
	must(madvise(b, PAGE_SIZE, MADV_MERGEABLE));
}

static const struct memory memories[] = {
	{ "two slots of one memory", make_two_slots, true, true },
	{ "memory mapped twice", make_two_mappings, true, false },
	{ "the zero page", make_zero, false, false },
	{ "merged pages", make_merged, false, false },
};

static uint64_t frame(const uint8_t *page)
{
	int file = must(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
	uint64_t entry = 0;

	must(pread(file, &entry, sizeof(entry), (uintptr_t)page / PAGE_SIZE * sizeof(entry)));
	close(file);
	return entry >> 63 ? entry & PFN_MASK : 0;
}

static bool is_one_page(void)
{
	return frame(a) && frame(a) == frame(b);
}

/* Waits until the kernel has merged them. */
static void merge(void)
{
	uint64_t deadline = deadline_ms(60000);

	while (!is_one_page() && now_ms() < deadline)
		usleep(10000);
	if (!is_one_page())
		bail("the kernel does not merge two pages");
}

static bool give(enum remap_order order, uint64_t value)
{
	return remap_give(&guest, order, value);
}

static bool reads(uint64_t value)
{
	return remap_reads(&guest, value);
}

/* The access that needs the right which the other frame's entry gives. */
static bool uses_more(void)
{
	if (!memory_kind->stores)
		return give(REMAP_CALL, 0);
	return give(REMAP_STORE, ++stored) && *(uint64_t *)b == stored;
}

static uint64_t less(uint64_t gpa)
{
	return gpa | (memory_kind->stores ? REMAP_READ_ONLY : REMAP_READ_ONLY | REMAP_NO_EXEC);
}

static uint64_t more(uint64_t gpa)
{
	return gpa | (memory_kind->stores ? REMAP_WRITABLE : REMAP_READ_ONLY);
}

/* From one frame to another with the same page. */
static bool change_frame(uint64_t from, uint64_t to)
{
	bool right = give(REMAP_ENTRY, less(from)) && give(REMAP_FLUSH, 0) && reads(stored) && give(REMAP_ENTRY, more(to)) && uses_more();

	all_pages++;
	shared_pages += is_one_page();
	return right;
}

/* To and fro. In the end it is the second one's. */
static bool change_frames(void)
{
	bool right = change_frame(GPA_A, GPA_B);

	for (int i = 0; i < 2 && right; i++)
		right = change_frame(GPA_B, GPA_A) && change_frame(GPA_A, GPA_B);
	return right && (!flushes || (give(REMAP_FLUSH, 0) && reads(stored)));
}

static bool is_mmio_at_b(void)
{
	return !remap_run(&guest, REMAP_LOAD, 0) && exit_is_mmio(guest.vcpu, GPA_B, false);
}

/* Another page in the place of the one at `at`. */
static void replace(uint8_t *at, uint64_t value)
{
	if (mmap(at, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
		bail("mmap: %m");
	*(uint64_t *)at = value;
}

static bool delete_second(void)
{
	must(vm_slot(&guest.vm, SLOT_B, GPA_B, 0, b, 0));
	return is_mmio_at_b();
}

static bool delete_first(void)
{
	must(vm_slot(&guest.vm, SLOT_A, GPA_A, 0, a, 0));
	if (!reads(stored))
		return false;
	replace(b, 4711);
	return reads(4711);
}

static bool replace_second(void)
{
	replace(b, 4711);
	return reads(4711);
}

static bool replace_first(void)
{
	replace(a, 4711);
	return reads(memory_kind->one_address ? 4711 : stored);
}

static bool discard_both(void)
{
	must(madvise(a, PAGE_SIZE, MADV_DONTNEED));
	must(madvise(b, PAGE_SIZE, MADV_DONTNEED));
	/* What a file holds stays, and so does zero. */
	return reads(memory_kind->one_address || !memory_kind->stores ? *(uint64_t *)b : stored);
}

static uint64_t logged(int slot)
{
	uint64_t bits = 0;
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = &bits };

	must(ioctl(guest.vm.fd, KVM_GET_DIRTY_LOG, &log));
	return bits;
}

static bool log_both(void)
{
	must(vm_slot(&guest.vm, SLOT_A, GPA_A, PAGE_SIZE, a, KVM_MEM_LOG_DIRTY_PAGES));
	must(vm_slot(&guest.vm, SLOT_B, GPA_B, PAGE_SIZE, b, KVM_MEM_LOG_DIRTY_PAGES));
	logged(SLOT_A);
	logged(SLOT_B);
	for (int i = 0; i < 3; i++)
		if (!uses_more() || logged(SLOT_B) != 1 || logged(SLOT_A))
			return false;
	return true;
}

static bool protect_second(void)
{
	must(mprotect(b, PAGE_SIZE, PROT_READ));
	return remap_run(&guest, REMAP_STORE, 4711) < 0 && errno == EFAULT && *(uint64_t *)b == stored;
}

static const struct {
	const char *name;
	bool (*check)(void);
	bool stores;	/* for memory that keeps its page when it is written */
} ends[] = {
	{ "of a deleted slot nothing is left", delete_second, false },
	{ "the other slot's end changes nothing", delete_first, false },
	{ "another page in its place is seen", replace_second, false },
	{ "another page in the other's place", replace_first, false },
	{ "discarded memory is gone", discard_both, false },
	{ "the dirty log has it, and not the other", log_both, true },
	{ "memory that the host made read-only", protect_second, true },
};

#define ENDS	(sizeof(ends) / sizeof(ends[0]))
#define MEMORIES (sizeof(memories) / sizeof(memories[0]))

static void begin(bool only_own)
{
	stored = 1000;
	size = HUGE_SIZE;
	memory_kind->make();
	/* In the next page is a function that returns at once. */
	function = memory(HUGE_SIZE, false);
	function[0] = 0xc3;
	if (memory_kind->make == make_merged)
		merge();
	remap_create(&guest, only_own);
	must(vm_slot(&guest.vm, SLOT_A, GPA_A, PAGE_SIZE, a, 0));
	must(vm_slot(&guest.vm, SLOT_B, GPA_B, PAGE_SIZE, b, 0));
	must(vm_slot(&guest.vm, SLOT_CODE, GPA_CODE, PAGE_SIZE, function, 0));
	((uint64_t *)(guest.vm.low + REMAP_TABLE))[1] = GPA_CODE | REMAP_WRITABLE;
}

static void end(void)
{
	vm_destroy(&guest.vm);
	munmap(a, size);
	if (b != a)
		munmap(b, size);
	munmap(function, HUGE_SIZE);
}

static void check(const struct memory *kind, bool only_own)
{
	memory_kind = kind;
	shared_pages = all_pages = 0;
	for (size_t i = 0; i < ENDS; i++) {
		bool changed;

		if (ends[i].stores && !kind->stores)
			continue;
		begin(only_own);
		changed = change_frames();
		audit("after changes of frames");
		ok(changed && ends[i].check(), "%s%s: %s", kind->name, changed ? "" : ", where changing frames fails",
		   ends[i].name);
		audit("at the end");
		end();
	}
	ok(shared_pages == all_pages && all_pages, "%s: of %lu times the frames had one page %lu times", kind->name,
	   all_pages, shared_pages);
}

int main(int argc, char **argv)
{
	bool merging = access(KSM_DIR "run", W_OK) == 0;
	int checks = 0, option;

	while ((option = getopt(argc, argv, "u")) != -1) {
		if (option != 'u')
			bail("usage: %s [-u]", argv[0]);
		flushes = false;
	}
	if (!remap_possible())
		skip_all("the nested guest is one of SVM");
	for (size_t i = 0; i < MEMORIES; i++)
		for (size_t j = 0; j < ENDS; j++)
			checks += memories[i].stores || !ends[j].stores;
	plan(2 * (checks + MEMORIES));
	if (merging && !(write_file(KSM_DIR "pages_to_scan", "1000") && write_file(KSM_DIR "sleep_millisecs", "5") &&
			 write_file(KSM_DIR "run", "1")))
		bail(KSM_DIR ": %m");
	for (int only_own = 0; only_own < 2; only_own++) {
		note("a deleted slot takes %s", only_own ? "its own pages with it" : "everything with it");
		for (size_t i = 0; i < MEMORIES; i++)
			check(&memories[i], only_own);
	}
	if (merging) {
		write_file(KSM_DIR "run", "2");
		write_file(KSM_DIR "run", "0");
	}
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * What happens to memory must happen to a nested guest, too, be its hypervisor running at that time or the nested guest
 * itself: slots deleted, made again and read-only, memory that the host discards, protects or ages, the dirty log. The
 * hypervisor maps a part of the memory in pages of 4K, and others in pages of 2M, of which the host backs one with 4K. A
 * deleted slot takes all that is mapped with it, as is KVM's custom, or only its own.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "audit.h"
#include "host.h"
#include "idle.h"
#include "nested.h"

#define SIZE		HUGE_SIZE
#define PAGES		(SIZE / PAGE_SIZE)
#define TABLES		VM_SCRATCH_GPA
#define NESTED		(TABLES + NESTED_TABLES * PAGE_SIZE)
#define INNER_STACK	(NESTED + NESTED_SIZE + PAGE_SIZE)
/* The hypervisor's table of the last level, for the region that it maps in pages of 4K, has a slot of its own. */
#define TABLE_SLOT	2
#define TABLE_SLOT_GPA	(2 * GIB)
#define TABLE_SLOT_SIZE	(16 * PAGE_SIZE)
#define TABLE_PLACE	(8 * PAGE_SIZE)
#define TABLE_GPA	(TABLE_SLOT_GPA + TABLE_PLACE)

/* In the shared page: an access to each page of a region, by the nested guest. */
struct order {
	uint64_t address, count, write, value;	/* the value plus the page's number is stored */
	uint64_t wrong;				/* pages that did not have it */
	uint64_t last;				/* what the last load found */
	uint64_t leave;				/* to the hypervisor; or else the nested guest stays in charge */
	uint64_t inner;				/* the nested guest's code */
	uint64_t load;				/* the hypervisor loads from there before, or does not */
	uint64_t store, entry;			/* and stores an entry there, and flushes */
};

/* Who says that an order is done. */
enum { HYPERVISOR = 1, NESTED_GUEST, FAULT };

static guest_code void inner(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		uint64_t wrong = 0;

		for (uint64_t page = 0; page < order->count; page++) {
			uint64_t address = order->address + page * PAGE_SIZE;

			if (order->write) {
				store(address, order->value + page);
				continue;
			}
			order->last = load(address);
			wrong += order->last != order->value + page;
		}
		order->wrong = wrong;
		if (order->leave)
			nested_hypercall(NESTED);
		else
			guest_sync(NESTED_GUEST);
	}
}

static guest_code void hypervisor(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		uint64_t exit;

		if (order->load)
			load(order->load);
		if (order->store) {
			store(order->store, order->entry);
			nested_flush(NESTED);
		}
		exit = nested_run(NESTED, INNER_STACK, order->inner, shared);
		guest_sync(exit == NESTED_HYPERCALL ? HYPERVISOR : exit == NESTED_FAULT ? FAULT : exit);
	}
}

struct region {
	const char *name;
	uint64_t gpa;
	bool by_4k, huge;	/* what the hypervisor maps it by, and whether the host has a huge page */
	uint8_t *base;
};

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *table_slot;
static bool stays;	/* the nested guest is in charge while things happen */
static const char *who;

static void give(struct order order)
{
	order.leave = !stays;
	order.inner = vm_code(inner);
	memcpy(vm.shared, &order, sizeof(order));
}

static uint64_t run(struct order order)
{
	uint32_t said;

	give(order);
	said = vcpu_run_to_sync(vcpu);
	if (said != (stays ? NESTED_GUEST : HYPERVISOR))
		bail("%s: the nested guest ended with 0x%x", who, said);
	return ((struct order *)vm.shared)->wrong;
}

static uint64_t wrong_pages(const struct region *region, uint64_t value)
{
	return run((struct order){ .address = region->gpa, .count = PAGES, .value = value });
}

static void write_pages(const struct region *region, uint64_t page, uint64_t count, uint64_t value)
{
	run((struct order){ .address = region->gpa + page * PAGE_SIZE, .count = count, .write = 1, .value = value });
}

static uint64_t host_wrong_pages(const uint8_t *base, uint64_t value)
{
	uint64_t wrong = 0;

	for (uint64_t page = 0; page < PAGES; page++)
		wrong += *(uint64_t *)(base + page * PAGE_SIZE) != value + page;
	return wrong;
}

static void fill(uint8_t *base, uint64_t value)
{
	for (uint64_t page = 0; page < PAGES; page++)
		*(uint64_t *)(base + page * PAGE_SIZE) = value + page;
}

/*
 * Memory that is there. The kernel must not collapse it into a huge page while the dirty log is looked at: what is mapped
 * anew for a load may be mapped writable, and is in the log then.
 */
static uint8_t *present(const struct region *region)
{
	uint8_t *base = memory(SIZE, region->huge);

	fill(base, 0);
	must(madvise(base, SIZE, MADV_NOHUGEPAGE));
	return base;
}

static void slot(const struct region *region, uint64_t size, uint32_t flags)
{
	must(vm_slot(&vm, 1, region->gpa, size, region->base, flags));
}

/* One access leaves the nested guest as MMIO; a load is answered with 4711. */
static bool is_mmio(const struct region *region, uint64_t page, bool write)
{
	uint64_t address = region->gpa + page * PAGE_SIZE, answer = 4711;

	give((struct order){ .address = address, .count = 1, .write = write });
	if (vcpu_run(vcpu))
		bail("KVM_RUN: %m");
	if (!exit_is_mmio(vcpu, address, write))
		return false;
	memcpy(vcpu->run->mmio.data, &answer, sizeof(answer));
	vcpu_run_to_sync(vcpu);
	return write || ((struct order *)vm.shared)->last == answer;
}

static void check_slots(struct region *region)
{
	uint8_t *first = region->base, *second = present(region);

	fill(first, 1000);
	fill(second, 2000);
	ok(wrong_pages(region, 1000) == 0, "%s, %s: a nested guest reads memory", who, region->name);
	slot(region, 0, 0);
	ok(is_mmio(region, 7, false) && is_mmio(region, PAGES - 1, true), "%s, %s: of a deleted slot nothing is left", who,
	   region->name);
	region->base = second;
	slot(region, SIZE, KVM_MEM_READONLY);
	ok(wrong_pages(region, 2000) == 0, "%s, %s: made again it shows other memory", who, region->name);
	ok(is_mmio(region, 9, true) && host_wrong_pages(second, 2000) == 0,
	   "%s, %s: a store is MMIO when the slot is read-only", who, region->name);
	slot(region, 0, 0);
	slot(region, SIZE, 0);
	write_pages(region, 0, PAGES, 3000);
	ok(host_wrong_pages(second, 3000) == 0 && host_wrong_pages(first, 1000) == 0,
	   "%s, %s: stores arrive when it is not", who, region->name);
	munmap(first, SIZE);
}

static void check_notifier(const struct region *region)
{
	int ret;

	write_pages(region, 0, PAGES, 4000);
	must(madvise(region->base + 5 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED));
	ok(wrong_pages(region, 4000) == 1 && *(uint64_t *)(region->base + 5 * PAGE_SIZE) == 0,
	   "%s, %s: a page that the host discards is gone", who, region->name);
	write_pages(region, 5, 1, 4005);
	must(mprotect(region->base, SIZE, PROT_READ));
	ok(wrong_pages(region, 4000) == 0, "%s, %s: memory that the host made read-only can be read", who, region->name);
	give((struct order){ .address = region->gpa, .count = PAGES, .write = 1, .value = 5000 });
	ret = vcpu_run(vcpu);
	ok(ret < 0 && errno == EFAULT && host_wrong_pages(region->base, 4000) == 0,
	   "%s, %s: a store into it fails KVM_RUN, and changes nothing", who, region->name);
	must(mprotect(region->base, SIZE, PROT_READ | PROT_WRITE));
	vcpu_run_to_sync(vcpu);
	ok(host_wrong_pages(region->base, 5000) == 0, "%s, %s: made writable again it succeeds", who, region->name);
}

static uint64_t logged(uint64_t *first)
{
	static uint64_t bits[PAGES / 64];
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bits };
	uint64_t count = 0;

	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	*first = PAGES;
	for (uint64_t page = 0; page < PAGES; page++)
		if (bits[page / 64] >> page % 64 & 1) {
			count++;
			*first = *first < page ? *first : page;
		}
	return count;
}

static void check_dirty_log(const struct region *region)
{
	bool right = true;
	uint64_t first;

	write_pages(region, 0, PAGES, 6000);
	slot(region, SIZE, KVM_MEM_LOG_DIRTY_PAGES);
	for (uint64_t round = 0; round < 3; round++) {
		right = right && wrong_pages(region, round ? 6999 : 6000) == (round ? PAGES : 0) && logged(&first) == 0;
		write_pages(region, 11 + round, 100, 7000);
		right = right && logged(&first) == 100 && first == 11 + round;
		write_pages(region, 0, PAGES, 7000);
		right = right && logged(&first) == PAGES && first == 0;
	}
	audit("while the dirty log is on");
	ok(right, "%s, %s: the dirty log has the pages that were written, and no others", who, region->name);
	slot(region, SIZE, 0);
	ok(wrong_pages(region, 7000) == 0, "%s, %s: and nothing is lost when it ends", who, region->name);
}

/* The kernel learns which pages the nested guest uses. */
static void check_aging(const struct region *region)
{
	uint64_t wrong = 0;

	if (!idle_available()) {
		skip("which pages are used", "the kernel has no idle page tracking");
		return;
	}
	write_pages(region, 0, PAGES, 9000);
	idle_mark(&vm, region->base, PAGES);
	run((struct order){ .address = region->gpa + 7 * PAGE_SIZE, .count = 100 });
	for (uint64_t page = 0; page < PAGES; page++)
		wrong += idle(region->base + page * PAGE_SIZE) == (page >= 7 && page < 107);
	ok(wrong == 0, "%s, %s: pages that it reads are used, and no others (%lu wrong)", who, region->name, wrong);
}

/* The nested guest loads a word of a page; `value` if the page is mapped to what has it. */
static bool reads(const struct region *region, uint64_t page, uint64_t value)
{
	return run((struct order){ .address = region->gpa + page * PAGE_SIZE, .count = 1, .value = value }) == 0;
}

/* Memory for the table's slot, with a table that maps the region one to one, or its last page first. */
static uint8_t *table_memory(const struct region *region, bool reversed)
{
	uint8_t *base = memory(TABLE_SLOT_SIZE, false);
	uint64_t *entry = (void *)(base + TABLE_PLACE);

	memset(base, 0, TABLE_SLOT_SIZE);
	for (uint64_t page = 0; page < PAGES; page++)
		entry[reversed ? PAGES - 1 - page : page] = (region->gpa + page * PAGE_SIZE) | nested_entry(false);
	return base;
}

static void put_table(uint8_t *base)
{
	must(vm_slot(&vm, TABLE_SLOT, TABLE_SLOT_GPA, base ? TABLE_SLOT_SIZE : 0, base, 0));
}

/* The table that maps the region goes with its slot, and another one comes. */
static void check_slot_of_table(const struct region *region)
{
	uint8_t *second = table_memory(region, true);
	uint32_t said;

	write_pages(region, 0, PAGES, 8000);
	put_table(NULL);
	give((struct order){ .address = region->gpa + 3 * PAGE_SIZE, .count = 1 });
	said = vcpu_run_to_sync(vcpu);
	ok(said == FAULT, "%s, %s: without its table the memory is not mapped (it ended with 0x%x)", who, region->name, said);
	put_table(second);
	ok(reads(region, 3, 8000 + PAGES - 4) && reads(region, PAGES - 1, 8000), "%s, %s: another table in its place counts",
	   who, region->name);
	put_table(NULL);
	put_table(table_slot);
	ok(wrong_pages(region, 8000) == 0, "%s, %s: and then the first one again", who, region->name);
	munmap(second, TABLE_SLOT_SIZE);
}

/*
 * The table's frame is not mapped for the hypervisor when it uses a neighbour, with which the frame may be mapped. What the
 * hypervisor then writes to the table must count.
 */
static void check_neighbours_of_table(const struct region *region)
{
	struct order order = {
		.address = region->gpa + 20 * PAGE_SIZE, .count = 1, .value = 8030, .load = TABLE_SLOT_GPA,
		.store = TABLE_GPA + 20 * 8, .entry = (region->gpa + 30 * PAGE_SIZE) | nested_entry(false),
	};

	/* So that it is the hypervisor's turn. */
	stays = false;
	write_pages(region, 0, PAGES, 8000);
	must(mprotect(table_slot, TABLE_SLOT_SIZE, PROT_READ));
	must(mprotect(table_slot, TABLE_SLOT_SIZE, PROT_READ | PROT_WRITE));
	ok(run(order) == 0, "%s: what the hypervisor writes to its table counts, wherever it was before", region->name);
	order.value = 8020;
	order.entry = (region->gpa + 20 * PAGE_SIZE) | nested_entry(false);
	ok(run(order) == 0, "%s: and again", region->name);
}

static void check(struct region *region, bool only_own)
{
	vm_create(&vm);
	if (only_own)
		vm_enable(&vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	region->base = present(region);
	slot(region, SIZE, 0);
	vcpu = vm_vcpu(&vm, hypervisor, VM_SHARED_GPA);
	nested_prepare(vcpu, NESTED, TABLES);
	if (region->by_4k) {
		table_slot = table_memory(region, false);
		put_table(table_slot);
		*nested_identity_entry(&vm, TABLES, region->gpa) = TABLE_GPA | nested_entry(true);
	}
	for (int i = 0; i < 2; i++) {
		stays = i;
		who = stays ? "nested guest in charge" : "hypervisor in charge";
		check_slots(region);
		check_notifier(region);
		check_dirty_log(region);
		if (!region->huge)
			check_aging(region);
		if (region->by_4k)
			check_slot_of_table(region);
	}
	if (region->by_4k)
		check_neighbours_of_table(region);
	vm_destroy(&vm);
	if (region->by_4k)
		munmap(table_slot, TABLE_SLOT_SIZE);
	munmap(region->base, SIZE);
}

int main(void)
{
	struct region regions[] = {
		{ .name = "4K on 4K", .gpa = GIB, .by_4k = true },
		{ .name = "2M on 4K", .gpa = GIB },
		{ .name = "4K on 2M", .gpa = GIB, .by_4k = true, .huge = true },
		{ .name = "2M on 2M", .gpa = GIB, .huge = true },
	};

	if (kvm_paging() == SHADOW || !nested_offered())
		skip_all("there are no nested guests with nested paging");
	plan(2 * (2 * (4 * 11 + 2 * 1 + 2 * 3) + 2 * 2));
	for (int only_own = 0; only_own < 2; only_own++) {
		note("a deleted slot takes %s", only_own ? "its own pages with it" : "everything with it");
		for (int i = 0; i < 4; i++)
			check(&regions[i], only_own);
	}
	return finish();
}

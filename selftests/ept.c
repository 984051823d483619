// SPDX-License-Identifier: GPL-2.0
/*
 * What a hypervisor says in its EPT counts for its guest, whose memory KVM shadows: every combination of permissions with
 * every access, entries that are misconfigured, memory types, accessed and dirty bits, another EPT pointer, INVEPT.
 */
#include <string.h>
#include <sys/ioctl.h>

#include "host.h"
#include "vmx.h"

#define SIZE		HUGE_SIZE
#define PAGES		(SIZE / PAGE_SIZE)
#define REGION		GIB
#define TABLES		VM_SCRATCH_GPA
#define NESTED		(TABLES + NESTED_TABLES * PAGE_SIZE)
#define INNER_STACK	(NESTED + NESTED_SIZE + PAGE_SIZE)
/* The table that maps the region, and a second root with tables of its own below it. */
#define TABLE		(INNER_STACK + PAGE_SIZE)
#define SECOND		(TABLE + PAGE_SIZE)
#define SECOND_POINTERS	(SECOND + PAGE_SIZE)
#define SECOND_PAGES	(SECOND_POINTERS + PAGE_SIZE)
#define SECOND_TABLE	(SECOND_PAGES + PAGE_SIZE)

/* In each page: the page's number, and code. */
#define CODE		64

#define RESERVED_BIT	(1UL << 51)

enum access { READ, WRITE, FETCH };

/* In the shared page. */
struct order {
	uint64_t store, entry;		/* the hypervisor stores an entry there, unless it is 0 */
	uint64_t flush;			/* and flushes */
	uint64_t root;			/* and takes this root, unless it is 0 */
	uint64_t access, address;	/* the nested guest's access */
	uint64_t inner;			/* its code */
	uint64_t loaded, qualification;
};

static const char *const names[] = { "read", "write", "fetch" };
static const uint64_t bits[] = { EPT_READ, EPT_WRITE, EPT_EXECUTE };

static guest_code void inner(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	if (order->access == READ)
		order->loaded = load(order->address);
	else if (order->access == WRITE)
		store(order->address, 4711);
	else
		((void (*)(void))(order->address + CODE))();
	nested_hypercall(NESTED);
}

static guest_code void hypervisor(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		if (order->store)
			store(order->store, order->entry);
		if (order->flush)
			nested_flush(NESTED);
		if (order->root)
			vmx_root((void *)NESTED, order->root);
		guest_sync(nested_run(NESTED, INNER_STACK, order->inner, shared));
	}
}

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *memory_of_region;
static bool has_execute_only, has_ad;

static uint64_t *entries(uint64_t table)
{
	return (void *)(vm.low + table);
}

static struct nested *nested(void)
{
	return (void *)(vm.low + NESTED);
}

static uint32_t give(struct order order)
{
	order.inner = vm_code(inner);
	memcpy(vm.shared, &order, sizeof(order));
	return vcpu_run_to_sync(vcpu);
}

/* The hypervisor gives a page of the region an entry; then the nested guest accesses it. */
static uint32_t try(uint64_t page, uint64_t entry, enum access access)
{
	return give((struct order){ .store = TABLE + page * 8, .entry = entry, .flush = 1, .access = access,
				    .address = REGION + page * PAGE_SIZE });
}

static uint64_t page_entry(uint64_t page, uint64_t permissions)
{
	return (REGION + page * PAGE_SIZE) | permissions | EPT_WB;
}

static bool misconfigured(uint64_t permissions)
{
	return (permissions & (EPT_READ | EPT_WRITE)) == EPT_WRITE || (permissions == EPT_EXECUTE && !has_execute_only);
}

static void check_permissions(enum access access)
{
	uint64_t wrong = 0, page = 16 * access;

	for (uint64_t permissions = 0; permissions <= EPT_ALL; permissions++, page++) {
		uint32_t want = permissions && misconfigured(permissions) ? NESTED_OTHER | VMX_EPT_MISCONFIGURATION :
				permissions & bits[access] ? NESTED_HYPERCALL : NESTED_FAULT;
		uint32_t got = try(page, page_entry(page, permissions), access);
		uint64_t what = nested()->info & 0x3f;

		if (got == want && (got != NESTED_FAULT || (nested()->gpa / PAGE_SIZE == REGION / PAGE_SIZE + page &&
							    (what & 7) == bits[access] && what >> 3 == permissions)))
			continue;
		wrong++;
		note("%s with permissions %lu: 0x%x instead of 0x%x, gpa 0x%lx, qualification 0x%lx", names[access],
		     permissions, got, want, nested()->gpa, nested()->info);
	}
	ok(wrong == 0, "%s: the nested guest may do what the entry says, for all permissions", names[access]);
}

static void check_misconfigured(void)
{
	uint32_t reserved = try(100, page_entry(100, EPT_ALL) | RESERVED_BIT, READ);
	uint32_t type = try(101, (REGION + 101 * PAGE_SIZE) | EPT_ALL | 2UL << 3, READ);
	uint32_t uncached = try(102, (REGION + 102 * PAGE_SIZE) | EPT_ALL, READ);

	ok(reserved == (NESTED_OTHER | VMX_EPT_MISCONFIGURATION), "a reserved bit of an address is a misconfiguration (0x%x)",
	   reserved);
	ok(type == (NESTED_OTHER | VMX_EPT_MISCONFIGURATION), "so is a memory type that does not exist (0x%x)", type);
	ok(uncached == NESTED_HYPERCALL, "and one that does is none (0x%x)", uncached);
}

static void check_accessed_and_dirty(void)
{
	uint64_t seen[3], want = has_ad ? EPT_ACCESSED : 0;

	for (enum access access = READ; access <= FETCH; access++) {
		try(110 + access, page_entry(110 + access, EPT_ALL), access);
		seen[access] = entries(TABLE)[110 + access] & (EPT_ACCESSED | EPT_DIRTY);
	}
	ok(seen[READ] == want && seen[FETCH] == want, "reads and fetches set the accessed bit, if there is one (0x%lx, 0x%lx)",
	   seen[READ], seen[FETCH]);
	ok(seen[WRITE] == (has_ad ? EPT_ACCESSED | EPT_DIRTY : 0), "writes set the dirty bit as well (0x%lx)", seen[WRITE]);
	give((struct order){ .access = WRITE, .address = REGION + 110 * PAGE_SIZE });
	ok((entries(TABLE)[110] & EPT_DIRTY) == (has_ad ? EPT_DIRTY : 0), "also when the page was only read before");
}

static uint64_t loaded(uint64_t page, struct order order)
{
	order.address = REGION + page * PAGE_SIZE;
	if (give(order) != NESTED_HYPERCALL)
		bail("the nested guest cannot load from page %lu", page);
	return ((struct order *)vm.shared)->loaded;
}

static void check_roots(void)
{
	uint64_t first, second, again, flushed;

	try(120, page_entry(120, EPT_ALL), READ);
	first = loaded(120, (struct order){ 0 });
	second = loaded(120, (struct order){ .root = SECOND });
	again = loaded(120, (struct order){ .root = TABLES });
	ok(first == 120 && second == PAGES - 1 - 120 && again == 120, "each EPT pointer has its own translations (%lu, %lu, %lu)",
	   first, second, again);
	flushed = loaded(120, (struct order){ .store = TABLE + 120 * 8, .entry = page_entry(121, EPT_ALL), .flush = 1 });
	ok(flushed == 121, "after INVEPT a changed entry counts (%lu)", flushed);
	first = loaded(120, (struct order){ .root = SECOND });
	ok(first == PAGES - 1 - 120, "and the other pointer's do (%lu)", first);
}

static void set_up(void)
{
	vm_create(&vm);
	memory_of_region = memory(SIZE, false);
	for (uint64_t page = 0; page < PAGES; page++) {
		memory_of_region[page * PAGE_SIZE + CODE] = 0xc3;	/* RET */
		*(uint64_t *)(memory_of_region + page * PAGE_SIZE) = page;
	}
	must(vm_slot(&vm, 1, REGION, SIZE, memory_of_region, 0));
	vcpu = vm_vcpu(&vm, hypervisor, VM_SHARED_GPA);
	nested_prepare(vcpu, NESTED, TABLES);
	*nested_identity_entry(&vm, TABLES, REGION) = TABLE | nested_entry(true);
	memcpy(entries(SECOND_POINTERS), entries(TABLES + PAGE_SIZE), PAGE_SIZE);
	memcpy(entries(SECOND_PAGES), entries(TABLES + 3 * PAGE_SIZE), PAGE_SIZE);
	entries(SECOND)[0] = SECOND_POINTERS | nested_entry(true);
	entries(SECOND_POINTERS)[1] = SECOND_PAGES | nested_entry(true);
	entries(SECOND_PAGES)[0] = SECOND_TABLE | nested_entry(true);
	for (uint64_t page = 0; page < PAGES; page++)
		entries(SECOND_TABLE)[page] = page_entry(PAGES - 1 - page, EPT_ALL);
}

int main(void)
{
	uint64_t capabilities;

	if (!vmx_offered() || kvm_paging() == SHADOW)
		skip_all("there is no EPT");
	plan(3 + 3 + 3 + 3);
	set_up();
	capabilities = vmx_ept_capabilities(vcpu);
	has_execute_only = capabilities & VMX_EPT_EXECUTE_ONLY;
	has_ad = capabilities & VMX_EPT_AD;
	note("execute-only entries: %d, accessed and dirty bits: %d", has_execute_only, has_ad);
	for (enum access access = READ; access <= FETCH; access++)
		check_permissions(access);
	check_misconfigured();
	check_accessed_and_dirty();
	check_roots();
	vm_destroy(&vm);
	return finish();
}

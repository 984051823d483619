// SPDX-License-Identifier: GPL-2.0
/*
 * The dirty log, page by page, against a shadow copy: a page is reported if and only if the
 * guest wrote it since the last time. By bitmap, by bitmap with manual clearing, and by ring;
 * over 4 KiB pages and over huge pages, which logging must take apart.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "host.h"
#include "vm.h"

#define PAGES	2048UL
#define SIZE	(PAGES * PAGE_SIZE)
#define ROUNDS	8
#define RING_ENTRIES 4096
#define EAGER	KVM_PARAMETERS "eager_page_split"
/* A slot begins so many pages into a huge page; the 64 pages from another one on lie half in the next huge page. */
#define SHIFT	32UL
#define ACROSS	(1024UL - 32)

struct order {
	uint64_t seed, writes, round;
};

/* Write `writes` pages picked by a generator that the host knows, too. */
static guest_code void write_pages(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		uint64_t state = order->seed;

		for (uint64_t i = 0; i < order->writes; i++) {
			state = state * 6364136223846793005UL + 1442695040888963407UL;
			store(VM_TEST_GPA + (state >> 33) % PAGES * PAGE_SIZE + 8, order->round);
		}
		guest_sync(1);
	}
}

struct span {
	uint64_t first, count, step;
};

static guest_code void write_span(uint64_t shared)
{
	volatile struct span *span = (void *)shared;

	for (;;) {
		for (uint64_t i = 0; i < span->count; i++)
			store(VM_TEST_GPA + (span->first + i * span->step) * PAGE_SIZE, i);
		guest_sync(1);
	}
}

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *base;
static uint64_t shadow[PAGES];

/* Run the guest, find by comparison what it wrote; returns how many pages. */
static unsigned long guest_round(uint64_t round, uint8_t *wrote)
{
	unsigned long count = 0;

	*(struct order *)vm.shared = (struct order){ round * 7919 + 1, 50 << (round % 6), round + 1 };
	vcpu_run_to_sync(vcpu);
	for (unsigned long page = 0; page < PAGES; page++) {
		uint64_t now = *(uint64_t *)(base + page * PAGE_SIZE + 8);

		wrote[page] = now != shadow[page];
		shadow[page] = now;
		count += wrote[page];
	}
	return count;
}

static bool same(const char *what, uint64_t round, const uint8_t *wrote, const uint8_t *logged)
{
	unsigned long missed = 0, extra = 0;

	for (unsigned long page = 0; page < PAGES; page++) {
		missed += wrote[page] && !logged[page];
		extra += logged[page] && !wrote[page];
	}
	if (missed || extra)
		note("%s, round %lu: %lu written pages not reported, %lu reported that were not written",
		     what, round, missed, extra);
	return !missed && !extra;
}

static void get_bitmap(uint8_t *logged)
{
	uint8_t bits[PAGES / 8];
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bits };

	memset(bits, 0xff, sizeof(bits));
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	for (unsigned long page = 0; page < PAGES; page++)
		logged[page] = bits[page / 8] >> (page % 8) & 1;
}

static void clear_bitmap(const uint8_t *logged)
{
	uint8_t bits[PAGES / 8] = { 0 };
	struct kvm_clear_dirty_log log = { .slot = 1, .num_pages = PAGES, .dirty_bitmap = bits };

	for (unsigned long page = 0; page < PAGES; page++)
		bits[page / 8] |= logged[page] << (page % 8);
	must(ioctl(vm.fd, KVM_CLEAR_DIRTY_LOG, &log));
}

static struct kvm_dirty_gfn *ring;
static unsigned int ring_next;

static void reap_ring(uint8_t *logged)
{
	unsigned int reaped = 0;

	memset(logged, 0, PAGES);
	for (;;) {
		struct kvm_dirty_gfn *entry = &ring[ring_next % RING_ENTRIES];

		if (!(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
			break;
		/* The low slot's pages are not logged. */
		if (entry->slot == 1 && entry->offset < PAGES)
			logged[entry->offset] = 1;
		else
			note("the ring names slot %u, page %llu", entry->slot, entry->offset);
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		ring_next++;
		reaped++;
	}
	if (must(ioctl(vm.fd, KVM_RESET_DIRTY_RINGS, 0)) != reaped)
		note("not all of %u ring entries were reset", reaped);
}

enum method { BITMAP, MANUAL, RING };
static const char *const names[] = { "bitmap", "bitmap with manual clearing", "ring" };

static void start(enum method method, bool huge)
{
	memset(shadow, 0, sizeof(shadow));
	base = memory(SIZE, huge);
	memset(base, 0, SIZE);
	vm_create(&vm);
	if (method == MANUAL)
		vm_enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	if (method == RING)
		vm_enable(&vm, KVM_CAP_DIRTY_LOG_RING, RING_ENTRIES * sizeof(struct kvm_dirty_gfn));
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	vcpu = vm_vcpu(&vm, write_pages, VM_SHARED_GPA);
	if (method == RING) {
		ring_next = 0;
		ring = mmap(NULL, RING_ENTRIES * sizeof(*ring), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd,
			    KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE);
		if (ring == MAP_FAILED)
			bail("mmap of the dirty ring: %m");
	}
}

static void stop(enum method method)
{
	if (method == RING)
		munmap(ring, RING_ENTRIES * sizeof(*ring));
	vm_destroy(&vm);
	munmap(base, SIZE);
}

static void with(enum method method, bool huge)
{
	const char *backing = huge ? "huge pages" : "4 KiB pages";
	static uint8_t wrote[PAGES], logged[PAGES];
	unsigned long written = 0;
	bool right = true;

	start(method, huge);
	/* Everything is mapped, and mapped writable, before logging starts. */
	written += guest_round(0, wrote);
	if (huge)
		ok(kvm_stat(vm.fd, "pages_2m") > 0, "%s over %s: mapped huge before logging", names[method], backing);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, KVM_MEM_LOG_DIRTY_PAGES));
	for (uint64_t round = 1; round <= ROUNDS; round++) {
		written += guest_round(round, wrote);
		if (method == RING)
			reap_ring(logged);
		else
			get_bitmap(logged);
		right &= same(names[method], round, wrote, logged);
		if (method == MANUAL)
			clear_bitmap(logged);
	}
	ok(right && written > PAGES, "%s over %s: exactly the written pages are reported", names[method], backing);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, KVM_MEM_LOG_DIRTY_PAGES));
	guest_round(ROUNDS + 1, wrote);
	if (method == RING)
		reap_ring(logged);
	else
		get_bitmap(logged);
	ok(same(names[method], ROUNDS + 1, wrote, logged), "%s over %s: logging off and on again loses nothing",
	   names[method], backing);
	stop(method);
}

static void shifted_slot(uint32_t flags)
{
	uint64_t shift = SHIFT * PAGE_SIZE;

	must(vm_slot(&vm, 1, VM_TEST_GPA + shift, SIZE - shift, base + shift, flags));
}

static void guest_writes(struct span span)
{
	memcpy(vm.shared, &span, sizeof(span));
	vcpu_run_to_sync(vcpu);
}

/*
 * All pages are dirty at first, and huge pages writable until a part of them is made clean. 64 pages that are made clean at
 * once lie in two huge pages, both of which have to be taken apart.
 */
static void initially_set(const char *eager)
{
	static uint8_t logged[PAGES], wanted[PAGES];
	uint64_t all = ~0UL, huge;
	struct kvm_clear_dirty_log clear = {
		.slot = 1, .first_page = ACROSS - SHIFT, .num_pages = 64, .dirty_bitmap = &all,
	};

	if (!write_file(EAGER, eager))
		bail(EAGER ": %m");
	base = memory(SIZE, true);
	memset(base, 0, SIZE);
	vm_create(&vm);
	vm_enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		  KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	shifted_slot(0);
	vcpu = vm_vcpu(&vm, write_span, VM_SHARED_GPA);
	guest_writes((struct span){ SHIFT, PAGES - SHIFT, 1 });
	huge = kvm_stat(vm.fd, "pages_2m");
	shifted_slot(KVM_MEM_LOG_DIRTY_PAGES);
	must(ioctl(vm.fd, KVM_CLEAR_DIRTY_LOG, &clear));
	guest_writes((struct span){ ACROSS + 8, 3, 22 });
	get_bitmap(logged);
	memset(wanted, 1, PAGES);
	for (int page = 0; page < 64; page++)
		wanted[ACROSS - SHIFT + page] = page >= 8 && (page - 8) % 22 == 0;
	/* Behind the end of the slot. */
	memset(wanted + PAGES - SHIFT, 1, SHIFT);
	memset(logged + PAGES - SHIFT, 1, SHIFT);
	ok(huge >= 3 && !memcmp(logged, wanted, PAGES),
	   "all dirty at first, huge pages split %s: what is made clean across two huge pages is logged again",
	   eager[0] == 'Y' ? "early" : "by faults");
	stop(MANUAL);
}

int main(void)
{
	char eager[8] = "";

	read_word(EAGER, eager, sizeof(eager));
	plan(17);
	initially_set("Y");
	initially_set("N");
	write_file(EAGER, eager);
	for (enum method method = BITMAP; method <= RING; method++) {
		with(method, false);
		with(method, true);
	}
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Migration: memory is copied by the dirty log while the guest writes to it, and in the end the
 * copy has to be the guest's memory, byte for byte.
 *
 *   dirty_copy [-n ROUNDS] [-s SEED] [-k TEXT]
 *
 * Two vCPUs write numbered words to random places, each to words of its own. A round starts the
 * log, copies what is reported while the guest goes on, stops the guest, copies what is reported
 * last, and compares. The waits are random, and only shake the order of things: the copy must be
 * right for every order. What the guest wrote is replayed from its seed, so that the memory itself
 * is checked, too, and each vCPU reads back what it wrote last.
 *
 * Every combination of backing, way of logging and what happens to the slots meanwhile is one
 * check. A store to a slot that is deleted or read-only comes to user space, which carries it out
 * and keeps a log of its own, as a VMM does.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "audit.h"
#include "host.h"
#include "threads.h"
#include "vm.h"

#define NR_VCPUS	2
#define NR_SLOTS	2
#define SLOT_PAGES	1024UL
#define SLOT_SIZE	(SLOT_PAGES * PAGE_SIZE)
#define PAGES		(NR_SLOTS * SLOT_PAGES)
#define SIZE		(PAGES * PAGE_SIZE)
#define WORDS		(PAGE_SIZE / 8)
#define ROUNDS_OF_A_VM	10

enum backing { SMALL, THP, HUGETLB, NR_BACKINGS };
enum logging { BITMAP, MANUAL, INITIALLY_SET, RING, NR_LOGGINGS };
enum flipping { STEADY, OFF_AND_ON, RECREATE, READ_ONLY, NR_FLIPPINGS };

static const char *const backings[] = { "4K pages", "THP", "hugetlb" };
static const char *const loggings[] = { "bitmap", "manual clearing", "all set at first", "ring" };
static const char *const flippings[] = {
	"slots as they are", "log off and on", "slot deleted and re-created", "slot read-only for a while",
};

/* What a vCPU is told, and tells. */
struct writer {
	uint64_t id, seed, stop;
	/* The number of the last store; all stores of all rounds count. */
	uint64_t sequence;
	uint64_t steps, wrong;
};

struct step {
	uint64_t offset, count, pause;
};

guest_inline struct step next_step(uint64_t *state, uint64_t id)
{
	uint64_t bits = next_random(state), page = bits % PAGES;
	struct step step = {
		.offset = page * PAGE_SIZE + ((bits >> 12) % (WORDS / NR_VCPUS) * NR_VCPUS + id) * 8,
		.count = bits >> 24 & 7 ? 1 : 2 + (bits >> 28) % 15,
		.pause = bits >> 36 & 31 ? 0 : (bits >> 42) % 16384,
	};

	if (step.count > PAGES - page)
		step.count = PAGES - page;
	return step;
}

guest_inline uint64_t value_of(uint64_t id, uint64_t sequence)
{
	return (id + 1) << 56 | sequence;
}

static guest_code void write_until_told(uint64_t address)
{
	volatile struct writer *writer = (void *)address;

	for (;;) {
		uint64_t state = writer->seed, sequence = writer->sequence, id = writer->id;

		while (!writer->stop) {
			struct step step = next_step(&state, id);
			uint64_t at = VM_TEST_GPA + step.offset;

			for (uint64_t i = 0; i < step.count; i++)
				store(at + i * PAGE_SIZE, value_of(id, ++sequence));
			at += (step.count - 1) * PAGE_SIZE;
			writer->wrong += load(at) != value_of(id, sequence);
			writer->sequence = sequence;
			writer->steps++;
			for (uint64_t i = 0; i < step.pause; i++)
				__asm__ volatile("");
		}
		guest_sync(1);
	}
}

static struct vm vm;
static enum backing backing;
static enum logging logging;
static enum flipping flipping;
static uint8_t *base, *copy, *expected;
/* Reported as dirty and not copied yet. */
static bool dirty[PAGES];
/* Written by user space for the guest. */
static _Atomic bool touched[PAGES];
static _Atomic unsigned long touches;
static uint64_t seed, random_state;

static struct kvm_dirty_gfn *rings[NR_VCPUS];
/* Small enough to fill up now and then; with PML KVM needs room for what the CPU has written down. */
static unsigned int ring_entries = 512;
static unsigned int ring_next[NR_VCPUS];

/* Over all rounds of a check. */
static unsigned long copied, reported, seen_huge, not_all_set, unreached;

static uint64_t below(uint64_t limit)
{
	return next_random(&random_state) % limit;
}

static volatile struct writer *writer(int id)
{
	return (struct writer *)((uint8_t *)vm.shared + id * 256);
}

static uint64_t steps(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < NR_VCPUS; i++)
		sum += writer(i)->steps;
	return sum;
}

static int set_slot(int slot, uint32_t flags)
{
	return vm_slot(&vm, 1 + slot, VM_TEST_GPA + slot * SLOT_SIZE, SLOT_SIZE, base + slot * SLOT_SIZE, flags);
}

static void delete_slot(int slot)
{
	must(vm_slot(&vm, 1 + slot, 0, 0, NULL, 0));
}

/* An access of the guest to a place where no slot takes it. */
static void access_for_guest(struct kvm_run *run)
{
	uint64_t offset = run->mmio.phys_addr - VM_TEST_GPA;

	if (offset >= SIZE)
		bail("an access to gpa 0x%llx came to user space", run->mmio.phys_addr);
	if (!run->mmio.is_write) {
		memcpy(run->mmio.data, base + offset, run->mmio.len);
		return;
	}
	memcpy(base + offset, run->mmio.data, run->mmio.len);
	/* After the store, so that who takes the mark copies the store. */
	atomic_store(&touched[offset / PAGE_SIZE], true);
	atomic_fetch_add(&touches, 1);
}

static bool on_exit_of(struct vcpu *vcpu, int error)
{
	struct kvm_run *run = vcpu->run;

	if (error)
		bail("KVM_RUN: %s", strerror(error));
	switch (run->exit_reason) {
	case KVM_EXIT_MMIO:
		access_for_guest(run);
		return true;
	case KVM_EXIT_DIRTY_RING_FULL:
		/* The copying thread empties it. */
		usleep(100);
		return true;
	case KVM_EXIT_IO:
		if (exit_is_sync(vcpu, 1))
			return false;
	}
	bail("unexpected exit %u", run->exit_reason);
}

static void collect_ring(int id)
{
	unsigned int taken = 0;

	for (;;) {
		struct kvm_dirty_gfn *entry = &rings[id][ring_next[id] % ring_entries];

		if (!(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
			break;
		if (entry->slot < 1 || entry->slot > NR_SLOTS || entry->offset >= SLOT_PAGES)
			bail("the ring names slot %u, page %llu", entry->slot, entry->offset);
		dirty[(entry->slot - 1) * SLOT_PAGES + entry->offset] = true;
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		ring_next[id]++;
		taken++;
	}
	reported += taken;
}

static void collect_rings(void)
{
	for (int id = 0; id < NR_VCPUS; id++)
		collect_ring(id);
	/* From here on, what was collected is write-protected again, and may be copied. */
	must(ioctl(vm.fd, KVM_RESET_DIRTY_RINGS, 0));
}

/* Clear what was reported, in two calls. Some of it may be left for later, and is reported again then. */
static void clear_manually(int slot, uint64_t *bits, bool all)
{
	uint64_t middle = below(SLOT_PAGES / 64 + 1) * 64;
	struct kvm_clear_dirty_log calls[] = {
		{ .slot = 1 + slot, .num_pages = middle, .dirty_bitmap = bits },
		{ .slot = 1 + slot, .first_page = middle, .num_pages = SLOT_PAGES - middle, .dirty_bitmap = bits + middle / 64 },
	};

	if (!all && below(2))
		for (unsigned long i = 0; i < SLOT_PAGES / 64; i++)
			bits[i] &= next_random(&random_state) | next_random(&random_state) << 32;
	for (int i = 0; i < 2; i++)
		if (calls[i].num_pages)
			must(ioctl(vm.fd, KVM_CLEAR_DIRTY_LOG, &calls[i]));
}

static void collect_bitmap(int slot, bool all)
{
	uint64_t bits[SLOT_PAGES / 64];
	struct kvm_dirty_log log = { .slot = 1 + slot, .dirty_bitmap = bits };

	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	if (logging != BITMAP)
		clear_manually(slot, bits, all);
	for (unsigned long page = 0; page < SLOT_PAGES; page++) {
		if (bits[page / 64] >> (page % 64) & 1) {
			dirty[slot * SLOT_PAGES + page] = true;
			reported++;
		}
	}
}

/* Ask what is dirty. The pages may be copied then: what is written from here on is reported again. */
static void collect(bool all)
{
	if (logging == RING)
		collect_rings();
	else
		for (int slot = 0; slot < NR_SLOTS; slot++)
			collect_bitmap(slot, all);
	for (unsigned long page = 0; page < PAGES; page++)
		dirty[page] |= atomic_exchange(&touched[page], false);
}

static void copy_dirty(bool all)
{
	collect(all);
	for (unsigned long page = 0; page < PAGES; page++) {
		if (!dirty[page])
			continue;
		dirty[page] = false;
		memcpy(copy + page * PAGE_SIZE, base + page * PAGE_SIZE, PAGE_SIZE);
		copied++;
	}
}

/* Until the vCPUs made so many steps. Full rings would stop them. */
static void wait_for_steps(uint64_t count)
{
	uint64_t goal = steps() + count;

	while (steps() < goal) {
		if (logging == RING)
			collect_rings();
		usleep(100);
	}
}

/*
 * Until user space made so many stores for the guest. Every second step of the guest goes to the slot that is
 * not there: when none of very many came here, they went somewhere else.
 */
static void wait_for_touches(unsigned long count)
{
	unsigned long goal = atomic_load(&touches) + count;
	uint64_t limit = steps() + 100000;

	while (atomic_load(&touches) < goal && steps() < limit) {
		if (logging == RING)
			collect_rings();
		usleep(100);
	}
	unreached += atomic_load(&touches) < goal;
}

static void log_on(int slot)
{
	must(set_slot(slot, KVM_MEM_LOG_DIRTY_PAGES));
	if (logging == INITIALLY_SET) {
		uint64_t bits[SLOT_PAGES / 64];
		struct kvm_dirty_log log = { .slot = 1 + slot, .dirty_bitmap = bits };

		must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
		for (unsigned long i = 0; i < SLOT_PAGES / 64; i++)
			not_all_set += bits[i] != UINT64_MAX;
		return;
	}
	/* What was written before is user space's to know. */
	for (unsigned long page = 0; page < SLOT_PAGES; page++)
		dirty[slot * SLOT_PAGES + page] = true;
}

/* A bitmap goes with its slot: what it says is to be known before, and nothing may be written in between. */
static void delete_logged_slot(int slot)
{
	if (logging == RING) {
		delete_slot(slot);
		return;
	}
	vcpus_hold();
	collect(true);
	delete_slot(slot);
	vcpus_release();
}

static void flip(void)
{
	int slot = below(NR_SLOTS);

	switch (flipping) {
	case OFF_AND_ON:
		must(set_slot(slot, 0));
		wait_for_steps(below(200));
		log_on(slot);
		break;
	case RECREATE:
		delete_logged_slot(slot);
		wait_for_touches(1 + below(5));
		must(set_slot(slot, KVM_MEM_LOG_DIRTY_PAGES));
		break;
	case READ_ONLY:
		if (!set_slot(slot, KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) || errno != EINVAL)
			bail("a slot became read-only while it was there");
		delete_logged_slot(slot);
		must(set_slot(slot, KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY));
		wait_for_touches(1 + below(20));
		/* No store goes past user space's log now. */
		delete_slot(slot);
		must(set_slot(slot, KVM_MEM_LOG_DIRTY_PAGES));
		break;
	default:
		break;
	}
}

/* Do to `expected` what the vCPU says it did since its sequence was `from`. */
static void replay(int id, uint64_t from)
{
	uint64_t state = writer(id)->seed, sequence = from;

	while (sequence < writer(id)->sequence) {
		struct step step = next_step(&state, id);

		for (uint64_t i = 0; i < step.count; i++)
			*(uint64_t *)(expected + step.offset + i * PAGE_SIZE) = value_of(id, ++sequence);
	}
}

static bool same(const char *what, const uint8_t *one, const uint8_t *other)
{
	unsigned long different = 0, first = 0;

	if (!memcmp(one, other, SIZE))
		return true;
	for (unsigned long word = 0; word < SIZE / 8; word++) {
		if (((uint64_t *)one)[word] == ((uint64_t *)other)[word])
			continue;
		if (!different++)
			first = word;
	}
	note("%s differs in %lu words; first in page %lu, word %lu: 0x%lx, not 0x%lx", what, different,
	     first / WORDS, first % WORDS, ((uint64_t *)one)[first], ((uint64_t *)other)[first]);
	return false;
}

static void stop_guest(void)
{
	for (int id = 0; id < NR_VCPUS; id++)
		writer(id)->stop = 1;
	while (vcpus_left()) {
		if (logging == RING)
			collect_rings();
		usleep(100);
	}
	vcpus_join();
}

static bool copy_round(unsigned long number)
{
	uint64_t from[NR_VCPUS];
	int passes = 2 + below(4);
	bool right = true;

	for (int id = 0; id < NR_VCPUS; id++) {
		from[id] = writer(id)->sequence;
		writer(id)->seed = next_random(&random_state) | 1;
		writer(id)->stop = 0;
	}
	/* It makes a difference when logging starts with huge pages. */
	write_file(KVM_PARAMETERS "eager_page_split", number % 2 ? "Y" : "N");
	vcpus_start(&vm, NR_VCPUS, on_exit_of);
	wait_for_steps(1 + below(200));
	seen_huge += kvm_stat(vm.fd, "pages_2m") > 0;
	for (int slot = 0; slot < NR_SLOTS; slot++)
		log_on(slot);
	copy_dirty(false);
	for (int pass = 0; pass < passes; pass++) {
		wait_for_steps(below(200));
		if (pass == 0 || below(2))
			flip();
		copy_dirty(false);
	}
	stop_guest();
	copy_dirty(true);
	for (int id = 0; id < NR_VCPUS; id++) {
		replay(id, from[id]);
		if (writer(id)->wrong)
			note("vCPU %d read something else than it had written, %lu times", id, writer(id)->wrong);
		right &= !writer(id)->wrong;
	}
	right &= same("the copy", copy, base);
	right &= same("the guest's memory", base, expected);
	for (int slot = 0; slot < NR_SLOTS; slot++)
		must(set_slot(slot, 0));
	return right;
}

static void create(void)
{
	memset(base, 0, SIZE);
	memset(copy, 0xff, SIZE);
	memset(expected, 0, SIZE);
	vm_create(&vm);
	if (logging == MANUAL)
		vm_enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	if (logging == INITIALLY_SET)
		vm_enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			  KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	if (logging == RING)
		vm_enable(&vm, KVM_CAP_DIRTY_LOG_RING, ring_entries * sizeof(struct kvm_dirty_gfn));
	/* A deleted slot takes everything with it, or only what it mapped. */
	if (below(2))
		vm_enable(&vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	for (int slot = 0; slot < NR_SLOTS; slot++)
		must(set_slot(slot, 0));
	for (int id = 0; id < NR_VCPUS; id++) {
		struct vcpu *vcpu = vm_vcpu(&vm, write_until_told, VM_SHARED_GPA + id * 256);

		writer(id)->id = id;
		if (logging != RING)
			continue;
		ring_next[id] = 0;
		rings[id] = mmap(NULL, ring_entries * sizeof(**rings), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd,
				 KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE);
		if (rings[id] == MAP_FAILED)
			bail("mmap of the dirty ring: %m");
	}
}

static void destroy(void)
{
	for (int id = 0; logging == RING && id < NR_VCPUS; id++)
		munmap(rings[id], ring_entries * sizeof(**rings));
	vm_destroy(&vm);
}

static void check(const char *name, unsigned long rounds)
{
	unsigned long wrong = 0;

	copied = reported = seen_huge = not_all_set = unreached = touches = 0;
	for (unsigned long done = 0; done < rounds && !wrong; done += ROUNDS_OF_A_VM) {
		create();
		for (unsigned long i = done; i < rounds && i < done + ROUNDS_OF_A_VM && !wrong; i++) {
			wrong = !copy_round(i);
			audit("after a round");
			if (wrong)
				note("round %lu of %lu went wrong", i + 1, rounds);
		}
		destroy();
	}
	if (backing != SMALL && !seen_huge)
		note("nothing was ever mapped huge");
	if (not_all_set)
		note("the first log had clean pages");
	if (unreached)
		note("stores went past a slot that is deleted or read-only");
	ok(!wrong && reported && !not_all_set && !unreached && (backing == SMALL || seen_huge),
	   "%s: the copy is the guest's memory (%lu rounds, %lu pages copied, %lu stores by user space)",
	   name, rounds, copied, (unsigned long)touches);
}

static void *backing_memory(void)
{
	return backing == HUGETLB ? hugetlb_memory(SIZE) : memory(SIZE, backing == THP);
}

static void release_memory(void)
{
	if (backing == HUGETLB)
		hugetlb_release(base, SIZE);
	else
		munmap(base, SIZE);
}

/* The checks of this backing whose name has `only` in it; how many. */
static int check_backing(unsigned long rounds, const char *only, bool make)
{
	int count = 0;

	if (make)
		base = backing_memory();
	for (logging = 0; logging < NR_LOGGINGS; logging++) {
		for (flipping = 0; flipping < NR_FLIPPINGS; flipping++) {
			char name[96];

			snprintf(name, sizeof(name), "%s, %s, %s", backings[backing], loggings[logging], flippings[flipping]);
			if (only && !strstr(name, only))
				continue;
			count++;
			if (make && base)
				check(name, rounds);
			else if (make)
				skip(name, "the machine has no huge pages to spare");
		}
	}
	if (make && base)
		release_memory();
	return count;
}

int main(int argc, char **argv)
{
	unsigned long rounds = 2;
	const char *only = NULL;
	char eager_split[2] = "Y";
	int option, count = 0;

	must(getrandom(&seed, sizeof(seed), 0));
	if (kvm_has_pml())
		ring_entries = 1024;
	while ((option = getopt(argc, argv, "n:s:k:")) != -1) {
		if (option == 'n')
			rounds = strtoul(optarg, NULL, 0);
		else if (option == 's')
			seed = strtoul(optarg, NULL, 0);
		else if (option == 'k')
			only = optarg;
		else
			bail("usage: dirty_copy [-n ROUNDS] [-s SEED] [-k TEXT]");
	}
	for (backing = 0; backing < NR_BACKINGS; backing++)
		count += check_backing(rounds, only, false);
	plan(count);
	seed |= 1;
	random_state = seed;
	note("seed 0x%lx", seed);
	read_word(KVM_PARAMETERS "eager_page_split", eager_split, sizeof(eager_split));
	copy = memory(SIZE, false);
	expected = memory(SIZE, false);
	for (backing = 0; backing < NR_BACKINGS; backing++)
		check_backing(rounds, only, true);
	write_file(KVM_PARAMETERS "eager_page_split", eager_split);
	return finish();
}

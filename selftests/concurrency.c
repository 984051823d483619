// SPDX-License-Identifier: GPL-2.0
/*
 * vCPUs work on a small region while everything that can happen to its mappings happens at once.
 *
 *   concurrency [-n OPERATIONS] [-t SECONDS] [-s SEED]
 *
 * One thread troubles the memory (see lib/trouble.c), another the VM: slots, dirty logging, huge
 * pages, pre-faulting, zapping, kicks. Each does the given number of operations a phase, in a
 * random order in which every kind comes up. With -t phases are repeated for that long.
 *
 * Every page holds a word for each vCPU with the number of the page and of the store, and a word
 * that it shares with one other page. A vCPU knows what it stored last, and so finds out about a store
 * that was lost, and about another page in the place of the right one. In every second phase memory is
 * thrown away, too; then a word may have become 0, but never what it was before.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <unistd.h>

#include "audit.h"
#include "host.h"
#include "threads.h"
#include "trouble.h"
#include "vm.h"

#define NR_VCPUS	2
#define SLOTS		4
#define SIZE		(SLOTS * HUGE_SIZE)
#define PAGES		(SIZE / PAGE_SIZE)
/* The memory is in the guest twice, and each slot can be moved by this. */
#define ALIAS		(512 * MIB)
#define AWAY		(256 * MIB)
#define NR_SLOTS	(2 * SLOTS)
#define LAST(id)	(VM_SCRATCH_GPA + (id) * PAGES * 8)

enum command { FILL, WORK, LOOK };
enum fault { NO_FAULT, LOST_STORE, WRONG_TAG, FOREIGN_WORD };
static const char *const fault_names[] = { "none", "a word that is not the last one stored", "the word of other pages",
					   "the other vCPU's word of another page" };

/* What a vCPU is told, and tells. */
struct watcher {
	uint64_t id, seed, command, stop;
	/* Memory may have become 0. */
	uint64_t lossy;
	uint64_t generation, steps;
	/* How often something was wrong, and what was the first time. */
	uint64_t wrong, fault, page, got, wanted;
};

/* For two pages, so that the host can merge them. */
guest_inline uint64_t tag_of(uint64_t page)
{
	return 0xabcd000000000000UL | page / 2;
}

guest_inline uint64_t word_of(uint64_t page, uint64_t id, uint64_t generation)
{
	return (id + 1) << 56 | (page & 0xffff) << 40 | (generation & 0xffffffffffUL);
}

guest_inline uint64_t place(uint64_t id)
{
	return 64 + id * 8;
}

guest_inline void complain(volatile struct watcher *watcher, enum fault fault, uint64_t page, uint64_t got, uint64_t wanted)
{
	if (watcher->wrong++)
		return;
	watcher->fault = fault;
	watcher->page = page;
	watcher->got = got;
	watcher->wanted = wanted;
}

guest_inline void look_at(volatile struct watcher *watcher, uint64_t page, uint64_t address)
{
	uint64_t id = watcher->id, known = LAST(id) + page * 8;
	uint64_t word = load(address + place(id)), last = load(known);
	uint64_t tag = load(address), other = load(address + place(1 - id));

	if (word != last) {
		if (word || !watcher->lossy)
			complain(watcher, LOST_STORE, page, word, last);
		store(known, word);
	}
	if (tag != tag_of(page) && (tag || !watcher->lossy))
		complain(watcher, WRONG_TAG, page, tag, tag_of(page));
	if (other && other >> 40 != word_of(page, 1 - id, 0) >> 40)
		complain(watcher, FOREIGN_WORD, page, other, word_of(page, 1 - id, 0));
}

guest_inline void write_to(volatile struct watcher *watcher, uint64_t page, uint64_t address, uint64_t word)
{
	store(address, tag_of(page));
	store(address + place(watcher->id), word);
	store(LAST(watcher->id) + page * 8, word);
}

guest_inline uint64_t next_word(volatile struct watcher *watcher, uint64_t page)
{
	uint64_t generation = watcher->generation + 1;

	watcher->generation = generation;
	return word_of(page, watcher->id, generation);
}

guest_inline void step(volatile struct watcher *watcher, uint64_t *state)
{
	uint64_t bits = next_random(state), page = bits >> 30 & 1 ? HOT_PAGE(bits >> 31) : bits % PAGES;
	uint64_t address = VM_TEST_GPA + page * PAGE_SIZE + (bits >> 20 & 1) * ALIAS;

	look_at(watcher, page, address);
	if (!(bits >> 21 & 3))
		return;
	/* Half of the pages go back to what makes them equal to another one. */
	if (page & 2 && bits >> 23 & 3)
		write_to(watcher, page, address, 0);
	else
		write_to(watcher, page, address, next_word(watcher, page));
}

static guest_code void watch(uint64_t where)
{
	volatile struct watcher *watcher = (void *)where;

	for (;;) {
		uint64_t state = watcher->seed;

		switch (watcher->command) {
		case FILL:
			for (uint64_t page = 0; page < PAGES; page++)
				write_to(watcher, page, VM_TEST_GPA + page * PAGE_SIZE, next_word(watcher, page));
			break;
		case WORK:
			while (!watcher->stop) {
				step(watcher, &state);
				watcher->steps++;
			}
			break;
		default:
			for (uint64_t page = 0; page < PAGES; page++) {
				look_at(watcher, page, VM_TEST_GPA + page * PAGE_SIZE);
				look_at(watcher, page, VM_TEST_GPA + ALIAS + page * PAGE_SIZE);
			}
		}
		guest_sync(1);
	}
}

static struct vm vm;
static struct vcpu *idle;
static struct area area;
static uint8_t *base;
static uint64_t random_state;
static _Atomic unsigned long failed_runs, accesses;
static bool lossy;
static unsigned long operations = 60;

static volatile struct watcher *watcher(int id)
{
	return (struct watcher *)((uint8_t *)vm.shared + id * 256);
}

static uint64_t below(uint64_t limit)
{
	return next_random(&random_state) % limit;
}

/* An access to a place that has no slot at the moment: user space makes it. */
static void access_for_guest(struct kvm_run *run)
{
	uint64_t offset = run->mmio.phys_addr - VM_TEST_GPA;
	struct iovec ours = { run->mmio.data, run->mmio.len }, theirs = { .iov_len = run->mmio.len };
	ssize_t done;

	if (offset >= ALIAS)
		offset -= ALIAS;
	if (offset >= SIZE)
		bail("an access to gpa 0x%llx came to user space", run->mmio.phys_addr);
	theirs.iov_base = base + offset;
	/* It fails while the memory is protected or away, and that does not last. */
	do {
		done = run->mmio.is_write ? process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0)
					  : process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0);
		if (done < 0 && errno != EFAULT)
			bail("process_vm_%sv: %m", run->mmio.is_write ? "write" : "read");
	} while (done < 0);
	atomic_fetch_add(&accesses, 1);
}

static bool on_exit_of(struct vcpu *vcpu, int error)
{
	struct kvm_run *run = vcpu->run;

	if (error == EFAULT) {
		/* The memory is protected or away. */
		atomic_fetch_add(&failed_runs, 1);
		usleep(20);
		return true;
	}
	if (error)
		bail("KVM_RUN: %s", strerror(error));
	if (run->exit_reason == KVM_EXIT_MMIO) {
		access_for_guest(run);
		return true;
	}
	if (!exit_is_sync(vcpu, 1))
		bail("unexpected exit %u", run->exit_reason);
	return false;
}

static void start(enum command command)
{
	for (int id = 0; id < NR_VCPUS; id++) {
		watcher(id)->command = command;
		watcher(id)->seed = next_random(&random_state) | 1;
		watcher(id)->stop = 0;
		watcher(id)->lossy = lossy;
	}
	vcpus_start(&vm, NR_VCPUS, on_exit_of);
}

static uint64_t steps(void)
{
	uint64_t sum = 0;

	for (int id = 0; id < NR_VCPUS; id++)
		sum += watcher(id)->steps;
	return sum;
}

/* Let the vCPUs work between two operations. */
static void let_work(uint64_t count)
{
	uint64_t goal = steps() + count;

	while (steps() < goal)
		usleep(50);
}

/* A random order of 0 .. count - 1. */
static void shuffle(int *order, int count, uint64_t *random)
{
	for (int i = 0; i < count; i++) {
		int other = next_random(random) % (i + 1);

		order[i] = order[other];
		order[other] = i;
	}
}

static unsigned long troubles[32], impossible;

static void *trouble_memory(void *unused)
{
	int kinds = trouble_kinds(), order[32];

	(void)unused;
	for (unsigned long i = 0; i < operations; i++) {
		int kind;

		if (i % kinds == 0)
			shuffle(order, kinds, &area.random);
		kind = order[i % kinds];
		if (trouble_loses(kind) && !lossy)
			continue;
		if (trouble_make(&area, kind))
			troubles[kind]++;
		else
			impossible++;
		let_work(next_random(&area.random) % 20);
	}
	return NULL;
}

static uint32_t slot_flags[NR_SLOTS];

static int place_slot(int slot, uint64_t offset, bool there)
{
	uint64_t gpa = VM_TEST_GPA + slot / SLOTS * ALIAS + slot % SLOTS * HUGE_SIZE;

	return vm_slot(&vm, 1 + slot, gpa + offset, there ? HUGE_SIZE : 0, base + slot % SLOTS * HUGE_SIZE,
		       slot_flags[slot]);
}

static void delete_slot(int slot)
{
	must(place_slot(slot, 0, false));
	let_work(below(10));
	must(place_slot(slot, 0, true));
}

static void move_slot(int slot)
{
	must(place_slot(slot, AWAY, true));
	let_work(below(10));
	must(place_slot(slot, 0, true));
}

static void switch_log(int slot)
{
	write_file(KVM_PARAMETERS "eager_page_split", below(2) ? "Y" : "N");
	slot_flags[slot] ^= KVM_MEM_LOG_DIRTY_PAGES;
	must(place_slot(slot, 0, true));
}

static void harvest(int slot)
{
	uint64_t bits[HUGE_SIZE / PAGE_SIZE / 64];
	struct kvm_dirty_log log = { .slot = 1 + slot, .dirty_bitmap = bits };
	struct kvm_clear_dirty_log clear = { .slot = 1 + slot, .num_pages = HUGE_SIZE / PAGE_SIZE, .dirty_bitmap = bits };

	if (!(slot_flags[slot] & KVM_MEM_LOG_DIRTY_PAGES))
		return;
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	must(ioctl(vm.fd, KVM_CLEAR_DIRTY_LOG, &clear));
}

static void pre_fault(int slot)
{
	struct kvm_pre_fault_memory range = {
		.gpa = VM_TEST_GPA + slot / SLOTS * ALIAS + slot % SLOTS * HUGE_SIZE,
		.size = HUGE_SIZE,
	};

	if (!ioctl(idle->fd, KVM_PRE_FAULT_MEMORY, &range))
		return;
	/* Not with shadow paging; and not where the memory is away. */
	if (errno != EOPNOTSUPP && errno != EFAULT && errno != EINTR && errno != EAGAIN && errno != ENOENT)
		bail("KVM_PRE_FAULT_MEMORY: %m");
}

static void limit_tables(int slot)
{
	(void)slot;
	must(ioctl(vm.fd, KVM_SET_NR_MMU_PAGES, 64 + below(4000)));
}

static void kick(int slot)
{
	(void)slot;
	for (int i = 0; i < 50; i++)
		vcpus_kick();
}

static void hold(int slot)
{
	(void)slot;
	vcpus_hold();
	vcpus_release();
}

/* Zaps every VM's pages. */
static void forbid_huge(int slot)
{
	char before[8] = "";

	(void)slot;
	read_word(KVM_PARAMETERS "nx_huge_pages", before, sizeof(before));
	write_file(KVM_PARAMETERS "nx_huge_pages", *before == 'Y' ? "N" : "Y");
	let_work(below(10));
	write_file(KVM_PARAMETERS "nx_huge_pages", before);
}

static void (*const vm_troubles[])(int slot) = {
	delete_slot, move_slot, switch_log, harvest, harvest, pre_fault, limit_tables, kick, hold, forbid_huge,
};
#define VM_TROUBLES ((int)(sizeof(vm_troubles) / sizeof(vm_troubles[0])))

static void trouble_vm(void)
{
	int order[VM_TROUBLES];

	for (unsigned long i = 0; i < operations; i++) {
		if (i % VM_TROUBLES == 0)
			shuffle(order, VM_TROUBLES, &random_state);
		vm_troubles[order[i % VM_TROUBLES]](below(NR_SLOTS));
		let_work(below(20));
	}
}

static unsigned long mismatches;

/* With everything at rest: each page is what the vCPUs, and their tables, say it is. */
static void compare(void)
{
	for (uint64_t page = 0; page < PAGES; page++) {
		for (int id = 0; id < NR_VCPUS; id++) {
			uint64_t word = *(uint64_t *)(base + page * PAGE_SIZE + place(id));
			uint64_t last = *(uint64_t *)(vm.low + LAST(id) + page * 8);

			if (word == last)
				continue;
			if (!mismatches++)
				note("page %lu has 0x%lx of vCPU %d, which stored 0x%lx", page, word, id, last);
		}
	}
}

static void phase(bool loses)
{
	pthread_t thread;

	lossy = loses;
	start(FILL);
	vcpus_join();
	start(WORK);
	if (pthread_create(&thread, NULL, trouble_memory, NULL))
		bail("pthread_create failed");
	trouble_vm();
	audit("while vCPUs and the host are at work");
	pthread_join(thread, NULL);
	for (int id = 0; id < NR_VCPUS; id++)
		watcher(id)->stop = 1;
	vcpus_join();
	start(LOOK);
	vcpus_join();
	compare();
	audit("at the end of a phase");
}

static uint64_t wrong(void)
{
	uint64_t sum = 0;

	for (int id = 0; id < NR_VCPUS; id++)
		sum += watcher(id)->wrong;
	return sum;
}

static void tell_wrong(void)
{
	for (int id = 0; id < NR_VCPUS; id++) {
		volatile struct watcher *told = watcher(id);

		if (told->wrong)
			note("vCPU %d was wrong %lu times; the first time in page %lu: %s, 0x%lx instead of 0x%lx", id,
			     told->wrong, told->page, fault_names[told->fault], told->got, told->wanted);
	}
}

static const char *const references[] = { "/sys/module/kvm/refcnt", "/sys/module/kvm_amd/refcnt",
					  "/sys/module/kvm_intel/refcnt", "/sys/module/kvm_rmmu/refcnt" };
static uint64_t references_before[4];

static bool references_are_back(void)
{
	uint64_t deadline = now_ms() + 10000;
	int at = 0;

	/* A VM goes away some time after its file descriptor. */
	while (at < 4) {
		if (read_number(references[at]) == references_before[at])
			at++;
		else if (now_ms() > deadline)
			return false;
		else
			usleep(10000);
	}
	return true;
}

static void create(void)
{
	for (int i = 0; i < 4; i++)
		references_before[i] = read_number(references[i]);
	base = memory(SIZE, true);
	area = (struct area){ .base = base, .size = SIZE, .random = next_random(&random_state) | 1 };
	vm_create(&vm);
	vm_enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	for (int slot = 0; slot < NR_SLOTS; slot++)
		must(place_slot(slot, 0, true));
	for (int id = 0; id < NR_VCPUS; id++) {
		vm_vcpu(&vm, watch, VM_SHARED_GPA + id * 256);
		watcher(id)->id = id;
	}
	idle = vm_vcpu(&vm, watch, 0);
}

static void check_end(void)
{
	static const char *const counters[] = { "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits" };
	uint64_t left = 0;

	for (int slot = 0; slot < NR_SLOTS; slot++)
		must(place_slot(slot, 0, false));
	must(vm_slot(&vm, VM_LOW_SLOT, 0, 0, NULL, 0));
	for (int i = 0; i < 4; i++) {
		uint64_t value = kvm_stat(vm.fd, counters[i]);

		if (value)
			note("%s is %lu", counters[i], value);
		left += value;
	}
	ok(!left, "without slots nothing is mapped, by KVM's counters");
	vm_destroy(&vm);
	munmap(base, SIZE);
	ok(references_are_back(), "the modules' reference counts are back");
}

int main(int argc, char **argv)
{
	uint64_t seed, end = 0, begun = now_ms(), phases = 0;
	char nx_huge_pages[8] = "", eager_split[8] = "";
	int option;

	must(getrandom(&seed, sizeof(seed), 0));
	while ((option = getopt(argc, argv, "n:t:s:")) != -1) {
		if (option == 'n')
			operations = strtoul(optarg, NULL, 0);
		else if (option == 't')
			end = begun + 1000 * strtoul(optarg, NULL, 0);
		else if (option == 's')
			seed = strtoul(optarg, NULL, 0);
		else
			bail("usage: concurrency [-n OPERATIONS] [-t SECONDS] [-s SEED]");
	}
	plan(5);
	random_state = seed | 1;
	note("seed 0x%lx", seed);
	read_word(KVM_PARAMETERS "eager_page_split", eager_split, sizeof(eager_split));
	read_word(KVM_PARAMETERS "nx_huge_pages", nx_huge_pages, sizeof(nx_huge_pages));
	if (!trouble_start())
		note("there is no swap, or no merging of pages");
	create();
	do {
		phase(true);
		phase(false);
		phases += 2;
	} while (!wrong() && !mismatches && !area.late_stores && now_ms() < end);
	trouble_calm(&area);
	trouble_stop();
	tell_wrong();
	note("%lu phases, %lu steps, %lu failed KVM_RUN, %lu accesses by user space, %lu ms", phases, steps(),
	     (unsigned long)failed_runs, (unsigned long)accesses, now_ms() - begun);
	for (int kind = 0; kind < trouble_kinds(); kind++)
		note("%s: %lu times", trouble_name(kind), troubles[kind]);
	if (impossible)
		note("%lu operations are not possible on this kernel", impossible);
	ok(!wrong(), "the guest found every page to be the right one, with what it had stored");
	ok(!mismatches, "so did the host");
	ok(!area.late_stores, "no store arrived at memory that had been moved away");
	check_end();
	write_file(KVM_PARAMETERS "eager_page_split", eager_split);
	write_file(KVM_PARAMETERS "nx_huge_pages", nx_huge_pages);
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Faults that meet an invalidation: the host takes pages, or a slot, away while a vCPU faults on them, or on their
 * neighbours. A fault that found them before must not map them any more. What is checked holds for every order of things;
 * what makes the order that matters likely is a vCPU that is slow to take locks, or an invalidation that takes long.
 */
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "host.h"
#include "vm.h"

#define ROUNDS		200
#define RANGE		MIB
/* The thread that this module of ours makes slow to take locks. */
#define SLOW_THREAD	"rmmu-slow"
#define SLOW_LOCK	"/selftests/modules/slow_lock.ko"

/* Each invalidation is of a chunk but for its last pages; the first of these is faulted on. */
#define CHUNKS		32UL
#define CHUNK_SIZE	(4 * MIB)
#define CHUNK_KEEPS	8UL
#define CHUNK_ENDS	(CHUNK_SIZE / PAGE_SIZE - CHUNK_KEEPS)

/* On the shared page. */
struct talk {
	uint64_t stop, count;		/* of stores */
	uint64_t begun, ended;		/* invalidations */
};

static guest_code void store_numbers(uint64_t shared)
{
	volatile struct talk *talk = (void *)shared;

	for (uint64_t count = 1; !talk->stop; count++) {
		store(VM_TEST_GPA, count);
		talk->count = count;
	}
	guest_sync(1);
}

/* Loads the page behind the range that is going away, and when that is gone, what was before it. */
static guest_code void load_behind(uint64_t shared)
{
	volatile struct talk *talk = (void *)shared;
	uint32_t stale = 0;

	for (uint64_t chunk = 0; chunk < CHUNKS; chunk++) {
		uint64_t behind = VM_TEST_GPA + chunk * CHUNK_SIZE + CHUNK_ENDS * PAGE_SIZE;

		while (talk->begun <= chunk)
			guest_pause();
		for (uint64_t i = 0; i < chunk * 1000; i++)
			guest_pause();
		load(behind);
		while (talk->ended <= chunk)
			guest_pause();
		for (uint64_t page = 1; page <= CHUNK_KEEPS; page++)
			stale += load(behind - page * PAGE_SIZE) != 0;
	}
	guest_sync(stale);
}

static struct vm vm;
static volatile struct talk *talk;
static uint32_t said;

static void *run_to_sync(void *vcpu)
{
	must(prctl(PR_SET_NAME, SLOW_THREAD));
	said = vcpu_run_to_sync(vcpu);
	return NULL;
}

/* A VM with this memory, and a vCPU that runs `code`, by `run` on a thread of its own. */
static pthread_t begin(uint8_t *base, uint64_t size, void *(*run)(void *), void (*code)(uint64_t))
{
	pthread_t thread;

	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, size, base, 0));
	talk = vm.shared;
	if (pthread_create(&thread, NULL, run, vm_vcpu(&vm, code, VM_SHARED_GPA)))
		bail("pthread_create failed");
	return thread;
}

static void end(pthread_t thread)
{
	pthread_join(thread, NULL);
	vm_destroy(&vm);
}

/*
 * Discards a page that a vCPU stores to all the time, and sees whether what is stored later arrives in the page that is there
 * then. It is discarded twice: the vCPU has looked at the page for the first fault, and is on its way to mmu_lock, when that
 * is taken away. `resident`: the host has one there before the vCPU asks for it.
 */
static uint64_t lost_stores(bool resident)
{
	uint8_t *base = memory(RANGE, false), *page = base + RANGE - PAGE_SIZE;
	uint64_t lost = 0;
	pthread_t runner;

	runner = begin(page, PAGE_SIZE, run_to_sync, store_numbers);
	for (int round = 0; round < ROUNDS; round++) {
		uint64_t count, deadline = deadline_ms(60000);

		memset(base, 0x77, RANGE - PAGE_SIZE);
		must(madvise(page, PAGE_SIZE, MADV_DONTNEED));
		if (resident)
			*(volatile uint64_t *)(page + 8) = round;
		spin_us(round % 16 * 20);
		/* The page comes last in a range that takes a while. */
		must(madvise(base, RANGE, MADV_DONTNEED));
		count = talk->count;
		/* The second store from here began after the page was gone. */
		while (talk->count < count + 2)
			if (now_ms() > deadline)
				bail("the guest does not go on");
		lost += *(volatile uint64_t *)page < count + 2;
	}
	talk->stop = 1;
	end(runner);
	munmap(base, RANGE);
	return lost;
}

static volatile uint64_t mmio_exits, mmio_answered;

/* As run_to_sync(), for a guest that stores to a slot that comes and goes. */
static void *run_mmio(void *argument)
{
	struct vcpu *vcpu = argument;

	while (vcpu_run(vcpu) == 0 && vcpu->run->exit_reason == KVM_EXIT_MMIO) {
		mmio_exits++;
		while (mmio_answered < mmio_exits)
			sched_yield();
	}
	if (!exit_is_sync(vcpu, 1))
		bail("the guest ended otherwise");
	return NULL;
}

/* Deletes the slot that a vCPU stores to all the time, and counts how often the vCPU does not notice. */
static uint64_t stores_to_no_slot(void)
{
	uint8_t *base = memory(PAGE_SIZE, false);
	uint64_t unnoticed = 0;
	pthread_t runner = begin(base, PAGE_SIZE, run_mmio, store_numbers);

	for (int round = 0; round < ROUNDS; round++) {
		uint64_t count = talk->count, exits = mmio_exits, deadline = deadline_ms(60000);

		while (talk->count == count)
			if (now_ms() > deadline)
				bail("the guest does not go on");
		must(vm_slot(&vm, 1, VM_TEST_GPA, 0, NULL, 0));
		count = talk->count;
		/* The second store from here began after the slot was gone. */
		while (mmio_exits == exits && talk->count < count + 2)
			if (now_ms() > deadline)
				bail("the guest neither stores nor exits");
		unnoticed += mmio_exits == exits;
		must(vm_slot(&vm, 1, VM_TEST_GPA, PAGE_SIZE, base, 0));
		mmio_answered = mmio_exits;
	}
	talk->stop = 1;
	end(runner);
	munmap(base, PAGE_SIZE);
	return unnoticed;
}

static uint32_t stale_neighbours(void)
{
	uint8_t *base = memory(CHUNKS * CHUNK_SIZE, false);
	pthread_t runner;

	memset(base, 0x77, CHUNKS * CHUNK_SIZE);
	runner = begin(base, CHUNKS * CHUNK_SIZE, run_to_sync, load_behind);
	for (uint64_t chunk = 0; chunk < CHUNKS; chunk++) {
		talk->begun = chunk + 1;
		must(madvise(base + chunk * CHUNK_SIZE, CHUNK_ENDS * PAGE_SIZE, MADV_DONTNEED));
		talk->ended = chunk + 1;
	}
	end(runner);
	munmap(base, CHUNKS * CHUNK_SIZE);
	return said;
}

int main(void)
{
	uint64_t lost, unnoticed;
	uint32_t stale;

	plan(4);
	must(load_module(SLOW_LOCK, "comm=" SLOW_THREAD " us=150"));
	lost = lost_stores(false);
	ok(lost == 0, "stores go to the page that the vCPU brings in after the last one was discarded (%lu of %d do not)", lost,
	   ROUNDS);
	lost = lost_stores(true);
	ok(lost == 0, "and to one that is there already (%lu of %d do not)", lost, ROUNDS);
	must(unload_module("slow_lock"));
	stale = stale_neighbours();
	ok(stale == 0, "pages that were going away when a neighbour was mapped are gone (%u are not)", stale);
	unnoticed = stores_to_no_slot();
	ok(unnoticed == 0, "stores to a slot that was deleted are MMIO (%lu of %d times they are not)", unnoticed, ROUNDS);
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Faults that meet an invalidation: the host takes pages away while a vCPU faults on them, or on their neighbours. A fault
 * that found the page before must not map it any more. What is checked holds for every order of things; what makes the
 * order that matters likely is a vCPU that is slow to take locks, or an invalidation that takes long.
 */
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

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

static void *run(void *vcpu)
{
	must(prctl(PR_SET_NAME, SLOW_THREAD));
	said = vcpu_run_to_sync(vcpu);
	return NULL;
}

static pthread_t start(void *(*function)(void *), void *argument)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, function, argument))
		bail("pthread_create failed");
	return thread;
}

static void begin(uint8_t *base, uint64_t size)
{
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, size, base, 0));
	talk = vm.shared;
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

	begin(page, PAGE_SIZE);
	runner = start(run, vm_vcpu(&vm, store_numbers, VM_SHARED_GPA));
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
	pthread_join(runner, NULL);
	vm_destroy(&vm);
	munmap(base, RANGE);
	return lost;
}

static uint32_t stale_neighbours(void)
{
	uint8_t *base = memory(CHUNKS * CHUNK_SIZE, false);
	pthread_t runner;

	memset(base, 0x77, CHUNKS * CHUNK_SIZE);
	begin(base, CHUNKS * CHUNK_SIZE);
	runner = start(run, vm_vcpu(&vm, load_behind, VM_SHARED_GPA));
	for (uint64_t chunk = 0; chunk < CHUNKS; chunk++) {
		talk->begun = chunk + 1;
		must(madvise(base + chunk * CHUNK_SIZE, CHUNK_ENDS * PAGE_SIZE, MADV_DONTNEED));
		talk->ended = chunk + 1;
	}
	pthread_join(runner, NULL);
	vm_destroy(&vm);
	munmap(base, CHUNKS * CHUNK_SIZE);
	return said;
}

static void slow_lock(void)
{
	int fd = must(open(SLOW_LOCK, O_RDONLY | O_CLOEXEC));

	must(syscall(SYS_finit_module, fd, "comm=" SLOW_THREAD " us=150", 0));
	close(fd);
}

int main(void)
{
	uint64_t lost;
	uint32_t stale;

	plan(3);
	slow_lock();
	lost = lost_stores(false);
	ok(lost == 0, "stores go to the page that the vCPU brings in after the last one was discarded (%lu of %d do not)", lost,
	   ROUNDS);
	lost = lost_stores(true);
	ok(lost == 0, "and to one that is there already (%lu of %d do not)", lost, ROUNDS);
	must(syscall(SYS_delete_module, "slow_lock", 0));
	stale = stale_neighbours();
	ok(stale == 0, "pages that were going away when a neighbour was mapped are gone (%u are not)", stale);
	return finish();
}

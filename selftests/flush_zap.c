// SPDX-License-Identifier: GPL-2.0
/*
 * A vCPU changes entries of its tables, flushes, and must see what they say now, although another vCPU makes KVM give up
 * the root of those tables meanwhile.
 *
 *   flush_zap [-n ROUNDS]
 *
 * Under shadow paging a flush asks whether anything below the root is to be brought up to date. The answer must be yes
 * until a zap of the root has taken all that is stale out of reach. What is checked holds for every order of the two; how
 * often they meet is up to the machine, so there are many rounds, with tables enough that most of the time goes into what
 * can go wrong.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "audit.h"
#include "host.h"
#include "tap.h"
#include "vm.h"

#define SLOT		1
#define MEM		VM_TEST_GPA
#define MEM_SIZE	(4 * MIB)
#define ROOT		MEM
#define OTHER_ROOT	(MEM + PAGE_SIZE)
#define POINTERS	(MEM + 2 * PAGE_SIZE)
#define DIRECTORY	(MEM + 3 * PAGE_SIZE)
/* As many as KVM brings up to date at a time. */
#define NR_TABLES	16UL
#define TABLE(i)	(MEM + (16 + (i)) * PAGE_SIZE)
/* What the changing entries lead to: a page that says 1, or one that says 2. */
#define PAGE(value)	(MEM + (64 + (value)) * PAGE_SIZE)
#define DATA(entry)	(MEM + (128 + (entry)) * PAGE_SIZE)
/* What the tables map begins at the second entry of the root. */
#define ADDRESS(i)	((1UL << 39) + (i) * HUGE_SIZE)
#define CHANGING	511UL
#define ENTRY		0x67UL
/* An entry of the root that leads nowhere. */
#define UNUSED		300
/*
 * KVM gives up a table above the last level that was written to three times without being used; each fault of the
 * victim uses it.
 */
#define FLOOD		64
/* How often the victim flushes after that. */
#define STEPS		2

struct shared {
	uint64_t rounds;
	uint64_t round;			/* what the victim is at */
	uint64_t attacked;		/* what the attacker is done with */
	uint64_t quit;
	uint64_t flushes;
	uint64_t lost, first_lost;
};

static guest_code void victim(uint64_t shared)
{
	volatile struct shared *s = (void *)shared;

	for (uint64_t round = 1; round <= s->rounds; round++) {
		/* Much to zap: entries of each table are in use, and each table is unsync. */
		for (uint64_t i = 0; i < NR_TABLES; i++) {
			for (uint64_t entry = 0; entry < 512; entry += 8)
				load(ADDRESS(i) + entry * PAGE_SIZE);
			store(TABLE(i) + 8, DATA(1) | ENTRY);
		}
		s->round = round;
		/* The last table is zapped last: until then a flush has to bring it up to date. */
		for (uint64_t value = 1; s->attacked != round; value = 3 - value) {
			store(TABLE(NR_TABLES - 1) + CHANGING * 8, PAGE(value) | ENTRY);
			guest_flush();
			s->flushes++;
			if (load(ADDRESS(NR_TABLES - 1) + CHANGING * PAGE_SIZE) != value && !s->lost++)
				s->first_lost = round;
		}
	}
	s->quit = 1;
	guest_sync(1);
}

static guest_code void attacker(uint64_t shared)
{
	volatile struct shared *s = (void *)shared;
	uint64_t seen = 0, seed = 0x123456789abcdefUL;

	for (;;) {
		while (s->round == seen && !s->quit)
			guest_pause();
		if (s->quit)
			break;
		seen = s->round;
		/* Anywhere in what the victim does. */
		for (uint64_t wait = next_random(&seed) % (1 << (next_random(&seed) % 20)); wait; wait--)
			__asm__ volatile("" : : : "memory");
		for (int i = 0; i < FLOOD; i++)
			store(ROOT + UNUSED * 8, 0);
		for (uint64_t flushes = s->flushes + STEPS; s->flushes < flushes; )
			guest_pause();
		s->attacked = seen;
	}
	guest_sync(2);
}

static struct vm vm;

static void *run(void *vcpu)
{
	return (void *)(uintptr_t)vcpu_run_to_sync(vcpu);
}

/* A vCPU with a root of its own, and the identity map below it. */
static struct vcpu *new_vcpu(void (*code)(uint64_t), uint8_t *base, uint64_t root)
{
	struct vcpu *vcpu = vm_vcpu(&vm, code, VM_SHARED_GPA);
	struct kvm_sregs sregs;

	must(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs));
	*(uint64_t *)(base + root - MEM) = *(uint64_t *)(vm.low + sregs.cr3);
	sregs.cr3 = root;
	must(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs));
	return vcpu;
}

static void make_tables(uint8_t *base)
{
	((uint64_t *)(base + ROOT - MEM))[1] = POINTERS | ENTRY;
	*(uint64_t *)(base + POINTERS - MEM) = DIRECTORY | ENTRY;
	for (uint64_t i = 0; i < NR_TABLES; i++) {
		uint64_t *table = (void *)(base + TABLE(i) - MEM);

		((uint64_t *)(base + DIRECTORY - MEM))[i] = TABLE(i) | ENTRY;
		for (uint64_t entry = 0; entry < 512; entry++)
			table[entry] = DATA(entry) | ENTRY;
	}
	for (uint64_t value = 1; value <= 2; value++)
		*(uint64_t *)(base + PAGE(value) - MEM) = value;
}

int main(int argc, char **argv)
{
	uint64_t rounds = 300, zapped;
	struct shared *s;
	uint8_t *base;
	pthread_t threads[2];
	void *said[2];
	struct vcpu *vcpus[2];

	if (argc == 3 && !strcmp(argv[1], "-n"))
		rounds = strtoull(argv[2], NULL, 0);
	else if (argc != 1)
		bail("usage: %s [-n ROUNDS]", argv[0]);
	if (kvm_paging() != SHADOW)
		skip_all("KVM does not shadow the guest's tables");
	plan(3);
	vm_create(&vm);
	base = memory(MEM_SIZE, false);
	memset(base, 0, MEM_SIZE);
	must(vm_slot(&vm, SLOT, MEM, MEM_SIZE, base, 0));
	s = vm.shared;
	*s = (struct shared) { .rounds = rounds };
	vcpus[0] = new_vcpu(victim, base, ROOT);
	vcpus[1] = new_vcpu(attacker, base, OTHER_ROOT);
	make_tables(base);
	zapped = kvm_stat(vm.fd, "mmu_flooded");
	for (int i = 0; i < 2; i++)
		if (pthread_create(&threads[i], NULL, run, vcpus[i]))
			bail("pthread_create failed");
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], &said[i]);
	zapped = kvm_stat(vm.fd, "mmu_flooded") - zapped;
	audit("at the end");
	ok(said[0] == (void *)1UL && said[1] == (void *)2UL, "both vCPUs come to their end");
	ok(zapped > 0, "the root was given up in %" PRIu64 " of %" PRIu64 " rounds", zapped, rounds);
	ok(!s->lost, "%" PRIu64 " of %" PRIu64 " flushes were lost", s->lost, s->flushes);
	if (s->lost)
		note("the first one in round %" PRIu64, s->first_lost);
	vm_destroy(&vm);
	munmap(base, MEM_SIZE);
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * A vCPU that stays in guest mode while its mappings change under it.
 *
 * An emulated CPU forgets its whole TLB at every exit from the guest, so a forgotten TLB flush
 * shows only until the next one, some milliseconds at most. Each check therefore asks, right
 * after the host's call returned, whether the guest can still reach what it must not reach any
 * more, and does so many times.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "host.h"
#include "vm.h"

#define SIZE	(4 * MIB)
#define TRIES	60
/* Longer than a store loop of the guest needs, shorter than a timer tick. */
#define LOOK_US	300

struct control {
	uint64_t alive;
};

/* Store a growing number to one word for ever, with a sign of life on another page. */
static guest_code void store_for_ever(uint64_t shared)
{
	volatile struct control *control = (void *)shared;

	for (uint64_t count = 1;; count++) {
		store(VM_TEST_GPA + 64, count);
		control->alive = count;
	}
}

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *base;
static _Atomic int run_errno, run_exit;
static _Atomic bool stopping;

static void *run(void *unused)
{
	int ret;

	(void)unused;
	do {
		ret = vcpu_run(vcpu);
	} while (!ret && vcpu->run->exit_reason == KVM_EXIT_MMIO && !stopping);
	run_errno = ret ? errno : 0;
	run_exit = vcpu->run->exit_reason;
	return NULL;
}

static pthread_t start(void)
{
	pthread_t thread;

	run_errno = run_exit = 0;
	stopping = false;
	if (pthread_create(&thread, NULL, run, NULL))
		bail("pthread_create failed");
	return thread;
}

static volatile uint64_t *word(uint8_t *memory)
{
	return (volatile uint64_t *)(memory + 64);
}

static uint64_t alive(void)
{
	return ((volatile struct control *)vm.shared)->alive;
}

/*
 * Until the guest stores again; false when it does not within a minute. While nothing was there it may have failed with
 * EFAULT, and tell so late: then it goes on.
 */
static bool stores_arrive(uint8_t *memory, pthread_t *thread)
{
	uint64_t deadline = deadline_ms(60000), old = *word(memory);

	while (*word(memory) == old) {
		if (run_errno == EFAULT) {
			pthread_join(*thread, NULL);
			*thread = start();
		}
		if (now_ms() > deadline)
			return false;
	}
	return true;
}

static void create(bool huge)
{
	base = memory(SIZE, huge);
	memset(base, 0, SIZE);
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	vcpu = vm_vcpu(&vm, store_for_ever, VM_SHARED_GPA);
}

/* Ends the vCPU's thread by taking the memory away for good. */
static void destroy(pthread_t thread)
{
	stopping = true;
	must(vm_slot(&vm, 1, 0, 0, NULL, 0));
	pthread_join(thread, NULL);
	vm_destroy(&vm);
	munmap(base, SIZE);
}

static void check_remap(bool huge)
{
	const char *kind = huge ? "2M" : "4K";
	int stale = 0, lost = 0;
	pthread_t thread;

	create(huge);
	thread = start();
	for (int i = 0; i < TRIES; i++) {
		uint8_t *away = memory(SIZE, huge), *fresh = memory(SIZE, huge);
		uint64_t before;

		memset(fresh, 0, SIZE);
		lost += !stores_arrive(base, &thread);
		/* The guest's page moves away; from the return of this call on no store may reach it. */
		if (mremap(base, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, away) == MAP_FAILED)
			bail("mremap: %m");
		before = *word(away);
		spin_us(LOOK_US);
		stale += *word(away) != before;
		if (mremap(fresh, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, base) == MAP_FAILED)
			bail("mremap: %m");
		munmap(away, SIZE);
	}
	ok(!stale, "%s: no store reaches memory that was moved away (%d of %d did)", kind, stale, TRIES);
	ok(!lost, "%s: and stores reach what was put in its place", kind);
	destroy(thread);
}

static bool is_logged_dirty(void)
{
	uint64_t bits[SIZE / PAGE_SIZE / 64];
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bits };

	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	return bits[0] & 1;
}

static bool is_logged_dirty_by(uint64_t deadline, bool logged)
{
	while (!logged && now_ms() < deadline)
		logged = is_logged_dirty();
	return logged;
}

static void check_dirty_log(bool huge)
{
	const char *kind = huge ? "2M" : "4K";
	int missed = 0, dirty = 0, lost = 0;
	pthread_t thread;

	create(huge);
	thread = start();
	lost += !stores_arrive(base, &thread);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, KVM_MEM_LOG_DIRTY_PAGES));
	for (int i = 0; i < TRIES * 5; i++) {
		uint64_t before, after;
		bool logged;

		is_logged_dirty();
		/*
		 * Reported and write-protected, or clean: whatever is stored from here on must be reported again.
		 * With PML by the time the vCPU has left the guest, which KVM asks it to and does not wait for. A CPU
		 * that still has the page for dirty writes nothing down, and then no log ever has it.
		 */
		before = *word(base);
		spin_us(LOOK_US);
		after = *word(base);
		logged = is_logged_dirty();
		if (kvm_has_pml() && before != after)
			logged = is_logged_dirty_by(deadline_ms(2000), logged);
		missed += before != after && !logged;
		dirty += logged;
	}
	lost += !stores_arrive(base, &thread);
	ok(!missed && dirty, "%s: every store after a dirty log is in %s (missed %d, dirty %d times)",
	   kind, kvm_has_pml() ? "a later one" : "the next one", missed, dirty);
	ok(!lost, "%s: the guest went on storing meanwhile", kind);
	destroy(thread);
}

static void check_protect(void)
{
	int stale = 0, lost = 0, errors = 0;
	pthread_t thread;

	create(false);
	thread = start();
	for (int i = 0; i < TRIES; i++) {
		uint64_t before;

		lost += !stores_arrive(base, &thread);
		must(mprotect(base, SIZE, PROT_READ));
		before = *word(base);
		spin_us(LOOK_US);
		stale += *word(base) != before;
		pthread_join(thread, NULL);
		errors += run_errno == EFAULT;
		must(mprotect(base, SIZE, PROT_READ | PROT_WRITE));
		thread = start();
	}
	ok(!stale, "no store reaches memory that was made read-only (%d of %d did)", stale, TRIES);
	ok(errors == TRIES, "the spinning vCPU fails with EFAULT instead (%d of %d times)", errors, TRIES);
	ok(!lost, "and goes on when it is writable again");
	destroy(thread);
}

static void check_slot(void)
{
	int stale = 0, lost = 0;
	pthread_t thread;

	create(false);
	thread = start();
	for (int i = 0; i < TRIES; i++) {
		uint64_t before;

		lost += !stores_arrive(base, &thread);
		must(vm_slot(&vm, 1, 0, 0, NULL, 0));
		before = *word(base);
		spin_us(LOOK_US);
		stale += *word(base) != before;
		lost += alive() == 0;
		must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	}
	ok(!stale, "no store reaches the memory of a deleted slot (%d of %d did)", stale, TRIES);
	ok(!lost, "and stores arrive when the slot is back");
	destroy(thread);
}

int main(void)
{
	plan(13);
	check_remap(false);
	check_remap(true);
	check_dirty_log(false);
	check_dirty_log(true);
	check_protect();
	check_slot();
	return finish();
}

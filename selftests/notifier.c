// SPDX-License-Identifier: GPL-2.0
/*
 * What happens to the host's mapping must happen to the guest's: discarding, write
 * protection, remapping, copy-on-write after fork, page merging, huge pages made and split; and its end.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define SIZE	(4 * MIB)
#define PAGES	(SIZE / PAGE_SIZE)

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

struct order {
	uint64_t write, value;
};

/* Write a value of its own to every page, or check that every page has it. */
static guest_code void whole_memory(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		uint32_t wrong = 0;

		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE) {
			if (order->write)
				store(VM_TEST_GPA + at, order->value + at);
			else
				wrong += load(VM_TEST_GPA + at) != order->value + at;
		}
		guest_sync(wrong);
	}
}

static guest_code void count_nonzero(uint64_t shared)
{
	(void)shared;
	for (;;) {
		uint32_t nonzero = 0;

		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
			nonzero += load(VM_TEST_GPA + at) != 0;
		guest_sync(nonzero);
	}
}

static struct vm vm;
static struct vcpu *worker, *counter;
static uint8_t *base;

static void guest_writes(uint64_t value)
{
	*(struct order *)vm.shared = (struct order){ 1, value };
	vcpu_run_to_sync(worker);
}

static uint32_t guest_mismatches(uint64_t value)
{
	*(struct order *)vm.shared = (struct order){ 0, value };
	return vcpu_run_to_sync(worker);
}

static bool host_sees(const uint8_t *where, uint64_t value)
{
	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		if (*(uint64_t *)(where + at) != value + at)
			return false;
	return true;
}

static void check_discard(void)
{
	guest_writes(1000);
	must(madvise(base, SIZE, MADV_DONTNEED));
	ok(vcpu_run_to_sync(counter) == 0, "discarded memory (MADV_DONTNEED) reads as zeroes");
	guest_writes(2000);
	must(madvise(base + SIZE / 2, PAGE_SIZE, MADV_DONTNEED));
	ok(vcpu_run_to_sync(counter) == PAGES - 1, "one discarded page is the only one that does");
}

static void check_write_protection(void)
{
	int ret;

	guest_writes(3000);
	must(mprotect(base, SIZE, PROT_READ));
	ok(guest_mismatches(3000) == 0, "memory the host made read-only can be read");
	*(struct order *)vm.shared = (struct order){ 1, 4000 };
	ret = vcpu_run(worker);
	ok(ret < 0 && errno == EFAULT, "a store into it fails KVM_RUN with EFAULT");
	ok(host_sees(base, 3000), "and changes nothing");
	must(mprotect(base, SIZE, PROT_NONE));
	ret = vcpu_run(counter);
	ok(ret < 0 && errno == EFAULT, "memory without any access fails KVM_RUN with EFAULT");
	must(mprotect(base, SIZE, PROT_READ | PROT_WRITE));
	vcpu_run_to_sync(worker);
	vcpu_run_to_sync(counter);
	ok(host_sees(base, 4000), "made writable again the same store succeeds");
}

static void check_remap(void)
{
	uint8_t *other = memory(SIZE, false), *away = memory(SIZE, false);

	guest_writes(5000);
	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		*(uint64_t *)(other + at) = 6000 + at;
	if (mremap(base, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, away) == MAP_FAILED ||
	    mremap(other, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, base) == MAP_FAILED)
		bail("mremap: %m");
	ok(guest_mismatches(6000) == 0, "other memory moved to the slot's address is what the guest sees");
	guest_writes(7000);
	ok(host_sees(away, 5000) && host_sees(base, 7000), "the old memory is out of the guest's reach");
	munmap(away, SIZE);
}

static void check_copy_on_write(void)
{
	int go[2], status;
	bool parent_right;
	pid_t child;
	char byte;

	guest_writes(8000);
	must(pipe(go));
	fflush(stdout);
	child = must(fork());
	if (!child) {
		/* Until told that the guest wrote. */
		close(go[1]);
		_exit(read(go[0], &byte, 1) == 1 && host_sees(base, 8000) ? 0 : 1);
	}
	guest_writes(9000);
	parent_right = host_sees(base, 9000);
	must(write(go[1], "x", 1));
	must(waitpid(child, &status, 0));
	ok(parent_right, "after fork the guest's stores go to the parent");
	ok(WIFEXITED(status) && WEXITSTATUS(status) == 0, "and never to the child");
	guest_writes(9100);
	ok(host_sees(base, 9100), "after the child ended the guest goes on");
	close(go[0]);
	close(go[1]);
}

static void check_merging(void)
{
	uint64_t deadline = deadline_ms(20000);

	if (!write_file(KSM_DIR "pages_to_scan", "5000") || !write_file(KSM_DIR "sleep_millisecs", "5") ||
	    !write_file(KSM_DIR "run", "1")) {
		skip("pages merged by KSM", "the kernel has no KSM");
		skip("a store after merging", "the kernel has no KSM");
		skip("unmerging", "the kernel has no KSM");
		return;
	}
	memset(base, 0xab, SIZE);
	/* Mapped writable in the guest before they become one page. */
	vcpu_run_to_sync(counter);
	must(madvise(base, SIZE, MADV_MERGEABLE));
	while (read_number(KSM_DIR "pages_sharing") < PAGES / 2 && now_ms() < deadline)
		usleep(20000);
	ok(read_number(KSM_DIR "pages_sharing") >= PAGES / 2 && vcpu_run_to_sync(counter) == PAGES,
	   "the guest reads pages that KSM merged");
	guest_writes(10000);
	ok(host_sees(base, 10000) && base[PAGE_SIZE - 1] == 0xab, "a store takes a merged page apart");
	must(madvise(base, SIZE, MADV_UNMERGEABLE));
	write_file(KSM_DIR "run", "2");
	ok(guest_mismatches(10000) == 0, "unmerging changes nothing");
	write_file(KSM_DIR "run", "0");
}

static void check_huge_pages(void)
{
	guest_writes(11000);
	must(madvise(base, SIZE, MADV_HUGEPAGE));
	if (madvise(base, SIZE, MADV_COLLAPSE))
		note("MADV_COLLAPSE: %m");
	ok(guest_mismatches(11000) == 0, "collapsing into huge pages keeps the contents");
	guest_writes(11500);
	ok(kvm_stat(vm.fd, "pages_2m") > 0, "the guest's memory is mapped huge then");
	must(madvise(base + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED));
	ok(vcpu_run_to_sync(counter) == PAGES - 1 && guest_mismatches(11500) == 1,
	   "splitting one by discarding a small page takes only that");
	must(mprotect(base + HUGE_SIZE, PAGE_SIZE, PROT_READ));
	ok(guest_mismatches(11500) == 1, "and protecting one small page changes no contents");
	must(mprotect(base + HUGE_SIZE, PAGE_SIZE, PROT_READ | PROT_WRITE));
	guest_writes(12000);
	ok(host_sees(base, 12000), "after that every page can be written");
}

/*
 * A VM outlives the process that made it, in another that has its file: then its memory is gone, and nothing may
 * be mapped any more.
 */
static void check_owner_gone(void)
{
	int gone[2], found[2], status, stats;
	uint64_t pages = ~0UL, deadline;
	pid_t owner;

	must(pipe(gone));
	must(pipe(found));
	fflush(stdout);
	owner = must(fork());
	if (!owner) {
		vm_create(&vm);
		must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, memory(SIZE, false), 0));
		worker = vm_vcpu(&vm, whole_memory, VM_SHARED_GPA);
		stats = must(ioctl(vm.fd, KVM_GET_STATS_FD, 0));
		if (!must(fork())) {
			/* The heir. The kernel may keep the owner's memory a little longer than its files. */
			close(gone[1]);
			must(read(gone[0], &status, 1));
			deadline = deadline_ms(20000);
			while ((pages = kvm_stat_of(stats, "pages_4k")) && now_ms() < deadline)
				usleep(1000);
			must(write(found[1], &pages, sizeof(pages)));
			_exit(0);
		}
		guest_writes(13000);
		_exit(kvm_stat_of(stats, "pages_4k") >= PAGES ? 0 : 1);
	}
	close(gone[1]);
	close(found[1]);
	must(waitpid(owner, &status, 0));
	if (read(found[0], &pages, sizeof(pages)) != sizeof(pages))
		bail("the heir of the VM died");
	ok(WIFEXITED(status) && WEXITSTATUS(status) == 0 && pages == 0,
	   "when the process ends nothing is mapped in a VM that lives on (%lu pages are)", pages);
	close(gone[0]);
	close(found[0]);
}

int main(void)
{
	plan(21);
	check_owner_gone();
	base = memory(SIZE, false);
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	worker = vm_vcpu(&vm, whole_memory, VM_SHARED_GPA);
	counter = vm_vcpu(&vm, count_nonzero, VM_SHARED_GPA);
	check_discard();
	check_write_protection();
	check_remap();
	check_copy_on_write();
	check_merging();
	check_huge_pages();
	vm_destroy(&vm);
	return finish();
}

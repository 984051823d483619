// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of every kind of VMA, read and written by a guest through slots that may be written and that may not: a VM of rmmu's
 * ends each access as one of in-tree KVM's does, with the same value, exit or errno.
 *
 * rmmu looks at the host's page table where in-tree KVM asks for the page, and what the VMA forbids need not show there.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE	0x08
#endif
#define OWN		"/sys/module/kvm_rmmu/parameters/own_new_vms"
#define STATS		"/sys/kernel/debug/rmmu/stats"

#define PAGES		4UL
#define SIZE		(PAGES * PAGE_SIZE)
/* Memory that is there in the plainest way. A vCPU that finds it there expects to find the next page, too. */
#define PLAIN_GPA	(VM_TEST_GPA + HUGE_SIZE)
#define VALUE		0x5eedUL

enum { SLOT = 1, PLAIN_SLOT };

/* In the shared page. */
struct order {
	uint64_t gpa, write, loaded;
};

static guest_code void obey(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	load(PLAIN_GPA);
	order->loaded = load(order->gpa);
	if (order->write)
		store(order->gpa, order->write);
	guest_sync(1);
}

static guest_code void obey_write(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	load(PLAIN_GPA);
	store(order->gpa, order->write);
	guest_sync(2);
}

/* Makes the memory at an address that is reserved for it; false where the kernel has no such memory. */
struct kind {
	const char *name;
	bool (*make)(uint8_t *at);
};

static void *map(uint8_t *at, size_t size, int prot, int flags, int fd)
{
	return mmap(at, size, prot, flags | MAP_FIXED, fd, 0);
}

static void fill(uint8_t *at)
{
	for (unsigned long page = 0; page < PAGES; page++)
		*(uint64_t *)(at + page * PAGE_SIZE) = VALUE + page;
}

static bool anonymous(uint8_t *at, int touched_as, int prot)
{
	must(map(at, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1) == MAP_FAILED ? -1 : 0);
	if (touched_as)
		fill(at);
	must(mprotect(at, SIZE, prot));
	return true;
}

static bool fresh(uint8_t *at) { return anonymous(at, 0, PROT_READ | PROT_WRITE); }
static bool plain(uint8_t *at) { return anonymous(at, 1, PROT_READ | PROT_WRITE); }
static bool read_only(uint8_t *at) { return anonymous(at, 1, PROT_READ); }
static bool none(uint8_t *at) { return anonymous(at, 1, PROT_NONE); }
static bool write_only(uint8_t *at) { return anonymous(at, 1, PROT_WRITE); }
static bool exec_only(uint8_t *at) { return anonymous(at, 1, PROT_EXEC); }
static bool read_exec(uint8_t *at) { return anonymous(at, 1, PROT_READ | PROT_EXEC); }

static bool zero_page(uint8_t *at)
{
	fresh(at);
	for (unsigned long page = 0; page < PAGES; page++)
		(void)*(volatile uint8_t *)(at + page * PAGE_SIZE);
	return true;
}

static bool discardable(uint8_t *at)
{
	plain(at);
	must(madvise(at, SIZE, MADV_FREE));
	return true;
}

/* Shared with a child that is there as long as the test: read-only until somebody writes. */
static pid_t child;

static bool copy_on_write(uint8_t *at, int prot)
{
	int ready[2];
	char byte;

	must(pipe(ready));
	plain(at);
	child = must(fork());
	if (!child) {
		(void)!write(ready[1], "", 1);
		pause();
		_exit(0);
	}
	must(read(ready[0], &byte, 1));
	close(ready[0]);
	close(ready[1]);
	must(mprotect(at, SIZE, prot));
	return true;
}

static bool forked(uint8_t *at) { return copy_on_write(at, PROT_READ | PROT_WRITE); }
static bool forked_write_only(uint8_t *at) { return copy_on_write(at, PROT_WRITE); }

static bool of_file(uint8_t *at, int flags, int prot, bool touch)
{
	int fd = must(memfd_create("vma_kinds", 0));
	uint64_t value = VALUE;

	must(ftruncate(fd, SIZE));
	for (unsigned long page = 0; page < PAGES; page++, value++)
		must(pwrite(fd, &value, sizeof(value), page * PAGE_SIZE));
	must(map(at, SIZE, prot, flags, fd) == MAP_FAILED ? -1 : 0);
	for (unsigned long page = 0; touch && page < PAGES; page++)
		if (prot & PROT_WRITE)
			/* Not by the program's own access: that may be refused. */
			must(madvise(at + page * PAGE_SIZE, PAGE_SIZE, MADV_POPULATE_WRITE));
		else if (prot & PROT_READ)
			must(madvise(at + page * PAGE_SIZE, PAGE_SIZE, MADV_POPULATE_READ));
	close(fd);
	return true;
}

static bool shared(uint8_t *at) { return of_file(at, MAP_SHARED, PROT_READ | PROT_WRITE, true); }
static bool shared_fresh(uint8_t *at) { return of_file(at, MAP_SHARED, PROT_READ | PROT_WRITE, false); }
static bool shared_read_only(uint8_t *at) { return of_file(at, MAP_SHARED, PROT_READ, true); }
static bool shared_write_only(uint8_t *at) { return of_file(at, MAP_SHARED, PROT_WRITE, true); }
static bool private_read_only(uint8_t *at) { return of_file(at, MAP_PRIVATE, PROT_READ, true); }
static bool private_unbroken(uint8_t *at)
{
	of_file(at, MAP_PRIVATE, PROT_READ, true);
	must(mprotect(at, SIZE, PROT_READ | PROT_WRITE));
	return true;
}

static bool private_exec_only(uint8_t *at)
{
	of_file(at, MAP_PRIVATE, PROT_READ, true);
	must(mprotect(at, SIZE, PROT_EXEC));
	return true;
}

static bool past_end(uint8_t *at)
{
	int fd = must(memfd_create("vma_kinds", 0));

	must(map(at, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd) == MAP_FAILED ? -1 : 0);
	close(fd);
	return true;
}

static bool secret(uint8_t *at)
{
	int fd = syscall(SYS_memfd_secret, 0);

	if (fd < 0)
		return false;
	must(ftruncate(fd, SIZE));
	must(map(at, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd) == MAP_FAILED ? -1 : 0);
	fill(at);
	close(fd);
	return true;
}

static bool droppable(uint8_t *at)
{
	if (map(at, SIZE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS, -1) == MAP_FAILED)
		return false;
	fill(at);
	return true;
}

static bool keyed(uint8_t *at, int rights)
{
	int key = pkey_alloc(0, rights);

	if (key < 0)
		return false;
	plain(at);
	must(pkey_mprotect(at, SIZE, PROT_READ | PROT_WRITE, key));
	/* The key stays: giving it back would not change what the memory says. */
	return true;
}

static bool key_no_access(uint8_t *at) { return keyed(at, PKEY_DISABLE_ACCESS); }
static bool key_no_write(uint8_t *at) { return keyed(at, PKEY_DISABLE_WRITE); }

static bool write_protected(uint8_t *at)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP };
	struct uffdio_register range = { .range = { (uintptr_t)at, SIZE }, .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect protect = { .range = { (uintptr_t)at, SIZE }, .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	/* Nobody reads it, so only reads are tried: see `reads_only`. It stays open with the memory. */
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		return false;
	plain(at);
	if (ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
		return false;
	must(ioctl(fd, UFFDIO_WRITEPROTECT, &protect));
	return true;
}

static bool device(uint8_t *at)
{
	int fd = open("/dev/zero", O_RDWR);

	if (fd < 0)
		return false;
	must(map(at, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd) == MAP_FAILED ? -1 : 0);
	close(fd);
	fill(at);
	return true;
}

/* The first half may be read, the second not: they are in one window. */
static bool half_write_only(uint8_t *at)
{
	of_file(at, MAP_SHARED, PROT_READ | PROT_WRITE, true);
	must(mprotect(at, SIZE / 2, PROT_READ));
	must(mprotect(at + SIZE / 2, SIZE / 2, PROT_WRITE));
	return true;
}

static bool half_exec_only(uint8_t *at)
{
	of_file(at, MAP_PRIVATE, PROT_READ, true);
	must(mprotect(at + SIZE / 2, SIZE / 2, PROT_EXEC));
	return true;
}

static bool hole(uint8_t *at)
{
	plain(at);
	must(munmap(at + SIZE / 2, SIZE / 2));
	return true;
}

static const struct kind kinds[] = {
	{ "anonymous, untouched", fresh },
	{ "anonymous", plain },
	{ "anonymous, read only", read_only },
	{ "anonymous, no access", none },
	{ "anonymous, write only", write_only },
	{ "anonymous, execute only", exec_only },
	{ "anonymous, read and execute", read_exec },
	{ "the zero page", zero_page },
	{ "given up by MADV_FREE", discardable },
	{ "shared with a child until written", forked },
	{ "the same, write only", forked_write_only },
	{ "a shared file", shared },
	{ "a shared file, untouched", shared_fresh },
	{ "a shared file, read only", shared_read_only },
	{ "a shared file, write only", shared_write_only },
	{ "a private file, read only", private_read_only },
	{ "a private file, not yet copied", private_unbroken },
	{ "a private file, execute only", private_exec_only },
	{ "past the end of a file", past_end },
	{ "secret memory", secret },
	{ "droppable memory", droppable },
	{ "a protection key without access", key_no_access },
	{ "a protection key without write", key_no_write },
	{ "write-protected by userfaultfd", write_protected },
	{ "private /dev/zero", device },
	{ "half read only, half write only", half_write_only },
	{ "half of a file execute only", half_exec_only },
	{ "half of it unmapped", hole },
};

struct side {
	struct vm vm;
	struct vcpu *vcpus[2];
	struct kvm_regs start[2];
};

struct outcome {
	int error, exit;
	uint64_t value;
};

static uint8_t *area, *plain_memory;

static void create(struct side *side, const char *owned)
{
	static void (*const code[2])(uint64_t) = { obey, obey_write };

	if (!write_file(OWN, owned))
		bail("%s: %m", OWN);
	vm_create(&side->vm);
	for (int i = 0; i < 2; i++) {
		side->vcpus[i] = vm_vcpu(&side->vm, code[i], VM_SHARED_GPA);
		must(ioctl(side->vcpus[i]->fd, KVM_GET_REGS, &side->start[i]));
	}
	must(vm_slot(&side->vm, PLAIN_SLOT, PLAIN_GPA, SIZE, plain_memory, 0));
}

static struct outcome access_page(struct side *side, bool write, unsigned long page)
{
	struct order *order = side->vm.shared;
	struct vcpu *vcpu = side->vcpus[write];
	struct outcome outcome = { 0 };

	*order = (struct order){ .gpa = VM_TEST_GPA + page * PAGE_SIZE, .write = write ? 77 + page : 0 };
	must(ioctl(vcpu->fd, KVM_SET_REGS, &side->start[write]));
	if (vcpu_run(vcpu) < 0)
		outcome.error = errno;
	else
		outcome.exit = vcpu->run->exit_reason;
	outcome.value = order->loaded;
	/* What was begun is brought to its end, so that the vCPU can start anew. */
	if (!outcome.error && outcome.exit == KVM_EXIT_MMIO) {
		vcpu->run->immediate_exit = 1;
		(void)ioctl(vcpu->fd, KVM_RUN, 0);
		vcpu->run->immediate_exit = 0;
	}
	return outcome;
}

static bool no_writes(const struct kind *kind)
{
	return kind->make == write_protected;
}

/* All accesses of one kind through one kind of slot; false where there is no such memory. */
static bool play(struct side *side, const struct kind *kind, uint32_t flags, struct outcome *outcomes)
{
	bool made = kind->make(area);

	if (made) {
		must(vm_slot(&side->vm, SLOT, VM_TEST_GPA, SIZE, area, flags));
		for (unsigned long page = 0; page < PAGES; page++)
			*outcomes++ = access_page(side, false, page);
		for (unsigned long page = 0; page < PAGES && !no_writes(kind); page++)
			*outcomes++ = access_page(side, true, page);
		must(vm_slot(&side->vm, SLOT, VM_TEST_GPA, 0, area, flags));
	}
	must(map(area, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1) == MAP_FAILED ? -1 : 0);
	if (child) {
		kill(child, 9);
		must(waitpid(child, NULL, 0));
		child = 0;
	}
	return made;
}

static void compare(struct side *sides, const struct kind *kind, uint32_t flags)
{
	struct outcome outcomes[2][2 * PAGES] = { 0 };
	const char *slot = flags ? "read-only slot" : "slot";
	bool same = true;

	for (int i = 0; i < 2; i++)
		if (!play(&sides[i], kind, flags, outcomes[i])) {
			skip(kind->name, "this machine has no such memory");
			return;
		}
	for (unsigned long i = 0; i < 2 * PAGES; i++) {
		struct outcome *in_tree = &outcomes[0][i], *own = &outcomes[1][i];

		if (in_tree->error == own->error && in_tree->exit == own->exit && in_tree->value == own->value)
			continue;
		same = false;
		note("%s of page %lu: errno %d, exit %d, value 0x%lx on in-tree KVM, errno %d, exit %d, value 0x%lx on rmmu",
		     i < PAGES ? "read" : "write", i % PAGES, in_tree->error, in_tree->exit, in_tree->value,
		     own->error, own->exit, own->value);
	}
	ok(same, "%s in a %s: as on in-tree KVM", kind->name, slot);
}

int main(void)
{
	static struct side sides[2];

	if (access(OWN, W_OK))
		skip_all("kvm_rmmu is not loaded");
	plan(1 + 2 * (int)(sizeof(kinds) / sizeof(kinds[0])));
	area = memory(HUGE_SIZE, false);
	plain_memory = memory(HUGE_SIZE, false);
	fill(plain_memory);
	create(&sides[0], "0");
	uint64_t owned = read_field(STATS, "vms_owned", ~0UL);

	create(&sides[1], "1");
	ok(read_field(STATS, "vms_owned", 0) == owned + 1, "one VM is in-tree KVM's and one rmmu's");
	for (unsigned long i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		compare(sides, &kinds[i], 0);
		compare(sides, &kinds[i], KVM_MEM_READONLY);
	}
	vm_destroy(&sides[0].vm);
	vm_destroy(&sides[1].vm);
	return finish();
}

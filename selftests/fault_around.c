// SPDX-License-Identifier: GPL-2.0
/*
 * Fault-around: what a fault maps along with its page, and what it must leave alone. The VM's own files in debugfs tell
 * what was mapped ahead, and what was used of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define WINDOW		16UL
#define PAGES		1024UL
#define SIZE		(PAGES * PAGE_SIZE)

/* Touch pages first, first + step, …: read them, or write their number + value. */
struct order {
	uint64_t first, step, count, write, value, wrong;
};

static guest_code void touch(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		uint64_t page = order->first, sum = 0;

		for (uint64_t i = 0; i < order->count; i++, page += order->step) {
			if (order->write)
				store(VM_TEST_GPA + page * PAGE_SIZE, order->value + page);
			else
				sum += load(VM_TEST_GPA + page * PAGE_SIZE) != order->value + page;
		}
		order->wrong = sum;
		guest_sync(1);
	}
}

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *base;

/* Runs the guest; returns how many of the values it read were not the expected ones. */
static uint64_t run(struct order order)
{
	*(struct order *)vm.shared = order;
	vcpu_run_to_sync(vcpu);
	return ((struct order *)vm.shared)->wrong;
}

static uint64_t reads(uint64_t first, uint64_t step, uint64_t count)
{
	return run((struct order){ .first = first, .step = step, .count = count });
}

static uint64_t faults(void)
{
	return kvm_stat(vcpu->fd, "pf_fixed");
}

/* A file of this process's VM in rmmu's debugfs; there is one VM at a time. NULL when rmmu does not own it. */
static const char *vm_file(const char *name)
{
	static char path[512];
	glob_t found;

	snprintf(path, sizeof(path), "/sys/kernel/debug/rmmu/vms/%d-*/%s", getpid(), name);
	if (glob(path, 0, NULL, &found))
		return NULL;
	snprintf(path, sizeof(path), "%s", found.gl_pathv[0]);
	globfree(&found);
	return path;
}

static uint64_t counter(const char *name)
{
	return read_field(vm_file("fault_around"), name, ~0UL);
}

static void begin(uint64_t slot_pages, uint8_t *memory_of_slot)
{
	base = memory_of_slot;
	vm_create(&vm);
	must(vm_slot(&vm, 0, VM_TEST_GPA, slot_pages * PAGE_SIZE, base, 0));
	vcpu = vm_vcpu(&vm, touch, VM_SHARED_GPA);
	/* The guest's own pages are mapped, and nothing of the slot. */
	reads(0, 0, 0);
}

static void end(void)
{
	vm_destroy(&vm);
}

static uint8_t *resident(uint64_t size)
{
	uint8_t *mem = memory(size, false);

	for (uint64_t page = 0; page < size / PAGE_SIZE; page++)
		*(uint64_t *)(mem + page * PAGE_SIZE) = page;
	return mem;
}

/* A page that was mapped ahead would fault again when it is used, to tell that it is. */
static void check_nothing(void)
{
	uint64_t ahead;

	begin(PAGES, resident(SIZE));
	ahead = counter("mapped_ahead");
	ok(reads(0, 1, PAGES) == 0, "a guest reads resident memory in order, and reads what is there");
	ok(counter("mapped_ahead") == ahead, "without accessed bits nothing is mapped ahead (%lu)",
	   counter("mapped_ahead") - ahead);
	end();
	munmap(base, SIZE);
}

static void check_windows(void)
{
	uint64_t before, ahead;

	begin(PAGES, resident(SIZE));
	before = faults();
	ahead = counter("mapped_ahead");
	ok(reads(0, 1, PAGES) == 0, "a guest reads resident memory in order, and reads what is there");
	before = faults() - before;
	ahead = counter("mapped_ahead") - ahead;
	ok(before == PAGES / WINDOW, "a fault for each window of 64K (%lu faults)", before);
	ok(ahead == PAGES - PAGES / WINDOW, "all others were mapped ahead (%lu)", ahead);
	ok(kvm_stat(vm.fd, "pages_4k") >= PAGES, "KVM counts them as mapped");
	ok(counter("used") >= ahead && counter("idle") < 2 * WINDOW, "and all of them count as used");
	end();

	begin(PAGES, base);
	ok(write_number(vm_file("fault_around_bytes"), PAGE_SIZE), "a VM can have a size of its own");
	before = faults();
	reads(0, 1, PAGES);
	ok(faults() - before == PAGES, "4K is off: a fault for each page (%lu)", faults() - before);
	end();
}

static void check_values(void)
{
	static const char *const bad[] = { "0", "1", "3000", "12288", "512K", "64K junk" };
	bool refused = true;

	for (unsigned int i = 0; i < sizeof(bad) / sizeof(*bad); i++)
		refused &= !write_file(FAULT_AROUND, bad[i]);
	ok(refused, "the parameter takes no size that is none");
	ok(write_file(FAULT_AROUND, "16K") && read_number(FAULT_AROUND) == 16384, "it takes 16K");
	begin(PAGES, base);
	ok(read_number(vm_file("fault_around_bytes")) == 16384, "which is then the VM's");
	ok(!write_number(vm_file("fault_around_bytes"), 5000), "the VM's file takes no odd size either");
	end();
	if (!write_file(FAULT_AROUND, "64K"))
		bail("the parameter cannot be set back");
}

static void check_idle(void)
{
	uint64_t idle;

	begin(PAGES, base);
	reads(0, WINDOW, 8);
	idle = counter("idle");
	ok(idle >= 8 * (WINDOW - 1), "pages mapped ahead and not touched are not accessed (%lu idle)", idle);
	reads(0, 1, WINDOW);
	ok(counter("idle") == idle - (WINDOW - 1), "a window that is read is not idle any more");
	must(madvise(base, 2 * WINDOW * PAGE_SIZE, MADV_DONTNEED));
	ok(counter("unused") >= WINDOW - 1, "a window the host takes away was of no use (%lu unused)", counter("unused"));
	ok(counter("idle") == idle - 2 * (WINDOW - 1), "and is not idle but gone");
	end();
	munmap(base, SIZE);
}

static void check_only_what_is_there(void)
{
	unsigned char present[WINDOW] = { 0 };
	uint8_t *mem = memory(SIZE, false);
	unsigned long others = 0;
	uint64_t ahead;

	/* Pages 0 to 9, without 6. */
	for (uint64_t page = 0; page < 10; page++)
		if (page != 6)
			*(uint64_t *)(mem + page * PAGE_SIZE) = page;
	begin(PAGES, mem);
	ahead = counter("mapped_ahead");
	/* 3 comes with 0, 1, 2, 4 and 5. */
	reads(3, 1, 1);
	ahead = counter("mapped_ahead") - ahead;
	ok(ahead == 5, "neighbours up to the first that the host does not have (%lu)", ahead);
	must(mincore(mem, WINDOW * PAGE_SIZE, present));
	for (uint64_t page = 0; page < WINDOW; page++)
		others += (page == 6 || page > 9) && present[page] & 1;
	ok(others == 0, "the host is asked for nothing (%lu pages came)", others);
	reads(8, 1, 1);
	reads(6, 1, 1);
	ok(*(uint64_t *)(mem + 6 * PAGE_SIZE) == 0, "what was not there comes when the guest asks");
	end();
	munmap(mem, SIZE);
}

static void check_read_only(void)
{
	uint64_t before, wrong;
	int fd = must(memfd_create("file", MFD_CLOEXEC));
	uint8_t *file, *mem = memory(SIZE, false);

	must(ftruncate(fd, SIZE));
	file = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	for (uint64_t page = 0; page < PAGES; page++)
		*(uint64_t *)(file + page * PAGE_SIZE) = page;
	if (mmap(mem, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0) != mem)
		bail("mmap of a file: %m");
	begin(PAGES, mem);
	before = faults();
	wrong = reads(0, 1, PAGES);
	ok(wrong == 0 && faults() - before < PAGES / 8, "a file mapped private is mapped ahead for reading (%lu faults)",
	   faults() - before);
	run((struct order){ .step = 1, .count = PAGES / 2, .write = 1, .value = 7 });
	wrong = 0;
	for (uint64_t page = 0; page < PAGES; page++)
		wrong += *(uint64_t *)(file + page * PAGE_SIZE) != page;
	ok(wrong == 0, "the guest's writes do not reach the file (%lu pages did)", wrong);
	wrong = run((struct order){ .step = 1, .count = PAGES / 2, .value = 7 });
	for (uint64_t page = 0; page < PAGES / 2; page++)
		wrong += *(uint64_t *)(mem + page * PAGE_SIZE) != page + 7;
	ok(wrong == 0, "but the process's memory, which the guest then reads (%lu do not)", wrong);
	end();
	munmap(mem, SIZE);
	munmap(file, SIZE);
	close(fd);
}

static unsigned long logged(uint64_t *bits)
{
	struct kvm_dirty_log log = { .slot = 0, .dirty_bitmap = bits };
	unsigned long count = 0;

	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	for (unsigned int i = 0; i < PAGES / 64; i++)
		count += __builtin_popcountl(bits[i]);
	return count;
}

static void check_dirty_log(void)
{
	static uint64_t bits[PAGES / 64];
	uint8_t *mem = resident(SIZE);
	uint64_t ahead, pages;

	begin(PAGES, mem);
	/* Half of the slot is mapped ahead, writable, before there is a log. */
	reads(0, WINDOW, PAGES / WINDOW / 2);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SIZE, mem, KVM_MEM_LOG_DIRTY_PAGES));
	run((struct order){ .first = 1, .step = 100, .count = 10, .write = 1 });
	pages = logged(bits);
	ok(pages == 10, "the log has the pages that were written, and none that was mapped ahead (%lu of 10)", pages);
	for (unsigned int i = 0; i < 10; i++)
		bits[(1 + i * 100) / 64] &= ~(1UL << (1 + i * 100) % 64);
	pages = 0;
	for (unsigned int i = 0; i < PAGES / 64; i++)
		pages += bits[i] != 0;
	ok(pages == 0, "and these very ones");
	ahead = counter("mapped_ahead");
	run((struct order){ .first = PAGES / 2 + 5, .step = 64, .count = 8, .write = 1 });
	reads(PAGES / 2 + 37, 64, 8);
	ok(counter("mapped_ahead") == ahead, "while it logs nothing of the slot is mapped ahead");
	/* KVM maps a page that is read writable if it can, and then takes it as written. */
	pages = logged(bits);
	ok(pages == 16, "and the log has only pages that were asked for (%lu of 16)", pages);
	end();
	munmap(mem, SIZE);
}

static void check_slots(void)
{
	uint8_t *mem = resident(SIZE);

	begin(WINDOW, mem);
	/* The next slot begins in the middle of a window, with other memory. */
	must(vm_slot(&vm, 1, VM_TEST_GPA + WINDOW * PAGE_SIZE, 5 * PAGE_SIZE, mem + 100 * PAGE_SIZE, 0));
	must(vm_slot(&vm, 2, VM_TEST_GPA + (WINDOW + 5) * PAGE_SIZE, 11 * PAGE_SIZE, mem + 300 * PAGE_SIZE, 0));
	ok(run((struct order){ .first = WINDOW + 2, .step = 1, .count = 1, .value = 100 - WINDOW }) == 0 &&
	   counter("idle") < WINDOW, "a window ends with its slot");
	ok(run((struct order){ .first = WINDOW, .step = 1, .count = 5, .value = 100 - WINDOW }) == 0,
	   "and what it maps is the slot's own memory");
	ok(run((struct order){ .first = WINDOW + 5, .step = 1, .count = 11, .value = 300 - WINDOW - 5 }) == 0,
	   "the next slot's memory is the next slot's");
	must(vm_slot(&vm, 2, 0, 0, NULL, 0));
	*(struct order *)vm.shared = (struct order){ .first = WINDOW + 9, .step = 1, .count = 1 };
	if (vcpu_run(vcpu))
		bail("KVM_RUN: %m");
	ok(exit_is_mmio(vcpu, VM_TEST_GPA + (WINDOW + 9) * PAGE_SIZE, false), "nothing of a deleted slot stays mapped ahead");
	end();
	munmap(mem, SIZE);
}

static void check_invalidation(void)
{
	uint8_t *mem = resident(SIZE);
	uint64_t wrong;

	begin(PAGES, mem);
	reads(0, 1, PAGES);
	must(madvise(mem, SIZE / 2, MADV_DONTNEED));
	for (uint64_t page = 0; page < PAGES / 2; page++)
		*(uint64_t *)(mem + page * PAGE_SIZE) = page + 1000;
	wrong = run((struct order){ .step = 1, .count = PAGES / 2, .value = 1000 });
	ok(wrong == 0, "memory the host replaced is replaced in the guest (%lu pages are not)", wrong);
	end();
	munmap(mem, SIZE);
}

static uint64_t window_of_vcpu(void)
{
	return read_field(vm_file("fault_around"), "vcpu_window_pages", ~0UL);
}

static void check_back_off(void)
{
	uint64_t size = 64 * MIB, pages = size / PAGE_SIZE, ahead;
	uint8_t *mem = resident(size);

	begin(pages, mem);
	reads(0, 2 * WINDOW, pages / WINDOW / 4);
	ok(window_of_vcpu() == 1, "a guest that uses no neighbours gets none any more (windows of %lu pages)",
	   window_of_vcpu());
	ahead = counter("mapped_ahead");
	reads(pages / 2, 2 * WINDOW, 128);
	ahead = counter("mapped_ahead") - ahead;
	ok(ahead > 0 && ahead <= 128 / 32 * WINDOW, "but for a try now and then (%lu pages in 128 faults)", ahead);
	reads(3 * pages / 4, 1, pages / 4);
	ok(window_of_vcpu() == WINDOW, "it gets them back when it reads in order (windows of %lu pages)", window_of_vcpu());
	end();
	munmap(mem, size);
}

int main(void)
{
	if (access(FAULT_AROUND, W_OK))
		skip_all("kvm_rmmu is not loaded");
	vm_create(&vm);
	if (!vm_file("fault_around"))
		skip_all("rmmu does not own new VMs in this mode");
	vm_destroy(&vm);
	if (kvm_paging() != TDP_MMU)
		skip_all("the shadow MMU maps nothing around a fault");
	if (kvm_tracks_use_by_faults()) {
		plan(2);
		check_nothing();
		return finish();
	}
	plan(33);
	check_windows();
	check_values();
	check_idle();
	check_only_what_is_there();
	check_read_only();
	check_dirty_log();
	check_slots();
	check_invalidation();
	check_back_off();
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Every allocation that an operation on a VM makes fails once: the first, the second, and so on until the operation needs
 * no more of them; and then all at once. The operation says ENOMEM or does without, in either case the VM
 * goes on, and in the end nothing is left of it.
 *
 * The kernel's fault injection makes them fail (Documentation/fault-injection), which the debug kernel has. The harness
 * asks kmemleak afterwards whether anything leaked.
 *
 * Arguments: -n N goes on by N allocations each time; -o TEXT does operations with TEXT in their name only.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "faults.h"
#include "vm.h"

#define SLOT		1
#define SIZE		(2 * HUGE_SIZE)
#define PAGES		(SIZE / PAGE_SIZE)
#define MOVED_GPA	(VM_TEST_GPA + 16 * MIB)
#define NOWHERE_GPA	(VM_TEST_GPA + 512 * MIB)
/* More allocations than any of the operations makes. */
#define ENOUGH		5000

#define RMMU_STATS	"/sys/kernel/debug/rmmu/stats"

struct order {
	uint64_t base, count, stride, value;
};

/* Writes `count` words as the order says, or reads them if the value is 0. */
static guest_code void obey(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		for (uint64_t i = 0; i < order->count; i++) {
			uint64_t address = order->base + i * order->stride;

			if (order->value)
				store(address, order->value + i);
			else
				load(address);
		}
		guest_sync(1);
	}
}

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *ram;
static int fd = -1;
static bool on_rmmu;

/* What must be as before when the VMs are gone */

static long references(void)
{
	return number_after("/sys/module/kvm_rmmu/refcnt", "");
}

static bool settled(long tables)
{
	for (uint64_t end = deadline_ms(10000); now_ms() < end; usleep(20000)) {
		if (number_after("/proc/meminfo", "SecPageTables:") <= tables &&
		    (!on_rmmu || (!number_after(RMMU_STATS, "vms_owned ") && !number_after(RMMU_STATS, "table_pages ") &&
				  !references())))
			return true;
	}
	note("left: %ld KiB of page tables (%ld before), %ld VMs, %ld tables, %ld references",
	     number_after("/proc/meminfo", "SecPageTables:"), tables, number_after(RMMU_STATS, "vms_owned "),
	     number_after(RMMU_STATS, "table_pages "), references());
	return false;
}

/* Parts of operations */

static void order(uint64_t base, uint64_t count, uint64_t stride, uint64_t value)
{
	*(struct order *)vm.shared = (struct order){ base, count, stride, value };
}

static long run_once(void)
{
	return ioctl(vcpu->fd, KVM_RUN, 0);
}

/* Runs the guest, without faults, and compares what it wrote with its order. */
static bool obeyed(void)
{
	struct order *now = vm.shared;

	if (run_once() || !exit_is_sync(vcpu, 1))
		return false;
	for (uint64_t i = 0; now->value && i < now->count; i++) {
		if (*(uint64_t *)(ram + now->base - VM_TEST_GPA + i * now->stride) != now->value + i)
			return false;
	}
	return true;
}

static bool works(uint64_t value)
{
	order(VM_TEST_GPA + 8, PAGES / 16, 16 * PAGE_SIZE, value);
	return obeyed();
}

static void empty_vm(void)
{
	vm_create(&vm);
	vcpu = vm_vcpu(&vm, obey, VM_SHARED_GPA);
}

static void vm_with_memory(void)
{
	empty_vm();
	must(vm_slot(&vm, SLOT, VM_TEST_GPA, SIZE, ram, 0));
}

static void vm_that_ran(void)
{
	vm_with_memory();
	if (!works(1))
		bail("the guest does not run before anything failed");
}

static void vm_that_logs(void)
{
	vm_create(&vm);
	vm_enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		  KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	vcpu = vm_vcpu(&vm, obey, VM_SHARED_GPA);
	must(vm_slot(&vm, SLOT, VM_TEST_GPA, SIZE, ram, 0));
	if (!works(1))
		bail("the guest does not run before anything failed");
	must(vm_slot(&vm, SLOT, VM_TEST_GPA, SIZE, ram, KVM_MEM_LOG_DIRTY_PAGES));
}

static void end_vm(void)
{
	vm_destroy(&vm);
}

/* Whether the log has the pages that the guest writes, and no others after the first time it is read. */
static bool log_works(bool manual)
{
	uint64_t bits[PAGES / 64];
	struct kvm_dirty_log log = { .slot = SLOT, .dirty_bitmap = bits };
	struct kvm_clear_dirty_log clear = { .slot = SLOT, .num_pages = PAGES, .dirty_bitmap = bits };

	for (uint64_t round = 0; round < 2; round++) {
		memset(bits, 0xff, sizeof(bits));
		must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
		if (manual)
			must(ioctl(vm.fd, KVM_CLEAR_DIRTY_LOG, &clear));
		order(VM_TEST_GPA + 8, 3, 130 * PAGE_SIZE, 100 + round * 10);
		if (!obeyed())
			return false;
	}
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	for (uint64_t page = 0; page < PAGES; page++) {
		bool logged = bits[page / 64] >> (page % 64) & 1, written = page % 130 == 0 && page / 130 < 3;

		if (logged != written) {
			note("page %lu is %s the log", page, logged ? "wrongly in" : "missing from");
			return false;
		}
	}
	return true;
}

/* The operations */

static void open_kvm(void)
{
	vm.kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC));
}

static long create_vm(void)
{
	fd = ioctl(vm.kvm, KVM_CREATE_VM, 0);
	return fd;
}

static bool vm_is_owned(void)
{
	long owned = number_after(RMMU_STATS, "vms_owned ");

	if (on_rmmu && owned != 1)
		note("rmmu owns %ld VMs, and should own 1", owned);
	return !on_rmmu || owned == 1;
}

static void close_kvm(void)
{
	close(fd);
	close(vm.kvm);
}

static void before_destruction(void)
{
	vm_that_ran();
	/* This may fail, and is not KVM's. */
	must(munmap(vcpu->run, vcpu->run_size));
}

static long destroy_vm(void)
{
	close(vcpu->fd);
	return close(vm.fd);
}

static void after_destruction(void)
{
	close(vm.kvm);
	must(munmap(vm.low, VM_LOW_SIZE));
}

static bool nothing(void)
{
	return true;
}

static void vm_without_vcpu(void)
{
	vm_create(&vm);
}

static long create_vcpu(void)
{
	fd = ioctl(vm.fd, KVM_CREATE_VCPU, 7);
	return fd;
}

static bool another_vcpu_works(void)
{
	vcpu = vm_vcpu(&vm, obey, VM_SHARED_GPA);
	must(vm_slot(&vm, SLOT, VM_TEST_GPA, SIZE, ram, 0));
	return works(2);
}

static void end_vm_and_vcpu(void)
{
	close(fd);
	vm_destroy(&vm);
}

static void first_run(void)
{
	vm_with_memory();
	order(VM_TEST_GPA + 8, 8, PAGES / 8 * PAGE_SIZE, 3);
}

static bool ran(void)
{
	return exit_is_sync(vcpu, 1) && *(uint64_t *)(ram + 8) == 3 && works(4);
}

static void first_mmio(void)
{
	vm_with_memory();
	order(NOWHERE_GPA, 1, 0, 0);
}

static bool met_nothing(void)
{
	return exit_is_mmio(vcpu, NOWHERE_GPA, false) && !run_once() && exit_is_sync(vcpu, 1) && works(5);
}

static struct kvm_pre_fault_memory range;

static void before_pre_fault(void)
{
	vm_with_memory();
	range = (struct kvm_pre_fault_memory){ .gpa = VM_TEST_GPA, .size = SIZE };
}

static long pre_fault(void)
{
	long ret = 0;

	while (range.size && ret >= 0)
		ret = ioctl(vcpu->fd, KVM_PRE_FAULT_MEMORY, &range);
	return ret;
}

static bool pre_faulted(void)
{
	return !range.size && works(6);
}

static void ran_without_slot(void)
{
	vm_that_ran();
	must(vm_slot(&vm, SLOT, VM_TEST_GPA, 0, ram, 0));
}

static long add_slot(void)
{
	return vm_slot(&vm, SLOT, VM_TEST_GPA, SIZE, ram, 0);
}

static bool works_with_slot(void)
{
	return works(7);
}

static long delete_slot(void)
{
	return vm_slot(&vm, SLOT, VM_TEST_GPA, 0, ram, 0);
}

static bool slot_is_gone(void)
{
	order(VM_TEST_GPA, 1, 0, 0);
	return !run_once() && exit_is_mmio(vcpu, VM_TEST_GPA, false);
}

static long move_slot(void)
{
	return vm_slot(&vm, SLOT, MOVED_GPA, SIZE, ram, 0);
}

static bool slot_has_moved(void)
{
	order(MOVED_GPA, 1, 0, 99);
	return !run_once() && exit_is_sync(vcpu, 1) && *(uint64_t *)ram == 99 && slot_is_gone();
}

static long start_log(void)
{
	return vm_slot(&vm, SLOT, VM_TEST_GPA, SIZE, ram, KVM_MEM_LOG_DIRTY_PAGES);
}

static bool plain_log_works(void)
{
	return log_works(false);
}

static uint64_t all_ones[PAGES / 64];

static long clear_log(void)
{
	struct kvm_clear_dirty_log clear = { .slot = SLOT, .num_pages = PAGES, .dirty_bitmap = all_ones };

	return ioctl(vm.fd, KVM_CLEAR_DIRTY_LOG, &clear);
}

static bool manual_log_works(void)
{
	return log_works(true);
}

static long stop_log(void)
{
	return vm_slot(&vm, SLOT, VM_TEST_GPA, SIZE, ram, 0);
}

static bool works_without_log(void)
{
	return works(8);
}

static long unmap_in_host(void)
{
	return madvise(ram, SIZE, MADV_DONTNEED_LOCKED);
}

static bool works_with_new_pages(void)
{
	return works(9);
}

static const struct operation {
	const char *name;
	void (*prepare)(void);
	/* What is made to fail. Called again, without failures, if it says that it failed. */
	long (*run)(void);
	/* Whether all is well after it succeeded. */
	bool (*check)(void);
	void (*finish)(void);
} operations[] = {
	{ "a VM is created", open_kvm, create_vm, vm_is_owned, close_kvm },
	{ "a VM is destroyed", before_destruction, destroy_vm, nothing, after_destruction },
	{ "a vCPU is created", vm_without_vcpu, create_vcpu, another_vcpu_works, end_vm_and_vcpu },
	{ "a vCPU runs for the first time", first_run, run_once, ran, end_vm },
	{ "a vCPU's first access meets no memory", first_mmio, run_once, met_nothing, end_vm },
	{ "memory is mapped before the guest asks", before_pre_fault, pre_fault, pre_faulted, end_vm },
	{ "a slot is added", ran_without_slot, add_slot, works_with_slot, end_vm },
	{ "a slot is deleted", vm_that_ran, delete_slot, slot_is_gone, end_vm },
	{ "a slot is moved", vm_that_ran, move_slot, slot_has_moved, end_vm },
	{ "logging begins, and huge pages are split", vm_that_ran, start_log, plain_log_works, end_vm },
	{ "the log is cleared for the first time", vm_that_logs, clear_log, manual_log_works, end_vm },
	{ "logging ends", vm_that_logs, stop_log, works_without_log, end_vm },
	{ "the host takes the memory away", vm_that_ran, unmap_in_host, works_with_new_pages, end_vm },
};

#define OPERATIONS (sizeof(operations) / sizeof(*operations))

struct counts {
	unsigned int failed, reported, wrong;
};

/* One operation with one allocation, or all, made to fail. Returns whether it got that far. */
static bool try(const struct operation *operation, unsigned int number, struct counts *counts)
{
	bool reached;
	int error;
	long ret;

	operation->prepare();
	faults_arm(number);
	ret = operation->run();
	error = errno;
	reached = faults_disarm(number);
	counts->failed += reached;
	if (ret < 0) {
		counts->reported++;
		if (!reached || error != ENOMEM) {
			note("%s, allocation %u: %s", operation->name, number, strerror(error));
			counts->wrong++;
		}
		ret = operation->run();
		if (ret < 0)
			note("%s, allocation %u: it fails again, with memory: %m", operation->name, number);
	}
	if (ret < 0 || !operation->check()) {
		note("%s, allocation %u: not well afterwards", operation->name, number);
		counts->wrong++;
	}
	operation->finish();
	return reached;
}

static void sweep(const struct operation *operation, unsigned int step, struct counts *total)
{
	long tables = number_after("/proc/meminfo", "SecPageTables:");
	struct counts counts = { 0 };
	unsigned int number = 1;

	while (number < ENOUGH && counts.wrong < 5 && try(operation, number, &counts))
		number += step;
	try(operation, FAULTS_ALL, &counts);
	note("%s: up to allocation %u, one by one (every %u.), then all: %u failed, %u times it said so, %u times it did "
	     "without", operation->name, number - 1, step, counts.failed, counts.reported, counts.failed - counts.reported);
	ok(!counts.wrong && number < ENOUGH, "%s, or says ENOMEM; and the VM goes on", operation->name);
	ok(settled(tables), "%s: nothing is left", operation->name);
	total->failed += counts.failed;
	total->reported += counts.reported;
}

/* Why an operation is left out; NULL when it is not. */
static const char *left_out(const struct operation *operation, const char *only, bool can_pre_fault)
{
	if (!strstr(operation->name, only))
		return "not asked for";
	if (operation->run == pre_fault && !can_pre_fault)
		return "KVM has no KVM_PRE_FAULT_MEMORY in this mode";
	return NULL;
}

int main(int argc, char **argv)
{
	const char *only = "", *why;
	struct counts total = { 0 };
	unsigned int step = 1;
	bool can_pre_fault;

	for (int option; (option = getopt(argc, argv, "n:o:")) != -1;) {
		if (option == 'n')
			step = atoi(optarg);
		else if (option == 'o')
			only = optarg;
		else
			bail("usage: alloc_failures [-n STEP] [-o TEXT]");
	}
	if (!step)
		bail("-n 0 makes no sense");
	if (!faults_possible())
		skip_all("the kernel cannot make allocations fail");
	on_rmmu = !access(RMMU_STATS, R_OK);
	faults_set_up();
	/* No page fault of this program's own may meet a failure. */
	must(mlockall(MCL_CURRENT | MCL_FUTURE));
	ram = memory(SIZE, true);
	memset(ram, 1, SIZE);
	memset(all_ones, 0xff, sizeof(all_ones));
	plan(2 * OPERATIONS + 1);
	/* Once without failures: what is allocated once and for all is not this test's. */
	vm_that_ran();
	can_pre_fault = vm_cap(&vm, KVM_CAP_PRE_FAULT_MEMORY) > 0;
	end_vm();
	for (size_t i = 0; i < OPERATIONS; i++) {
		why = left_out(&operations[i], only, can_pre_fault);
		if (why) {
			skip(operations[i].name, why);
			skip(operations[i].name, why);
		} else {
			sweep(&operations[i], step, &total);
		}
	}
	note("allocations made to fail: %u; reported: %u", total.failed, total.reported);
	ok(total.reported > 0, "failures happened and were reported");
	return finish();
}

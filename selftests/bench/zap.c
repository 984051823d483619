// SPDX-License-Identifier: GPL-2.0
/*
 * Rows of taking things away: the host unmaps memory, slots come and go; and what page tables cost in memory.
 */
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench.h"

#define SIZE	GIB

static void prefault(struct vcpu *vcpu)
{
	struct kvm_pre_fault_memory range = { .gpa = VM_TEST_GPA, .size = SIZE };

	while (range.size)
		must(ioctl(vcpu->fd, KVM_PRE_FAULT_MEMORY, &range));
}

/* Making it costs more than the row: it is made once. */
static uint8_t *gigabyte(bool huge)
{
	static uint8_t *made[2];

	if (!made[huge])
		made[huge] = backing_map(huge ? HUGE : ANON, SIZE, true);
	return made[huge];
}

static void mapped_gigabyte(struct vm *vm, bool huge)
{
	bench_vm(vm);
	must(vm_slot(vm, 0, VM_TEST_GPA, SIZE, gigabyte(huge), 0));
	prefault(touch_vcpu(vm));
	if (kvm_stat(vm->fd, huge ? "pages_2m" : "pages_4k") < SIZE / (huge ? HUGE_SIZE : PAGE_SIZE))
		bail("not all of the guest's memory is mapped");
}

/* arg: huge. The memory stays, so that the host has nothing to free. */
static void unmap(const struct row *row)
{
	uint8_t *base = gigabyte(row->arg[0]);
	uint64_t begin;
	struct vm vm;

	mapped_gigabyte(&vm, row->arg[0]);
	begin = now_ns();
	must(mprotect(base, SIZE, PROT_NONE));
	report(row, NULL, "time", now_ns() - begin);
	must(mprotect(base, SIZE, PROT_READ | PROT_WRITE));
	vm_destroy(&vm);
}

#define DISCARD_SIZE	(64 * MIB)

/* As a balloon does it. */
static void discard(const struct row *row)
{
	struct touch order = { .base = VM_TEST_GPA, .pages = DISCARD_SIZE / PAGE_SIZE, .count = DISCARD_SIZE / PAGE_SIZE };
	uint8_t *base = backing_map(ANON, DISCARD_SIZE, true);
	uint64_t begin;
	struct vm vm;

	bench_vm(&vm);
	must(vm_slot(&vm, 0, VM_TEST_GPA, DISCARD_SIZE, base, 0));
	touch(touch_vcpu(&vm), order);
	begin = now_ns();
	for (uint64_t at = 0; at < DISCARD_SIZE; at += PAGE_SIZE)
		must(madvise(base + at, PAGE_SIZE, MADV_DONTNEED));
	report(row, NULL, "time", now_ns() - begin);
	if (kvm_stat(vm.fd, "pages_4k") > DISCARD_SIZE / PAGE_SIZE / 2)
		bail("not all of the guest's memory is gone");
	vm_destroy(&vm);
	backing_unmap(base, DISCARD_SIZE);
}

/* arg: huge. */
static void delete_slot(const struct row *row)
{
	uint64_t begin;
	struct vm vm;

	mapped_gigabyte(&vm, row->arg[0]);
	begin = now_ns();
	must(vm_slot(&vm, 0, 0, 0, NULL, 0));
	report(row, NULL, "time", now_ns() - begin);
	vm_destroy(&vm);
}

static uint64_t page_table_bytes(void)
{
	unsigned long kib = 0;
	char line[128];
	FILE *file;
	int fd;

	/* The counters of all CPUs are added up first. */
	fd = open("/proc/sys/vm/stat_refresh", O_WRONLY);
	if (fd >= 0) {
		if (write(fd, "1", 1) < 0)
			note("the kernel's counters could not be refreshed: %m");
		close(fd);
	}
	file = fopen("/proc/meminfo", "r");
	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "SecPageTables: %lu kB", &kib) == 1)
			break;
	if (!file)
		bail("/proc/meminfo: %m");
	fclose(file);
	return kib << 10;
}

static void table_memory(const struct row *row)
{
	uint64_t before = page_table_bytes();
	struct vm vm;

	mapped_gigabyte(&vm, false);
	report(row, NULL, "bytes", page_table_bytes() - before);
	vm_destroy(&vm);
	/* The next one starts from a state without these tables. */
	for (uint64_t end = now_ns() + 10000000000UL; page_table_bytes() > before && now_ns() < end;)
		usleep(20000);
}

#define CHURN_SIZE	(2 * MIB)
#define CHURNS		200

static void churn(const struct row *row)
{
	struct touch order = {
		.base = VM_TEST_GPA, .pages = CHURN_SIZE / PAGE_SIZE, .count = 16, .write = 1,
	};
	uint8_t *base = backing_map(ANON, CHURN_SIZE, true);
	struct vcpu *vcpu;
	uint64_t begin;
	struct vm vm;

	bench_vm(&vm);
	vcpu = touch_vcpu(&vm);
	begin = now_ns();
	for (int i = 0; i < CHURNS; i++) {
		must(vm_slot(&vm, 0, VM_TEST_GPA, CHURN_SIZE, base, 0));
		touch(vcpu, order);
		must(vm_slot(&vm, 0, 0, 0, NULL, 0));
	}
	report(row, NULL, "time", (double)(now_ns() - begin) / CHURNS);
	vm_destroy(&vm);
	backing_unmap(base, CHURN_SIZE);
}

#define LIVES		20

/* What a monitor of short-lived guests pays; waits for grace periods are in it. */
static void lifetime(const struct row *row)
{
	struct touch order = { .base = VM_SHARED_GPA, .pages = 1, .count = 1 };
	uint64_t birth = 0, death = 0, begin;
	struct vm vm;

	for (int i = 0; i < LIVES; i++) {
		begin = now_ns();
		bench_vm(&vm);
		touch(touch_vcpu(&vm), order);
		birth += now_ns() - begin;
		begin = now_ns();
		vm_destroy(&vm);
		death += now_ns() - begin;
	}
	report(row, "made, first run", "time", (double)birth / LIVES);
	report(row, "destroyed", "time", (double)death / LIVES);
}

const struct row zap_rows[] = {
	{ "unmap 1G of 4K", AROUND_DEFAULT, unmap, { 0 } },
	{ "unmap 1G of 2M", AROUND_DEFAULT, unmap, { 1 } },
	{ "discard 64M of 4K, page after page", AROUND_DEFAULT, discard, { 0 } },
	{ "delete a slot of 1G of 4K", AROUND_DEFAULT, delete_slot, { 0 } },
	{ "delete a slot of 1G of 2M", AROUND_DEFAULT, delete_slot, { 1 } },
	{ "slot made, 16 pages written, deleted", AROUND_DEFAULT, churn, { 0 } },
	{ "VM with one vCPU", AROUND_DEFAULT, lifetime, { 0 } },
	{ "page tables of 1G of 4K", AROUND_DEFAULT, table_memory, { 0 } },
	{ 0 },
};

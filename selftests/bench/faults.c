// SPDX-License-Identifier: GPL-2.0
/*
 * Rows of faults: what one costs, what it costs to populate a guest's memory, MMIO, and two vCPUs at once.
 */
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>

#include "bench.h"

#define SIZE	(256 * MIB)
#define PAGES	(SIZE / PAGE_SIZE)

struct machine {
	struct vm vm;
	struct vcpu *vcpu;
	uint8_t *base;
	uint64_t size;
};

static void start(struct machine *machine, enum backing kind, uint64_t size, bool resident)
{
	bench_vm(&machine->vm);
	machine->size = size;
	machine->base = backing_map(kind, size, resident);
	must(vm_slot(&machine->vm, 0, VM_TEST_GPA, size, machine->base, 0));
	machine->vcpu = touch_vcpu(&machine->vm);
}

static void stop(struct machine *machine)
{
	vm_destroy(&machine->vm);
	backing_unmap(machine->base, machine->size);
}

/*
 * arg: write, backing, not resident: the host has to fault, too. Between two reads of the TSC in the guest: the exit, the fault, the entry; and the access itself
 * with what it takes to read the TSC, which is measured on a page that is mapped, and subtracted.
 */
static void one_fault(const struct row *row)
{
	struct touch order = {
		.base = VM_TEST_GPA, .pages = 4096, .count = 4096, .write = row->arg[0], .samples = SAMPLES_GPA,
	};
	struct machine machine;
	double fault, access;

	start(&machine, row->arg[1], order.pages * PAGE_SIZE, !row->arg[2]);
	touch(machine.vcpu, order);
	fault = samples_median(&machine.vm, order.count);
	touch(machine.vcpu, order);
	access = samples_median(&machine.vm, order.count);
	report(row, NULL, "time", cycles_to_ns(machine.vcpu, fault - access));
	stop(&machine);
}

/* arg: backing, pattern, one page in so many, write. */
void populate(const struct row *row)
{
	uint64_t faults, time;
	struct touch order = {
		.base = VM_TEST_GPA, .pages = PAGES, .count = PAGES / row->arg[2], .pattern = row->arg[1], .stride = row->arg[2],
		.write = row->arg[3],
	};
	struct machine machine;

	start(&machine, row->arg[0], SIZE, true);
	faults = kvm_stat(machine.vcpu->fd, "pf_taken");
	time = touch(machine.vcpu, order);
	report(row, NULL, "time", time);
	report(row, "faults", "count", kvm_stat(machine.vcpu->fd, "pf_taken") - faults);
	stop(&machine);
}

#define MMIO_GPA	(3 * GIB + GIB / 2)
#define MMIO_EXITS	2000

static guest_code void write_device(uint64_t gpa)
{
	for (;;)
		store(gpa, 1);
}

static void mmio(const struct row *row)
{
	struct vcpu *vcpu;
	uint64_t begin = 0;
	struct vm vm;

	bench_vm(&vm);
	vcpu = vm_vcpu(&vm, write_device, MMIO_GPA);
	for (int i = 0; i < 2 * MMIO_EXITS; i++) {
		if (i == MMIO_EXITS)
			begin = now_ns();
		if (vcpu_run(vcpu) || !exit_is_mmio(vcpu, MMIO_GPA, true))
			bail("the guest did not write to the device");
	}
	report(row, NULL, "time", (double)(now_ns() - begin) / MMIO_EXITS);
	vm_destroy(&vm);
}

/* Each vCPU touches a half of the region. Its orders are in its own part of the shared page. */
static guest_code void touch_half(uint64_t gpa)
{
	for (;;) {
		for (uint64_t at = 0; at < SIZE / 2; at += PAGE_SIZE)
			load(gpa + at);
		guest_sync(1);
	}
}

static pthread_barrier_t ready;

static void *run_half(void *vcpu)
{
	pthread_barrier_wait(&ready);
	vcpu_run_to_sync(vcpu);
	return NULL;
}

static void two_vcpus(const struct row *row)
{
	struct vcpu *vcpus[2];
	pthread_t thread;
	uint8_t *base;
	uint64_t begin;
	struct vm vm;

	bench_vm(&vm);
	base = backing_map(ANON, SIZE, true);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SIZE, base, 0));
	for (int i = 0; i < 2; i++)
		vcpus[i] = vm_vcpu(&vm, touch_half, VM_TEST_GPA + i * SIZE / 2);
	pthread_barrier_init(&ready, NULL, 2);
	if (pthread_create(&thread, NULL, run_half, vcpus[1]))
		bail("pthread_create failed");
	pthread_barrier_wait(&ready);
	begin = now_ns();
	vcpu_run_to_sync(vcpus[0]);
	pthread_join(thread, NULL);
	report(row, NULL, "time", now_ns() - begin);
	pthread_barrier_destroy(&ready);
	vm_destroy(&vm);
	backing_unmap(base, SIZE);
}

const struct row fault_rows[] = {
	{ "4K fault, read", AROUND_OFF, one_fault, { 0, ANON } },
	{ "4K fault, write", AROUND_OFF, one_fault, { 1, ANON } },
	{ "4K fault, read-only page of a file", AROUND_OFF, one_fault, { 0, FILE_PRIVATE } },
	{ "4K fault, write, page is new to the host", AROUND_DEFAULT, one_fault, { 1, ANON, 1 } },
	{ "populate 256M of 4K, no fault-around", AROUND_OFF, populate, { ANON, SEQUENTIAL, 1, 0 } },
	{ "populate 256M of 4K", AROUND_DEFAULT, populate, { ANON, SEQUENTIAL, 1, 0 } },
	{ "populate 256M of 4K, file mapped private", AROUND_DEFAULT, populate, { FILE_PRIVATE, SEQUENTIAL, 1, 0 } },
	{ "populate 256M of 4K, shmem", AROUND_DEFAULT, populate, { SHMEM, SEQUENTIAL, 1, 0 } },
	{ "populate 256M of 2M", AROUND_DEFAULT, populate, { HUGE, SEQUENTIAL, 1, 0 } },
	{ "touch 256M of 4K at random", AROUND_DEFAULT, populate, { ANON, RANDOM, 1, 0 } },
	{ "touch 1/16 of 256M of 4K at random", AROUND_DEFAULT, populate, { ANON, RANDOM, 16, 0 } },
	{ "touch every 16th page of 256M of 4K", AROUND_DEFAULT, populate, { ANON, STRIDED, 16, 0 } },
	{ "MMIO exit", AROUND_DEFAULT, mmio, { 0 } },
	{ "two vCPUs populate 256M of 4K, no fault-around", AROUND_OFF, two_vcpus, { 0 } },
	{ "two vCPUs populate 256M of 4K", AROUND_DEFAULT, two_vcpus, { 0 } },
	{ 0 },
};

// SPDX-License-Identifier: GPL-2.0
/*
 * Rows of dirty logging: a pass over 4K pages, and switching it on and off over huge pages.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "bench.h"

#define PASS_SIZE	(64 * MIB)
#define PASS_PAGES	(PASS_SIZE / PAGE_SIZE)
#define PASSES		3

static void get_and_clear(struct vm *vm)
{
	static uint64_t bits[PASS_PAGES / 64];
	struct kvm_dirty_log log = { .slot = 0, .dirty_bitmap = bits };
	struct kvm_clear_dirty_log clear = { .slot = 0, .num_pages = PASS_PAGES, .dirty_bitmap = bits };

	must(ioctl(vm->fd, KVM_GET_DIRTY_LOG, &log));
	for (unsigned int i = 0; i < PASS_PAGES / 64; i++)
		if (bits[i] != ~0UL)
			bail("the log misses pages that the guest wrote");
	must(ioctl(vm->fd, KVM_CLEAR_DIRTY_LOG, &clear));
}

/* The guest writes every page, the log is read and cleared, and again. By the write bit: SVM has no log of its own. */
static void dirty_pass(const struct row *row)
{
	struct touch order = { .base = VM_TEST_GPA, .pages = PASS_PAGES, .count = PASS_PAGES, .write = 1 };
	uint64_t redirty = 0, clear = 0, begin;
	struct vcpu *vcpu;
	uint8_t *base;
	struct vm vm;

	bench_vm(&vm);
	vm_enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	base = backing_map(ANON, PASS_SIZE, true);
	must(vm_slot(&vm, 0, VM_TEST_GPA, PASS_SIZE, base, 0));
	vcpu = touch_vcpu(&vm);
	touch(vcpu, order);
	must(vm_slot(&vm, 0, VM_TEST_GPA, PASS_SIZE, base, KVM_MEM_LOG_DIRTY_PAGES));
	for (int pass = 0; pass <= PASSES; pass++) {
		uint64_t took = touch(vcpu, order);

		begin = now_ns();
		get_and_clear(&vm);
		/* The first pass is the one that finds the pages as they were before logging. */
		if (pass > 0) {
			redirty += took;
			clear += now_ns() - begin;
		}
	}
	report(row, "write all pages", "time", (double)redirty / PASSES);
	report(row, "read and clear the log", "time", (double)clear / PASSES);
	vm_destroy(&vm);
	backing_unmap(base, PASS_SIZE);
}

#define SWITCH_SIZE	GIB

static void logging_on_and_off(const struct row *row)
{
	uint64_t pages = SWITCH_SIZE / PAGE_SIZE, begin;
	struct touch order = {
		.base = VM_TEST_GPA, .pages = pages, .count = pages / 512, .pattern = STRIDED, .stride = 512, .write = 1,
	};
	struct vcpu *vcpu;
	uint8_t *base;
	struct vm vm;

	bench_vm(&vm);
	base = backing_map(HUGE, SWITCH_SIZE, true);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SWITCH_SIZE, base, 0));
	vcpu = touch_vcpu(&vm);
	touch(vcpu, order);
	if (kvm_stat(vm.fd, "pages_2m") < SWITCH_SIZE / HUGE_SIZE / 2)
		bail("the guest's memory is not mapped by huge pages");
	begin = now_ns();
	must(vm_slot(&vm, 0, VM_TEST_GPA, SWITCH_SIZE, base, KVM_MEM_LOG_DIRTY_PAGES));
	report(row, "on", "time", now_ns() - begin);
	begin = now_ns();
	must(vm_slot(&vm, 0, VM_TEST_GPA, SWITCH_SIZE, base, 0));
	report(row, "off", "time", now_ns() - begin);
	vm_destroy(&vm);
	backing_unmap(base, SWITCH_SIZE);
}

const struct row dirty_rows[] = {
	{ "dirty log of 64M of 4K", AROUND_DEFAULT, dirty_pass, { 0 } },
	{ "dirty log of 1G of 2M", AROUND_DEFAULT, logging_on_and_off, { 0 } },
	{ 0 },
};

// SPDX-License-Identifier: GPL-2.0
/*
 * A frame that no slot backs, mapped by a table that KVM shadows, and a slot that comes. The guest writes to the table and
 * flushes, before and after that; what KVM knows of the frame must not look new just because it was brought up to date: the
 * frame is memory. In-tree KVM goes on to leave with KVM_EXIT_MMIO.
 *
 * With nested paging the table is a hypervisor's, for its guest.
 */
#include <string.h>
#include <sys/mman.h>

#include "audit.h"
#include "host.h"
#include "remap.h"

#define SLOT		1
#define LATE_GPA	(2 * GIB)
#define ELSEWHERE_GPA	(2 * GIB + 64 * MIB)
#define ROUNDS		20

static struct remap guest;
static uint8_t *base;
static uint64_t number;

static bool leaves_as_mmio(enum remap_order order)
{
	uint64_t answer = ++number;

	if (remap_run(&guest, order, answer) || !exit_is_mmio(guest.vcpu, LATE_GPA, order == REMAP_STORE))
		return false;
	memcpy(guest.vcpu->run->mmio.data, &answer, sizeof(answer));
	return !vcpu_run(guest.vcpu) && exit_is_sync(guest.vcpu, 1);
}

/* Another entry of the table is written, so that the table is no longer what KVM's shadow of it says. */
static bool writes_table(void)
{
	return remap_give(&guest, REMAP_OTHER, number << 12);
}

static bool flushes(void)
{
	return remap_give(&guest, REMAP_FLUSH, 0);
}

static void set_slot(uint64_t gpa, bool there)
{
	must(vm_slot(&guest.vm, SLOT, gpa, there ? PAGE_SIZE : 0, base, 0));
}

static bool is_memory(enum remap_order order)
{
	uint64_t value = ++number;

	if (order == REMAP_STORE)
		return remap_give(&guest, order, value) && *(uint64_t *)base == value;
	*(uint64_t *)base = value;
	return remap_reads(&guest, value);
}

/* Where in it the slot comes. */
enum when { BEFORE_WRITE, BEFORE_FLUSH, AFTER_FLUSH };

static bool becomes_memory(enum when when, enum remap_order order)
{
	bool right = true;

	for (int i = 0; i < ROUNDS && right; i++) {
		right = leaves_as_mmio(order) && leaves_as_mmio(order);
		if (when == BEFORE_WRITE)
			set_slot(LATE_GPA, true);
		right = right && writes_table();
		if (when == BEFORE_FLUSH)
			set_slot(LATE_GPA, true);
		right = right && flushes();
		if (when == AFTER_FLUSH)
			set_slot(LATE_GPA, true);
		right = right && is_memory(order);
		set_slot(LATE_GPA, false);
	}
	return right;
}

/* Slots come and go elsewhere: what is no memory stays so. */
static bool stays_mmio(enum remap_order order)
{
	bool right = true;

	for (int i = 0; i < ROUNDS && right; i++) {
		right = leaves_as_mmio(order);
		set_slot(ELSEWHERE_GPA, true);
		right = right && writes_table() && flushes() && leaves_as_mmio(order);
		set_slot(ELSEWHERE_GPA, false);
	}
	return right;
}

int main(void)
{
	static const char *const names[] = { "before the table is written", "before the flush", "after the flush" };
	static const enum remap_order orders[] = { REMAP_LOAD, REMAP_STORE };

	if (!remap_possible())
		skip_all("the nested guest is one of SVM");
	plan(2 * 2 * 4 + 1);
	base = memory(HUGE_SIZE, false);
	for (int only_own = 0; only_own < 2; only_own++) {
		for (int i = 0; i < 2; i++) {
			const char *access = orders[i] == REMAP_LOAD ? "load" : "store";

			remap_create(&guest, only_own);
			*(uint64_t *)(guest.vm.low + REMAP_TABLE) = LATE_GPA | REMAP_WRITABLE;
			for (enum when when = BEFORE_WRITE; when <= AFTER_FLUSH; when++)
				ok(becomes_memory(when, orders[i]), "a %s meets memory that came %s", access,
				   names[when]);
			ok(stays_mmio(orders[i]), "a %s leaves as MMIO when slots changed elsewhere", access);
			audit("at the end");
			if (only_own && i)
				ok(kvm_caches_mmio() == (kvm_stat(guest.vcpu->fd, "pf_mmio_spte_created") > 0),
				   "MMIO was cached in entries, if KVM does so");
			vm_destroy(&guest.vm);
		}
	}
	munmap(base, HUGE_SIZE);
	return finish();
}

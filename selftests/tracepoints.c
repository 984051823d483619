// SPDX-License-Identifier: GPL-2.0
/*
 * The events of KVM's MMU (group kvmmmu): the same guest, once on in-tree KVM and once on rmmu,
 * shows the same events in the same order. What a guest does to its page tables is in paging -e.
 */
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "events.h"
#include "host.h"
#include "vm.h"

#define SMALL	(16 * PAGE_SIZE)
#define LARGE	(4 * MIB)
#define LARGE_GPA (VM_TEST_GPA + GIB)
#define MMIO_GPA (3 * GIB)

/* What both kinds of MMU do; then what only one of them does. */
static const char * const events[] = {
	"kvm_mmu_get_page", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "mark_mmio_spte", "check_mmio_spte",
	"handle_mmio_page_fault", "kvm_mmu_prepare_zap_page", "kvm_mmu_zap_all_fast",
	"fast_page_fault", "kvm_mmu_split_huge_page", "kvm_tdp_mmu_spte_changed",
	"kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_set_accessed_bit", "kvm_mmu_set_dirty_bit",
	NULL
};

/* In the other modes KVM may walk the guest's tables, too, to emulate something. */
static bool must_come(const char *event, enum kvm_paging mode)
{
	if (!strncmp(event, "kvm_mmu_pag", 11) || strstr(event, "_bit"))
		return mode == SHADOW;
	if (!strcmp(event, "fast_page_fault"))
		/* With PML writes are logged without a fault. */
		return mode != SHADOW && !kvm_has_pml();
	if (!strcmp(event, "kvm_mmu_split_huge_page") || !strcmp(event, "kvm_tdp_mmu_spte_changed"))
		return mode == TDP_MMU;
	if (strstr(event, "mmio"))
		return kvm_caches_mmio();
	return true;
}

static guest_code void play(uint64_t shared)
{
	(void)shared;
	for (int pass = 0; pass < 3; pass++) {
		for (uint64_t at = 0; at < SMALL; at += PAGE_SIZE)
			store(VM_TEST_GPA + at, at);
		for (uint64_t at = 0; at < LARGE; at += HUGE_SIZE / 4)
			store(LARGE_GPA + at, at);
		guest_sync(1);
	}
	/* Two addresses, because KVM remembers the last one without a look at the tables. */
	for (int pass = 0; pass < 2; pass++) {
		load(MMIO_GPA);
		load(MMIO_GPA + 8 * PAGE_SIZE);
	}
	guest_sync(2);
	load(MMIO_GPA);
	guest_sync(3);
}

static void run_to_sync(struct vcpu *vcpu, uint32_t value)
{
	do {
		if (vcpu_run(vcpu))
			bail("KVM_RUN: %m");
	} while (vcpu->run->exit_reason == KVM_EXIT_MMIO);
	if (!exit_is_sync(vcpu, value))
		bail("the guest is not at %u", value);
}

/* Plays the scene with a VM of one owner. */
static void scene(bool owned, struct events *seen)
{
	uint8_t *small = memory(SMALL, false), *large = memory(LARGE, true);
	struct kvm_dirty_log log = { .slot = 1 };
	uint64_t bitmap[LARGE / PAGE_SIZE / 64];
	struct vcpu *vcpu;
	struct vm vm;

	own_new_vms(owned);
	memset(small, 1, SMALL);
	memset(large, 1, LARGE);
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SMALL, small, 0));
	must(vm_slot(&vm, 2, LARGE_GPA, LARGE, large, 0));
	vcpu = vm_vcpu(&vm, play, VM_SHARED_GPA);
	events_start(events);
	run_to_sync(vcpu, 1);
	/* Write protection, a huge page taken apart, and writes that are logged without a lock. */
	must(vm_slot(&vm, 1, VM_TEST_GPA, SMALL, small, KVM_MEM_LOG_DIRTY_PAGES));
	must(vm_slot(&vm, 2, LARGE_GPA, LARGE, large, KVM_MEM_LOG_DIRTY_PAGES));
	log.dirty_bitmap = bitmap;
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	log.slot = 2;
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	run_to_sync(vcpu, 1);
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	must(vm_slot(&vm, 2, LARGE_GPA, LARGE, large, 0));
	/* The host takes pages away. */
	must(madvise(small + PAGE_SIZE, 3 * PAGE_SIZE, MADV_DONTNEED));
	must(madvise(large, HUGE_SIZE, MADV_DONTNEED));
	run_to_sync(vcpu, 1);
	run_to_sync(vcpu, 2);
	/* Entries of MMIO become stale; then everything goes. */
	must(vm_slot(&vm, 3, 2 * LARGE_GPA, SMALL, small, 0));
	run_to_sync(vcpu, 3);
	must(vm_slot(&vm, 1, VM_TEST_GPA, 0, small, 0));
	events_stop(events, seen);
	vm_destroy(&vm);
	munmap(small, SMALL);
	munmap(large, LARGE);
}

int main(void)
{
	struct events in_tree, rmmu;
	enum kvm_paging mode = kvm_paging();
	int count = 0;

	events_require();
	while (events[count])
		count++;
	plan(count + 1);
	scene(false, &in_tree);
	scene(true, &rmmu);
	for (int i = 0; i < count; i++) {
		size_t want = events_of(&in_tree, events[i]), got = events_of(&rmmu, events[i]);

		ok(want == got && (want || !must_come(events[i], mode)), "%s: %zu on in-tree KVM, %zu on rmmu",
		   events[i], want, got);
	}
	ok(events_equal(&in_tree, &rmmu), "all events are the same, in the same order");
	return finish();
}

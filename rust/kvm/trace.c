// SPDX-License-Identifier: GPL-2.0
/*
 * kvm.ko's tracepoints. They are defined in kvm.ko and not exported: what emits one there, its key and its iterator, is found
 * through kallsyms. Whoever listens (perf, trace-cmd, BPF) sees the events of VMs of ours under their usual names.
 */
#include <linux/kvm_host.h>
#include <linux/static_call.h>
#include <linux/tracepoint.h>
#include <trace/events/kvm.h>
#include "mmu.h"
#include "mmu/mmu_internal.h"
#include "mmu/mmutrace.h"
#include "trace.h"

#define RMMU_EVENT(event, proto) DEFINE_STATIC_CALL_NULL(rmmu_iter_##event, __traceiter_##event);
#include "events.h"
#undef RMMU_EVENT

#define RMMU_EVENT(event, proto) {					\
	.name = "__traceiter_" #event, .prototype = proto,		\
	.key = &STATIC_CALL_KEY(rmmu_iter_##event),			\
	.tramp = STATIC_CALL_TRAMP_ADDR(rmmu_iter_##event) },
const struct rmmu_function rmmu_iterators[] = {
#include "events.h"
};
#undef RMMU_EVENT
const unsigned long rmmu_iterators_len = ARRAY_SIZE(rmmu_iterators);

struct static_key *rmmu_event_keys[RMMU_EVENTS];

void rmmu_bind_event(unsigned int event, struct tracepoint *tracepoint)
{
	if (event < RMMU_EVENTS)
		rmmu_event_keys[event] = &tracepoint->key.key;
}

/* What a tracepoint does when it is on. Its iterator looks at the list of probes itself. */
#define emit(event, ...) do {						\
	guard(srcu_fast_notrace)(&tracepoint_srcu);			\
	static_call(rmmu_iter_##event)(NULL, ##__VA_ARGS__);		\
} while (0)

void rmmu_trace_fast_page_fault(struct kvm_vcpu *vcpu, u64 addr, u64 error_code, u64 *sptep, u64 old, int ret)
{
	struct kvm_page_fault fault = { .addr = addr, .error_code = error_code };

	emit(fast_page_fault, vcpu, &fault, sptep, old, ret);
}

void rmmu_trace_handle_mmio_page_fault(u64 addr, gfn_t gfn, unsigned int access)
{
	emit(handle_mmio_page_fault, addr, gfn, access);
}

void rmmu_trace_check_mmio_spte(u64 spte, unsigned int kvm_gen, unsigned int spte_gen)
{
	emit(check_mmio_spte, spte, kvm_gen, spte_gen);
}

void rmmu_trace_mark_mmio_spte(u64 *sptep, gfn_t gfn, u64 spte)
{
	emit(mark_mmio_spte, sptep, gfn, spte);
}

void rmmu_trace_spte_requested(u64 gfn, u64 pfn, int goal_level, u8 access)
{
	struct kvm_page_fault fault = { .gfn = gfn, .pfn = pfn, .goal_level = goal_level };

	emit(kvm_mmu_spte_requested, &fault, access);
}

void rmmu_trace_set_spte(int level, gfn_t gfn, u64 *sptep)
{
	emit(kvm_mmu_set_spte, level, gfn, sptep);
}

void rmmu_trace_spte_changed(int as_id, gfn_t gfn, int level, u64 old, u64 new)
{
	emit(kvm_tdp_mmu_spte_changed, as_id, gfn, level, old, new);
}

/* The events look at these fields only. */
static struct kvm_mmu_page mmu_page(const struct rmmu_traced_page *page)
{
	return (struct kvm_mmu_page) {
		.gfn = page->gfn, .role.word = page->role, .root_count = page->root_count,
		.mmu_valid_gen = page->generation, .unsync = page->unsync,
	};
}

void rmmu_trace_get_page(const struct rmmu_traced_page *page, bool created)
{
	struct kvm_mmu_page sp = mmu_page(page);

	emit(kvm_mmu_get_page, &sp, created);
}

void rmmu_trace_sync_page(const struct rmmu_traced_page *page)
{
	struct kvm_mmu_page sp = mmu_page(page);

	emit(kvm_mmu_sync_page, &sp);
}

void rmmu_trace_unsync_page(const struct rmmu_traced_page *page)
{
	struct kvm_mmu_page sp = mmu_page(page);

	emit(kvm_mmu_unsync_page, &sp);
}

void rmmu_trace_prepare_zap_page(const struct rmmu_traced_page *page)
{
	struct kvm_mmu_page sp = mmu_page(page);

	emit(kvm_mmu_prepare_zap_page, &sp);
}

void rmmu_trace_split_huge_page(u64 gfn, u64 spte, int level, int error)
{
	emit(kvm_mmu_split_huge_page, gfn, spte, level, error);
}

void rmmu_trace_zap_all_fast(struct kvm *kvm)
{
	emit(kvm_mmu_zap_all_fast, kvm);
}

void rmmu_trace_pagetable_walk(u64 addr, u32 kind)
{
	emit(kvm_mmu_pagetable_walk, addr, kind);
}

void rmmu_trace_paging_element(u64 entry, int level)
{
	emit(kvm_mmu_paging_element, entry, level);
}

/* The events multiply index and size again. */
void rmmu_trace_set_accessed_bit(u64 gfn, unsigned int offset)
{
	emit(kvm_mmu_set_accessed_bit, gfn, offset, 1);
}

void rmmu_trace_set_dirty_bit(u64 gfn, unsigned int offset)
{
	emit(kvm_mmu_set_dirty_bit, gfn, offset, 1);
}

void rmmu_trace_walker_error(u32 error_code)
{
	emit(kvm_mmu_walker_error, error_code);
}

void rmmu_trace_try_async_get_page(u64 addr, u64 gfn)
{
	emit(kvm_try_async_get_page, addr, gfn);
}

void rmmu_trace_async_pf_repeated_fault(u64 addr, u64 gfn)
{
	emit(kvm_async_pf_repeated_fault, addr, gfn);
}

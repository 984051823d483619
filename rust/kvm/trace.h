/* SPDX-License-Identifier: GPL-2.0 */
/* kvm.ko's tracepoints: which are switched on, and how to emit them. */
#ifndef RMMU_TRACE_H
#define RMMU_TRACE_H

#include <linux/kvm_host.h>
#include <linux/tracepoint-defs.h>
#include "glue.h"

#define RMMU_EVENT(event, proto) RMMU_EVENT_##event,
enum rmmu_event {
#include "events.h"
	RMMU_EVENTS
};
#undef RMMU_EVENT

/* The iterators that call an event's probes: bound like other functions of kvm.ko. */
extern const struct rmmu_function rmmu_iterators[];
extern const unsigned long rmmu_iterators_len;

/* An event's own key, which says whether anybody listens; NULL until bound. */
extern struct static_key *rmmu_event_keys[RMMU_EVENTS];
void rmmu_bind_event(unsigned int event, struct tracepoint *tracepoint);

/* What the events about a page show. A table of the TDP MMU has none of the last three. */
struct rmmu_traced_page {
	u64 gfn;
	u32 role;
	u32 root_count;
	u8 generation;
	bool unsync;
};

void rmmu_trace_fast_page_fault(struct kvm_vcpu *vcpu, u64 addr, u64 error_code, u64 *sptep, u64 old, int ret);
void rmmu_trace_handle_mmio_page_fault(u64 addr, gfn_t gfn, unsigned int access);
void rmmu_trace_check_mmio_spte(u64 spte, unsigned int kvm_gen, unsigned int spte_gen);
void rmmu_trace_mark_mmio_spte(u64 *sptep, gfn_t gfn, u64 spte);
void rmmu_trace_spte_requested(u64 gfn, u64 pfn, int goal_level, u8 access);
void rmmu_trace_set_spte(int level, gfn_t gfn, u64 *sptep);
void rmmu_trace_spte_changed(int as_id, gfn_t gfn, int level, u64 old, u64 new);
void rmmu_trace_get_page(const struct rmmu_traced_page *page, bool created);
void rmmu_trace_sync_page(const struct rmmu_traced_page *page);
void rmmu_trace_unsync_page(const struct rmmu_traced_page *page);
void rmmu_trace_prepare_zap_page(const struct rmmu_traced_page *page);
void rmmu_trace_split_huge_page(u64 gfn, u64 spte, int level, int error);
void rmmu_trace_zap_all_fast(struct kvm *kvm);
void rmmu_trace_pagetable_walk(u64 addr, u32 kind);
void rmmu_trace_paging_element(u64 entry, int level);
void rmmu_trace_set_accessed_bit(u64 gfn, unsigned int offset);
void rmmu_trace_set_dirty_bit(u64 gfn, unsigned int offset);
void rmmu_trace_walker_error(u32 error_code);
void rmmu_trace_try_async_get_page(u64 addr, u64 gfn);
void rmmu_trace_async_pf_repeated_fault(u64 addr, u64 gfn);

#endif

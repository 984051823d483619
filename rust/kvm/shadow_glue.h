/* SPDX-License-Identifier: GPL-2.0 */
/* As glue.h, for what only the legacy MMU needs: the guest's page tables, metadata of slots, caches. */
#ifndef RMMU_SHADOW_GLUE_H
#define RMMU_SHADOW_GLUE_H

#include <linux/kvm_host.h>

/* The guest's paging */
u64 rmmu_guest_pgd(struct kvm_vcpu *vcpu, struct kvm_mmu *mmu);
u64 rmmu_guest_pdptr(struct kvm_vcpu *vcpu, struct kvm_mmu *mmu, int index);
bool rmmu_guest_pae(struct kvm_vcpu *vcpu);
bool rmmu_guest_ac(struct kvm_vcpu *vcpu);
void rmmu_inject_page_fault(struct kvm_vcpu *vcpu, u64 address, u64 error_code, bool nested, unsigned long qualification);
bool rmmu_log_nested_dirty(struct kvm_vcpu *vcpu, gpa_t gpa);

/* The guest's memory */
unsigned long rmmu_guest_page(struct kvm_vcpu *vcpu, const struct kvm_memory_slot **last, gfn_t gfn, bool *writable);
bool rmmu_read_entry(unsigned long hva, unsigned int bytes, u64 *entry);
bool rmmu_read_entry_now(unsigned long hva, unsigned int bytes, u64 *entry);
bool rmmu_read_entries_now(unsigned long hva, unsigned int bytes, unsigned int count, u64 *entries);
int rmmu_cmpxchg_entry(unsigned long hva, unsigned int bytes, u64 old, u64 new);

/* Faults */
unsigned long rmmu_rip(struct kvm_vcpu *vcpu);
bool rmmu_event_needs_reinjection(struct kvm_vcpu *vcpu);
void rmmu_mmio_forget_gva(struct kvm_vcpu *vcpu, u64 gva);
void rmmu_request_sync(struct kvm_vcpu *vcpu);
void rmmu_request_flush(struct kvm_vcpu *vcpu);
void rmmu_request_free_obsolete_roots(struct kvm_vcpu *vcpu);
bool rmmu_free_obsolete_roots_pending(struct kvm_vcpu *vcpu);
u64 rmmu_page_to_pfn(struct page *page);

/* Roots that are no shadow pages */
u64 rmmu_dummy_root(void);
void *rmmu_zeroed_page(void);

/* Metadata of slots */
bool rmmu_shadow_root_allocated(struct kvm *kvm);
void rmmu_set_shadow_root_allocated(struct kvm *kvm);
void rmmu_slots_arch_lock(struct kvm *kvm);
void rmmu_slots_arch_unlock(struct kvm *kvm);
int rmmu_alloc_slot_metadata(struct kvm *kvm);
const struct kvm_memory_slot *rmmu_find_slot(struct kvm *kvm, bool smm, gfn_t gfn);
const struct kvm_memory_slot *rmmu_next_slot(struct kvm *kvm, bool smm, gfn_t start, gfn_t end);
void rmmu_slot_track_writes(const struct kvm_memory_slot *slot, gfn_t gfn, int count);
int rmmu_slot_lpage_count(const struct kvm_memory_slot *slot, gfn_t gfn, int level);
bool rmmu_others_track_writes(struct kvm *kvm);
void rmmu_slot_disallow_lpage(const struct kvm_memory_slot *slot, gfn_t gfn, int count);
bool rmmu_lpage_allowed(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn);

/* Locks and caches */
void rmmu_unsync_lock(struct kvm *kvm);
void rmmu_unsync_unlock(struct kvm *kvm);
void *rmmu_take_page_hash(struct kvm *kvm, size_t bytes);
void rmmu_free_page_hash(void *hash);
void rmmu_desc_free(struct kvm *kvm, void *desc);

#endif

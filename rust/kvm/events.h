/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints of kvm.ko that rmmu emits for VMs of ours, one a line: RMMU_EVENT(event, "prototype of its iterator in BTF's
 * words").
 *
 * Those of the event group kvmmmu, and two of kvm.ko's own about asynchronous page faults.
 *
 * Included several times, with different definitions of RMMU_EVENT: no include guard.
 */
RMMU_EVENT(fast_page_fault, "int(void *, struct kvm_vcpu *, struct kvm_page_fault *, u64 *, u64, int)")
RMMU_EVENT(handle_mmio_page_fault, "int(void *, u64, gfn_t, unsigned int)")
RMMU_EVENT(check_mmio_spte, "int(void *, u64, unsigned int, unsigned int)")
RMMU_EVENT(mark_mmio_spte, "int(void *, u64 *, gfn_t, u64)")
RMMU_EVENT(kvm_mmu_spte_requested, "int(void *, struct kvm_page_fault *, u8)")
RMMU_EVENT(kvm_mmu_set_spte, "int(void *, int, gfn_t, u64 *)")
RMMU_EVENT(kvm_tdp_mmu_spte_changed, "int(void *, int, gfn_t, int, u64, u64)")
RMMU_EVENT(kvm_mmu_get_page, "int(void *, struct kvm_mmu_page *, bool)")
RMMU_EVENT(kvm_mmu_sync_page, "int(void *, struct kvm_mmu_page *)")
RMMU_EVENT(kvm_mmu_unsync_page, "int(void *, struct kvm_mmu_page *)")
RMMU_EVENT(kvm_mmu_prepare_zap_page, "int(void *, struct kvm_mmu_page *)")
RMMU_EVENT(kvm_mmu_split_huge_page, "int(void *, u64, u64, int, int)")
RMMU_EVENT(kvm_mmu_zap_all_fast, "int(void *, struct kvm *)")
RMMU_EVENT(kvm_mmu_pagetable_walk, "int(void *, u64, u32)")
RMMU_EVENT(kvm_mmu_paging_element, "int(void *, u64, int)")
RMMU_EVENT(kvm_mmu_set_accessed_bit, "int(void *, long unsigned int, unsigned int, unsigned int)")
RMMU_EVENT(kvm_mmu_set_dirty_bit, "int(void *, long unsigned int, unsigned int, unsigned int)")
RMMU_EVENT(kvm_mmu_walker_error, "int(void *, u32)")
RMMU_EVENT(kvm_try_async_get_page, "int(void *, u64, u64)")
RMMU_EVENT(kvm_async_pf_repeated_fault, "int(void *, u64, u64)")

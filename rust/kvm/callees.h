/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Functions of kvm.ko that rmmu calls, one a line: RMMU_CALL(function, "prototype in BTF's words").
 *
 * kvm.ko exports them to its vendor modules only, so each becomes a static call (a direct, patched branch; an indirect
 * call could hit a function whose ENDBR was sealed) that is bound when kvm.ko is there.
 *
 * Included several times, with different definitions of RMMU_CALL: no include guard.
 */
RMMU_CALL(x86_emulate_instruction, "int(struct kvm_vcpu *, gpa_t, int, void *, int)")
RMMU_CALL(kvm_vcpu_gfn_to_memslot, "struct kvm_memory_slot *(struct kvm_vcpu *, gfn_t)")
RMMU_CALL(kvm_mmu_topup_memory_cache, "int(struct kvm_mmu_memory_cache *, int)")
RMMU_CALL(kvm_mmu_memory_cache_alloc, "void *(struct kvm_mmu_memory_cache *)")
RMMU_CALL(__kvm_faultin_pfn, "kvm_pfn_t(const struct kvm_memory_slot *, gfn_t, unsigned int, bool *, struct page **)")
RMMU_CALL(kvm_gmem_get_pfn, "int(struct kvm *, struct kvm_memory_slot *, gfn_t, kvm_pfn_t *, struct page **, int *)")
RMMU_CALL(kvm_release_page_clean, "void(struct page *)")
RMMU_CALL(kvm_release_page_dirty, "void(struct page *)")
RMMU_CALL(mark_page_dirty_in_slot, "void(struct kvm *, const struct kvm_memory_slot *, gfn_t)")
RMMU_CALL(kvm_can_do_async_pf, "bool(struct kvm_vcpu *)")
RMMU_CALL(kvm_find_async_pf_gfn, "bool(struct kvm_vcpu *, gfn_t)")
RMMU_CALL(kvm_setup_async_pf, "bool(struct kvm_vcpu *, gpa_t, long unsigned int, struct kvm_arch_async_pf *)")
RMMU_CALL(kvm_vcpu_gfn_to_hva, "long unsigned int(struct kvm_vcpu *, gfn_t)")
RMMU_CALL(kvm_apicv_activated, "bool(struct kvm *)")
RMMU_CALL(kvm_gfn_is_write_tracked, "bool(struct kvm *, const struct kvm_memory_slot *, gfn_t)")
RMMU_CALL(kvm_flush_remote_tlbs, "void(struct kvm *)")
RMMU_CALL(kvm_flush_remote_tlbs_range, "void(struct kvm *, gfn_t, u64)")
RMMU_CALL(kvm_make_all_cpus_request, "bool(struct kvm *, unsigned int)")
RMMU_CALL(kvm_mmu_invalidate_start, "void(struct kvm *)")
RMMU_CALL(kvm_mmu_invalidate_range_add, "void(struct kvm *, gfn_t, gfn_t)")
RMMU_CALL(kvm_mmu_invalidate_end, "void(struct kvm *)")
RMMU_CALL(memslot_rmap_alloc, "int(struct kvm_memory_slot *, long unsigned int)")
RMMU_CALL(kvm_page_track_write_tracking_alloc, "int(struct kvm_memory_slot *)")
RMMU_CALL(kvm_prefetch_pages, "int(struct kvm_memory_slot *, gfn_t, struct page **, int)")
RMMU_CALL(kvm_vcpu_read_guest_atomic, "int(struct kvm_vcpu *, gpa_t, void *, long unsigned int)")
RMMU_CALL(kvm_vcpu_mark_page_dirty, "void(struct kvm_vcpu *, gfn_t)")
RMMU_CALL(kvm_vcpu_is_visible_gfn, "bool(struct kvm_vcpu *, gfn_t)")
RMMU_CALL(kvm_get_rflags, "long unsigned int(struct kvm_vcpu *)")
RMMU_CALL(__kvm_inject_emulated_page_fault, "void(struct kvm_vcpu *, struct x86_exception *, bool)")
RMMU_CALL(kvm_mmu_gva_to_gpa_write, "gpa_t(struct kvm_vcpu *, gva_t, struct x86_exception *)")
RMMU_CALL(__kvm_mmu_topup_memory_cache, "int(struct kvm_mmu_memory_cache *, int, int)")

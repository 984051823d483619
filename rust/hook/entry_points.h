/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The hook table: every entry point of KVM's MMU that works on page tables or roots of a VM, one a line.
 *
 *	RMMU_HOOK(function, OWNER, "prototype in BTF's words")
 *
 * OWNER says where the stub finds the VM whose owner it tests: VCPU (first argument is a vCPU), VM (first argument is the
 * VM), FILE (first argument is the VM's file), or ANY (always ours: the function that decides who owns a VM). The Rust handler of FUNCTION is rmmu_FUNCTION, in
 * rust/hook/entry.rs. scripts/check-hooks compares this table with what the kernel's objects let others reach.
 *
 * RMMU_WALK is the struct that says how a guest pages, whose name depends on the kernel (rust/kvm/walk.h).
 *
 * Included several times, with different definitions of RMMU_HOOK: no include guard.
 */
/* hook-table-begin */
/* Life of a VM and of its roots */
RMMU_HOOK(kvm_mmu_init_vm, ANY, "int(struct kvm *)")
RMMU_HOOK(kvm_mmu_uninit_vm, VM, "void(struct kvm *)")
RMMU_HOOK(kvm_mmu_load, VCPU, "int(struct kvm_vcpu *)")
RMMU_HOOK(kvm_mmu_unload, VCPU, "void(struct kvm_vcpu *)")
RMMU_HOOK(kvm_mmu_reset_context, VCPU, "void(struct kvm_vcpu *)")
RMMU_HOOK(kvm_mmu_after_set_cpuid, VCPU, "void(struct kvm_vcpu *)")
RMMU_HOOK(kvm_mmu_destroy, VCPU, "void(struct kvm_vcpu *)")
RMMU_HOOK(kvm_mmu_new_pgd, VCPU, "void(struct kvm_vcpu *, gpa_t)")
RMMU_HOOK(kvm_mmu_free_roots, VM, "void(struct kvm *, struct kvm_mmu *, ulong)")
RMMU_HOOK(kvm_mmu_free_guest_mode_roots, VM, "void(struct kvm *, struct kvm_mmu *)")
RMMU_HOOK(kvm_mmu_free_obsolete_roots, VCPU, "void(struct kvm_vcpu *)")
RMMU_HOOK(kvm_mmu_sync_roots, VCPU, "void(struct kvm_vcpu *)")
RMMU_HOOK(kvm_mmu_sync_prev_roots, VCPU, "void(struct kvm_vcpu *)")
/* Faults */
RMMU_HOOK(kvm_mmu_page_fault, VCPU, "int(struct kvm_vcpu *, gpa_t, u64, void *, int)")
RMMU_HOOK(kvm_arch_async_page_ready, VCPU, "void(struct kvm_vcpu *, struct kvm_async_pf *)")
RMMU_HOOK(kvm_arch_vcpu_pre_fault_memory, VCPU, "long int(struct kvm_vcpu *, struct kvm_pre_fault_memory *)")
/* Keeping shadow pages in step with the guest's tables */
RMMU_HOOK(kvm_mmu_track_write, VCPU, "void(struct kvm_vcpu *, gpa_t, const u8 *, int)")
RMMU_HOOK(__kvm_mmu_unprotect_gfn_and_retry, VCPU, "bool(struct kvm_vcpu *, gpa_t, bool)")
RMMU_HOOK(kvm_mmu_invalidate_addr, VCPU, "void(struct kvm_vcpu *, " RMMU_WALK " *, u64, long unsigned int)")
RMMU_HOOK(kvm_mmu_change_mmu_pages, VM, "void(struct kvm *, long unsigned int)")
RMMU_HOOK(kvm_mmu_print_sptes, VCPU, "void(struct kvm_vcpu *, gpa_t, const char *)")
/* mmu_notifier */
RMMU_HOOK(kvm_unmap_gfn_range, VM, "bool(struct kvm *, struct kvm_gfn_range *)")
RMMU_HOOK(kvm_age_gfn, VM, "bool(struct kvm *, struct kvm_gfn_range *)")
RMMU_HOOK(kvm_test_age_gfn, VM, "bool(struct kvm *, struct kvm_gfn_range *)")
RMMU_HOOK(kvm_arch_flush_shadow_all, VM, "void(struct kvm *)")
/* Memory slots */
RMMU_HOOK(kvm_arch_flush_shadow_memslot, VM, "void(struct kvm *, struct kvm_memory_slot *)")
RMMU_HOOK(kvm_mmu_invalidate_mmio_sptes, VM, "void(struct kvm *, u64)")
RMMU_HOOK(kvm_zap_gfn_range, VM, "void(struct kvm *, gfn_t, gfn_t)")
RMMU_HOOK(__kvm_mmu_zap_all_fast_front_half, VM, "void(struct kvm *)")
RMMU_HOOK(kvm_tdp_mmu_zap_invalidated_roots, VM, "void(struct kvm *, bool)")
/* Dirty logging and huge pages */
RMMU_HOOK(kvm_mmu_slot_remove_write_access, VM, "void(struct kvm *, const struct kvm_memory_slot *, int)")
RMMU_HOOK(kvm_mmu_slot_gfn_write_protect, VM, "bool(struct kvm *, struct kvm_memory_slot *, u64, int)")
RMMU_HOOK(kvm_arch_mmu_enable_log_dirty_pt_masked, VM, "void(struct kvm *, struct kvm_memory_slot *, gfn_t, long unsigned int)")
RMMU_HOOK(kvm_mmu_slot_leaf_clear_dirty, VM, "void(struct kvm *, const struct kvm_memory_slot *)")
RMMU_HOOK(kvm_mmu_try_split_huge_pages, VM, "void(struct kvm *, const struct kvm_memory_slot *, u64, u64, int)")
RMMU_HOOK(kvm_mmu_slot_try_split_huge_pages, VM, "void(struct kvm *, const struct kvm_memory_slot *, int)")
RMMU_HOOK(kvm_mmu_recover_huge_pages, VM, "void(struct kvm *, const struct kvm_memory_slot *)")
/* The worker that gives back what the NX huge page mitigation split */
RMMU_HOOK(kvm_nx_huge_page_recovery_worker, VM, "bool(void *)")
/* hook-table-end */
/* Not the MMU's: the ways in which a VM of the default type can become an encrypted one later */
RMMU_HOOK(kvm_arch_vm_ioctl, FILE, "int(struct file *, unsigned int, long unsigned int)")
RMMU_HOOK(kvm_vm_ioctl_enable_cap, VM, "int(struct kvm *, struct kvm_enable_cap *)")

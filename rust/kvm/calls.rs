// SPDX-License-Identifier: GPL-2.0

//! Functions of kvm.ko, each behind a static call: a direct branch that is patched when kvm.ko is there.
//!
//! `calls.h` declares the calls with the types that the kernel's headers give the functions, and bindgen takes them from there;
//! the prototypes of `callees.h` are compared with the running kernel's BTF before anything is bound. `orig` has the hooked
//! functions themselves, past their patched entry.

/// Names trampolines like the functions that they go to.
macro_rules! trampolines {
    ($prefix:ident: $($name:ident,)*) => {
        ::kernel::macros::paste! {
            $(pub(crate) use $crate::kvm::bindings::[<__SCT__ $prefix _ $name>] as $name;)*
        }
    };
}

trampolines! {
    rmmu_call:
    x86_emulate_instruction,
    kvm_vcpu_gfn_to_memslot,
    kvm_mmu_topup_memory_cache,
    kvm_mmu_memory_cache_alloc,
    __kvm_faultin_pfn,
    kvm_gmem_get_pfn,
    kvm_release_page_clean,
    kvm_release_page_dirty,
    mark_page_dirty_in_slot,
    kvm_can_do_async_pf,
    kvm_find_async_pf_gfn,
    kvm_setup_async_pf,
    kvm_vcpu_gfn_to_hva,
    kvm_apicv_activated,
    kvm_gfn_is_write_tracked,
    kvm_flush_remote_tlbs,
    kvm_flush_remote_tlbs_range,
    kvm_make_all_cpus_request,
    kvm_mmu_invalidate_start,
    kvm_mmu_invalidate_range_add,
    kvm_mmu_invalidate_end,
    kvm_prefetch_pages,
    kvm_vcpu_read_guest_atomic,
    kvm_vcpu_mark_page_dirty,
    kvm_vcpu_is_visible_gfn,
    kvm_mmu_gva_to_gpa_write,
    __kvm_mmu_topup_memory_cache,
}

/// Functions of the core kernel that are not exported.
pub(crate) mod core_kernel {
    trampolines! {
        rmmu_core:
        kallsyms_lookup_name,
        alloc_ftrace_hash,
        free_ftrace_hash,
        add_ftrace_hash_entry_direct,
        update_ftrace_direct_add,
        update_ftrace_direct_del,
        ftrace_location,
        ftrace_find_rec_direct,
        btf_put,
    }
}

/// Operations of the vendor module.
pub(crate) mod vendor {
    trampolines! {
        rmmu_x86:
        load_mmu_pgd,
        flush_tlb_current,
        get_mt_mask,
    }
}

/// The hooked functions that a handler goes on into.
pub(crate) mod orig {
    trampolines! {
        rmmu_orig:
        kvm_mmu_init_vm,
        kvm_mmu_uninit_vm,
        kvm_mmu_destroy,
        kvm_mmu_reset_context,
        kvm_mmu_after_set_cpuid,
        kvm_arch_vm_ioctl,
        kvm_vm_ioctl_enable_cap,
        kvm_mmu_invalidate_addr,
    }
}

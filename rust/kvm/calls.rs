// SPDX-License-Identifier: GPL-2.0

//! Functions of kvm.ko, each behind a static call: a direct branch that is patched when kvm.ko is there.
//!
//! The list is `callees.h`; its prototypes are compared with the running kernel's BTF before anything is bound.
//! `orig` has the hooked functions themselves, past their patched entry.

use crate::kvm::bindings::*;
use core::ffi::{c_int, c_void};

/// Declares trampolines under the plain name of the function.
macro_rules! static_calls {
    ($($(#[$meta:meta])* $name:ident = $symbol:literal ($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        // C structs without members (locks without lockdep) are only ever pointed at.
        #[allow(improper_ctypes)]
        extern "C" {
            $(
                $(#[$meta])*
                #[link_name = $symbol]
                pub(crate) fn $name($(_: $arg),*) $(-> $ret)?;
            )*
        }
    };
}

static_calls! {
    x86_emulate_instruction = "__SCT__rmmu_call_x86_emulate_instruction"(*mut kvm_vcpu, u64, c_int, *mut c_void, c_int) -> c_int;
    kvm_vcpu_gfn_to_memslot = "__SCT__rmmu_call_kvm_vcpu_gfn_to_memslot"(*mut kvm_vcpu, u64) -> *mut kvm_memory_slot;
    kvm_mmu_topup_memory_cache = "__SCT__rmmu_call_kvm_mmu_topup_memory_cache"(*mut kvm_mmu_memory_cache, c_int) -> c_int;
    kvm_mmu_memory_cache_alloc = "__SCT__rmmu_call_kvm_mmu_memory_cache_alloc"(*mut kvm_mmu_memory_cache) -> *mut c_void;
    __kvm_faultin_pfn = "__SCT__rmmu_call___kvm_faultin_pfn"(*const kvm_memory_slot, u64, u32, *mut bool, *mut *mut page) -> u64;
    kvm_gmem_get_pfn = "__SCT__rmmu_call_kvm_gmem_get_pfn"(*mut kvm, *mut kvm_memory_slot, u64, *mut u64, *mut *mut page, *mut c_int) -> c_int;
    kvm_release_page_clean = "__SCT__rmmu_call_kvm_release_page_clean"(*mut page);
    kvm_release_page_dirty = "__SCT__rmmu_call_kvm_release_page_dirty"(*mut page);
    mark_page_dirty_in_slot = "__SCT__rmmu_call_mark_page_dirty_in_slot"(*mut kvm, *const kvm_memory_slot, u64);
    kvm_can_do_async_pf = "__SCT__rmmu_call_kvm_can_do_async_pf"(*mut kvm_vcpu) -> bool;
    kvm_find_async_pf_gfn = "__SCT__rmmu_call_kvm_find_async_pf_gfn"(*mut kvm_vcpu, u64) -> bool;
    kvm_setup_async_pf = "__SCT__rmmu_call_kvm_setup_async_pf"(*mut kvm_vcpu, u64, usize, *mut kvm_arch_async_pf) -> bool;
    kvm_vcpu_gfn_to_hva = "__SCT__rmmu_call_kvm_vcpu_gfn_to_hva"(*mut kvm_vcpu, u64) -> usize;
    kvm_apicv_activated = "__SCT__rmmu_call_kvm_apicv_activated"(*mut kvm) -> bool;
    kvm_gfn_is_write_tracked = "__SCT__rmmu_call_kvm_gfn_is_write_tracked"(*mut kvm, *const kvm_memory_slot, u64) -> bool;
    kvm_flush_remote_tlbs = "__SCT__rmmu_call_kvm_flush_remote_tlbs"(*mut kvm);
    kvm_flush_remote_tlbs_range = "__SCT__rmmu_call_kvm_flush_remote_tlbs_range"(*mut kvm, u64, u64);
    kvm_make_all_cpus_request = "__SCT__rmmu_call_kvm_make_all_cpus_request"(*mut kvm, u32) -> bool;
    kvm_mmu_invalidate_start = "__SCT__rmmu_call_kvm_mmu_invalidate_start"(*mut kvm);
    kvm_mmu_invalidate_range_add = "__SCT__rmmu_call_kvm_mmu_invalidate_range_add"(*mut kvm, u64, u64);
    kvm_mmu_invalidate_end = "__SCT__rmmu_call_kvm_mmu_invalidate_end"(*mut kvm);
    kvm_prefetch_pages = "__SCT__rmmu_call_kvm_prefetch_pages"(*mut kvm_memory_slot, u64, *mut *mut page, c_int) -> c_int;
    kvm_vcpu_read_guest_atomic = "__SCT__rmmu_call_kvm_vcpu_read_guest_atomic"(*mut kvm_vcpu, u64, *mut c_void, usize) -> c_int;
    kvm_vcpu_mark_page_dirty = "__SCT__rmmu_call_kvm_vcpu_mark_page_dirty"(*mut kvm_vcpu, u64);
    kvm_vcpu_is_visible_gfn = "__SCT__rmmu_call_kvm_vcpu_is_visible_gfn"(*mut kvm_vcpu, u64) -> bool;
    kvm_mmu_gva_to_gpa_write = "__SCT__rmmu_call_kvm_mmu_gva_to_gpa_write"(*mut kvm_vcpu, u64, *mut x86_exception) -> u64;
    __kvm_mmu_topup_memory_cache = "__SCT__rmmu_call___kvm_mmu_topup_memory_cache"(*mut kvm_mmu_memory_cache, c_int, c_int) -> c_int;
}

/// Operations of the vendor module.
pub(crate) mod vendor {
    use super::*;

    static_calls! {
        load_mmu_pgd = "__SCT__rmmu_x86_load_mmu_pgd"(*mut kvm_vcpu, u64, c_int);
        flush_tlb_current = "__SCT__rmmu_x86_flush_tlb_current"(*mut kvm_vcpu);
        get_mt_mask = "__SCT__rmmu_x86_get_mt_mask"(*mut kvm_vcpu, u64, bool) -> u8;
    }
}

/// The hooked functions that a handler goes on into.
pub(crate) mod orig {
    use super::*;

    static_calls! {
        kvm_mmu_init_vm = "__SCT__rmmu_orig_kvm_mmu_init_vm"(*mut kvm) -> c_int;
        kvm_mmu_uninit_vm = "__SCT__rmmu_orig_kvm_mmu_uninit_vm"(*mut kvm);
        kvm_mmu_destroy = "__SCT__rmmu_orig_kvm_mmu_destroy"(*mut kvm_vcpu);
        kvm_mmu_reset_context = "__SCT__rmmu_orig_kvm_mmu_reset_context"(*mut kvm_vcpu);
        kvm_mmu_after_set_cpuid = "__SCT__rmmu_orig_kvm_mmu_after_set_cpuid"(*mut kvm_vcpu);
        kvm_arch_vm_ioctl = "__SCT__rmmu_orig_kvm_arch_vm_ioctl"(*mut file, u32, u64) -> c_int;
        kvm_vm_ioctl_enable_cap = "__SCT__rmmu_orig_kvm_vm_ioctl_enable_cap"(*mut kvm, *mut kvm_enable_cap) -> c_int;
        kvm_mmu_invalidate_addr = "__SCT__rmmu_orig_kvm_mmu_invalidate_addr"(*mut kvm_vcpu, *mut crate::kvm::walk::Walk, u64, usize);
    }
}

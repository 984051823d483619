// SPDX-License-Identifier: GPL-2.0

//! The check that the running kernel is the one this module was compiled for.
//!
//! It comes before anything is bound or patched. What is compared is the size of each struct we look into, the place
//! of each field we use, and the prototype of each function we hook or call, with the BTF of the running kernel and of
//! the kvm.ko that is loaded.

use crate::{
    kvm::{
        bindings,
        btf::{self, Bits, Btf, Expected, Field, Layout, Mismatch, Wanted},
        calls::core_kernel,
        symbols,
    },
    mmu::{role::Role, shadow::role},
};
use core::{
    mem::{offset_of, size_of},
    ptr::NonNull,
};
use kernel::{prelude::*, str::CStr};

/// A function that only kvm.ko has: whose BTF has it is kvm.ko's.
const KVM_FUNCTION: &CStr = c"kvm_mmu_page_fault";

/// The size of what a function's result points to: of a field, for a function that gives the field's address.
const fn pointee<T, F>(_: fn(*const T) -> *const F) -> usize {
    size_of::<F>()
}

/// Where the bits are that a setter of bindgen's sets.
fn mask<T: Default>(set: impl FnOnce(&mut T)) -> u64 {
    let mut bits = T::default();
    set(&mut bits);
    let mut mask = 0u64;
    let len = size_of::<T>().min(size_of::<u64>());
    // SAFETY: both are at least so long, and bitfields that are set or zero are initialised.
    unsafe {
        core::ptr::from_ref(&bits)
            .cast::<u8>()
            .copy_to_nonoverlapping((&raw mut mask).cast(), len)
    };
    mask
}

// `struct { field, ... }`, and of bitfields `[type of bindgen's that has them]: name by setter, ...`.
macro_rules! layouts {
    ($($name:ident { $($($field:ident).+),* $(,)? } $([$type:ident]: $($bits:ident by $set:ident),+;)?)*) => {
        &[$(Layout {
            name: stringify!($name),
            size: size_of::<bindings::$name>(),
            fields: &[$(Field {
                path: concat!($(stringify!($field), "."),+),
                offset: offset_of!(bindings::$name, $($field).+),
                // SAFETY: never called; only its type is looked at.
                size: pointee(|whole: *const bindings::$name| unsafe { &raw const (*whole).$($field).+ }),
            }),*],
            bits: &[$($(Bits { name: stringify!($bits), mask: || mask::<bindings::$type>(|all| all.$set(!0)) }),+)?],
        }),*]
    };
}

/// What rmmu, and KVM's inline functions in it, know of KVM's structs on every kernel.
static LAYOUTS: &[Layout] = layouts! {
    kvm {
        mmu_lock, slots_lock, mm, memslots, nr_memslots_dirty_logging, stat, arch, users_count,
        mmu_invalidate_seq, mmu_invalidate_in_progress, mmu_invalidate_range_start, mmu_invalidate_range_end,
        manual_dirty_log_protect, debugfs_dentry, srcu, userspace_pid, vm_bugged, vm_dead, slots_arch_lock,
    }
    kvm_arch {
        indirect_shadow_pages, mmu_valid_gen, vm_type, pre_fault_allowed, active_mmu_pages, shadow_mmio_value,
        tdp_mmu_roots, tdp_mmu_pages_lock, disable_nx_huge_pages, nx_huge_page_last, cpu_dirty_log_size,
        n_max_mmu_pages, mmu_page_hash, mmu_unsync_pages_lock, shadow_root_allocated,
        split_page_header_cache, split_shadow_page_cache, split_desc_cache, disabled_quirks, has_private_mem, has_mapped_host_mmio,
    }
    kvm_vm_stat {
        mmu_shadow_zapped, mmu_pte_write, mmu_pde_zapped, mmu_flooded, mmu_recycled, mmu_cache_miss, mmu_unsync,
        mmu_shadow_pages, nx_lpage_splits, max_mmu_page_hash_collisions, max_mmu_rmap_size, __bindgen_anon_1.pages,
    }
    kvm_vcpu { kvm, vcpu_id, vcpu_idx, requests, stat, arch, run }
    kvm_vcpu_arch {
        mmu, root_mmu, guest_mmu, mmu_shadow_page_cache, mmu_page_header_cache, apf, apf.id, mmio_gva, mmio_access,
        mmio_gfn, mmio_gen, mmu_pte_list_desc_cache, mmu_shadowed_info_cache, pkru, rip, regs_avail,
        cr4, cr4_guest_owned_bits, last_retry_eip, last_retry_addr, exception.injected, interrupt.injected, nmi_injected, hflags,
    }
    kvm_vcpu_stat { pf_taken, pf_fixed, pf_emulate, pf_spurious, pf_fast, pf_mmio_spte_created, tlb_flush, signal_exits }
    kvm_mmu {
        page_fault, sync_spte, root, mirror_root_hpa, root_role, prev_roots, pae_root, pml4_root, pml5_root,
    }
    x86_exception {
        vector, error_code_valid, error_code, nested_page_fault, async_page_fault, exit_qualification,
        __bindgen_anon_1.address,
    }
    kvm_mmu_root_info { pgd, hpa }
    kvm_mmu_page {
        tdp_mmu_page, unsync, role, gfn, spt, __bindgen_anon_2.root_count, has_mapped_host_mmio, callback_head,
        __bindgen_anon_1.mmu_valid_gen,
    }
    kvm_mmu_page_role { word }
        [kvm_mmu_page_role__bindgen_ty_1]: level by set_level, has_4_byte_gpte by set_has_4_byte_gpte, direct by set_direct,
            access by set_access, ad_disabled by set_ad_disabled, guest_mode by set_guest_mode, smm by set_smm,
            cr0_wp by set_cr0_wp, cr4_smep by set_cr4_smep,
            quadrant by set_quadrant, invalid by set_invalid, passthrough by set_passthrough;
    kvm_cpu_role { __bindgen_anon_1.base, __bindgen_anon_1.ext }
    kvm_mmu_extended_role { word }
        [kvm_mmu_extended_role__bindgen_ty_1]: cr4_smap by set_cr4_smap, cr4_pse by set_cr4_pse,
            has_pferr_fetch by set_has_pferr_fetch;
    kvm_mmu_memory_cache { gfp_zero, init_value, kmem_cache, capacity, nobjs, objects }
    kvm_memory_slot { base_gfn, npages, dirty_bitmap, arch, userspace_addr, flags, id, id_node, as_id, gmem, gfn_node }
    kvm_arch_memory_slot { rmap, lpage_info, gfn_write_track }
    kvm_rmap_head { val }
    kvm_lpage_info { disallow_lpage }
    kvm_memslots { generation, gfn_tree, id_hash, node_idx, last_used_slot }
    kvm_gfn_range { slot, start, end, attr_filter, may_block, lockless }
    kvm_async_pf { cr2_or_gpa, arch, wakeup_all }
    kvm_arch_async_pf { token, gfn, cr3, direct_map, error_code }
    kvm_pre_fault_memory { gpa, size, flags }
    kvm_host_values { maxphyaddr }
    kvm_x86_ops { load_mmu_pgd, flush_tlb_current, get_mt_mask, cache_reg }
    kvm_x86_nested_ops { write_log_dirty }
    kvm_page_fault { addr, error_code, gfn, pfn, goal_level }
    tracepoint { key }
    ftrace_ops { func, flags, private, direct_call }
    file { private_data }
    module { name }
    notifier_block { notifier_call }
    kprobe { symbol_name, addr }
    static_key { enabled }
    list_head { next, prev }
    kvm_enable_cap { cap }
    kvm_run {
        exit_reason, __bindgen_anon_1.memory_fault.flags, __bindgen_anon_1.memory_fault.gpa,
        __bindgen_anon_1.memory_fault.size,
    }
    mm_struct { __bindgen_anon_1.pgd, __bindgen_anon_1.vma_writer_wait, __bindgen_anon_1.mm_lock_seq }
    vm_area_struct {
        __bindgen_anon_1.__bindgen_anon_1.vm_start, __bindgen_anon_1.__bindgen_anon_1.vm_end, vm_mm,
        __bindgen_anon_2.vm_flags, vm_refcnt,
    }
    folio { __bindgen_anon_1.page, __bindgen_anon_1.__bindgen_anon_1.flags, __bindgen_anon_1.__bindgen_anon_1.mapping }
    address_space { flags }
    page {
        flags, _refcount, __bindgen_anon_2.page_type, __bindgen_anon_1.__bindgen_anon_1.private, __bindgen_anon_1.__bindgen_anon_3.compound_info,
    }
};

/// The same of how a guest pages, where the context that shadows it has all of that.
#[cfg(not(rmmu_has_pagewalk))]
static WALK_LAYOUTS: &[Layout] = layouts! {
    kvm_vcpu_arch { nested_mmu, walk_mmu }
    kvm_mmu { get_guest_pgd, get_pdptr, cpu_role, pkru_mask, permissions, guest_rsvd_check }
    rsvd_bits_validate { rsvd_bits_mask, bad_mt_xwr }
};

/// The same of how a guest pages, where walks are apart from contexts.
#[cfg(rmmu_has_pagewalk)]
static WALK_LAYOUTS: &[Layout] = layouts! {
    kvm_vcpu_arch { ngpa_walk, gva_walk }
    kvm_mmu { w }
    kvm_pagewalk { get_guest_pgd, get_pdptr, cpu_role, fmt }
    kvm_page_format { rsvd_bits_mask, bad_mt_xwr, pkru_mask, permissions }
};

/// The same of where the vendor module's operations for nested guests are, where its table points to them.
#[cfg(not(rmmu_has_nested_ops_table))]
static NESTED_LAYOUTS: &[Layout] = layouts! { kvm_x86_ops { nested_ops } };

/// The same where kvm.ko has a copy of them.
#[cfg(rmmu_has_nested_ops_table)]
static NESTED_LAYOUTS: &[Layout] = &[];

/// The same of whether somebody outside of KVM tracks writes, where the kernel is configured for that.
#[cfg(CONFIG_KVM_EXTERNAL_WRITE_TRACKING)]
static TRACKING_LAYOUTS: &[Layout] = layouts! { kvm_arch { external_write_tracking_enabled } };

/// The same where KVM alone does.
#[cfg(not(CONFIG_KVM_EXTERNAL_WRITE_TRACKING))]
static TRACKING_LAYOUTS: &[Layout] = &[];

/// A reference to a BTF that the kernel has.
struct Loaded(NonNull<bindings::btf>);

impl Loaded {
    /// kvm.ko's BTF.
    fn of_kvm() -> Result<Self> {
        let mut found = core::ptr::null_mut();
        // SAFETY: the name is a string; on success `found` is a BTF with a reference that is ours.
        let id = unsafe {
            bindings::bpf_find_btf_id(
                KVM_FUNCTION.as_char_ptr(),
                bindings::BTF_KIND_FUNC,
                &mut found,
            )
        };
        match NonNull::new(found) {
            Some(btf) if id > 0 => Ok(Self(btf)),
            _ => {
                pr_err!("kvm.ko has no BTF (error {}): rmmu cannot tell whether it fits, and stays out\n", id);
                Err(ENOEXEC)
            }
        }
    }

    /// The blob, of which the kernel's own BTF tells where `struct btf` has it.
    fn raw(&self, kernel: &Btf<'_>) -> Result<&[u8]> {
        let place = |field, size| match kernel.locate("btf", field) {
            Ok(Some((offset, found))) if found == size => Ok(offset as usize),
            _ => {
                pr_err!(
                    "struct btf of the running kernel has no field {} of {} bytes\n",
                    field,
                    size
                );
                Err(ENOEXEC)
            }
        };
        let (data, len) = (place("data", 8)?, place("data_size", 4)?);
        // SAFETY: our reference keeps the BTF and its blob, neither of which changes; the kernel's BTF says that these
        // are the offsets of the blob's address and length in it.
        unsafe {
            let data = self.0.as_ptr().byte_add(data).cast::<*const u8>().read();
            let len = self.0.as_ptr().byte_add(len).cast::<u32>().read();
            Ok(core::slice::from_raw_parts(data, len as usize))
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: the reference is ours.
        unsafe { core_kernel::btf_put(self.0.as_ptr()) }
    }
}

/// The BTF of the kernel itself.
fn kernel_blob() -> Result<&'static [u8]> {
    let (Some(start), Some(stop)) = (
        symbols::lookup(c"__start_BTF"),
        symbols::lookup(c"__stop_BTF"),
    ) else {
        pr_err!("this kernel has no BTF: rmmu needs CONFIG_DEBUG_INFO_BTF\n");
        return Err(ENOEXEC);
    };
    // SAFETY: the linker's marks around a read-only section.
    Ok(unsafe { core::slice::from_raw_parts(start as *const u8, stop.saturating_sub(start)) })
}

/// Whether the fields of a role are where the engine has them in its word.
fn roles_fit() -> bool {
    macro_rules! field {
        ($set:ident) => {
            mask::<bindings::kvm_mmu_page_role__bindgen_ty_1>(|all| all.$set(!0))
        };
    }
    [
        (field!(set_level), role::LEVEL),
        (field!(set_has_4_byte_gpte), role::SMALL_ENTRIES),
        (field!(set_quadrant), role::QUADRANT),
        (field!(set_direct), role::DIRECT),
        (field!(set_access), role::ACCESS),
        (field!(set_invalid), role::INVALID),
        (field!(set_ad_disabled), role::AD_DISABLED),
        (field!(set_guest_mode), role::GUEST_MODE),
        (field!(set_passthrough), role::PASSTHROUGH),
        (field!(set_smm), 0xff << role::SMM_SHIFT),
    ]
    .into_iter()
    .all(|(kvm, ours)| kvm == u64::from(ours))
}

// The two engines have the same.
const _: () = assert!(Role::INVALID == role::INVALID && Role::LEVEL == role::LEVEL);

fn unreadable(which: &str) -> Error {
    pr_err!("the BTF of {} cannot be read\n", which);
    ENOEXEC
}

/// Room for the marks that a blob needs.
fn marks(blob: &[u8], which: &str) -> Result<KVVec<u32>> {
    let needed = Btf::marks_needed(blob).map_err(|_| unreadable(which))?;
    Ok(KVVec::from_elem(0, needed, GFP_KERNEL)?)
}

/// Compares the running kernel and its kvm.ko, which must be loaded, with what the module was compiled for. On a
/// difference says which, and fails.
pub fn check() -> Result {
    if !roles_fit() {
        pr_err!("the fields of union kvm_mmu_page_role are not where rmmu has them\n");
        return Err(ENOEXEC);
    }
    let blob = kernel_blob()?;
    let mut room = marks(blob, "the kernel")?;
    let kernel = Btf::new(blob, None, &mut room).map_err(|_| unreadable("the kernel"))?;
    let loaded = Loaded::of_kvm()?;
    let blob = loaded.raw(&kernel)?;
    let mut room = marks(blob, "kvm.ko")?;
    let kvm = Btf::new(blob, Some(&kernel), &mut room).map_err(|_| unreadable("kvm.ko"))?;

    let mut wanted = KVVec::new();
    for layout in [LAYOUTS, WALK_LAYOUTS, NESTED_LAYOUTS, TRACKING_LAYOUTS]
        .into_iter()
        .flatten()
    {
        wanted.push(Wanted::new(Expected::Layout(layout)), GFP_KERNEL)?;
    }
    for table in [
        symbols::core_functions(),
        symbols::entries(),
        symbols::callees(),
        symbols::iterators(),
    ] {
        for function in table {
            let expected = Expected::Function(
                symbols::name(function).to_str()?,
                symbols::prototype(function).to_str()?,
            );
            wanted.push(Wanted::new(expected), GFP_KERNEL)?;
        }
    }
    btf::check(&mut wanted, Some(&kvm), &kernel).map_err(refuse)
}

fn refuse(mismatch: Mismatch<'_>) -> Error {
    pr_err!(
        "not the kernel this module was built for: {}\n",
        format_args!("{mismatch}")
    );
    ENOEXEC
}

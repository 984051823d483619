// SPDX-License-Identifier: GPL-2.0

//! Parameters: our own, and kvm.ko's variables that decide what the MMU does.

use crate::{
    kvm::{bindings, symbols, table, vm::Kvm},
    mmu::{
        spte::SpteFormat,
        sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
        types::{Gfn, Level},
    },
};
use kernel::prelude::*;
use pin_init::Zeroable;

/// Whether the TDP MMU serves faults, in a kernel that has no jump labels to patch: a load and a test.
#[cfg(not(CONFIG_JUMP_LABEL))]
pub fn tdp_mmu() -> bool {
    // SAFETY: no precondition.
    unsafe { bindings::rmmu_tdp_mmu_enabled() }
}

/// Whether the TDP MMU serves faults: a NOP where it does.
#[cfg(CONFIG_JUMP_LABEL)]
#[inline(always)]
pub fn tdp_mmu() -> bool {
    // SAFETY: a static key that C defines, true by default, which is what the branch's bias says.
    !unsafe {
        kernel::jump_label::arch_static_branch!(
            bindings::rmmu_tdp_mmu_key,
            bindings::rmmu_tdp_mmu_key,
            key,
            true
        )
    }
}

/// Whether each VM is audited when it ends: our parameter.
pub fn audit_at_end() -> bool {
    // SAFETY: a byte that root changes; read once.
    unsafe { (&raw const bindings::rmmu_audit_at_end).read_volatile() }
}

/// The process that runs now.
pub fn current_pid() -> i32 {
    // SAFETY: no precondition.
    unsafe { bindings::rmmu_current_pid() }
}

/// Whether there may be one more message of those that users of KVM can cause; else it is counted as suppressed.
pub fn may_log() -> bool {
    // SAFETY: no precondition.
    unsafe { bindings::rmmu_may_log() }
}

/// Whether the TDP MMU is to be used where it can be: our parameter.
pub fn wants_tdp_mmu() -> bool {
    // SAFETY: a byte that is written while no VM of ours exists or comes to be; read once.
    unsafe { (&raw const bindings::rmmu_wants_tdp_mmu).read_volatile() }
}

/// Sets our parameter. No owned VM exists or comes to be.
pub fn set_wants_tdp_mmu(on: bool) {
    // SAFETY: readers read the byte once.
    unsafe { (&raw mut bindings::rmmu_wants_tdp_mmu).write_volatile(on) }
}

/// Switches the key. No owned VM may exist.
pub fn switch_tdp_mmu(on: bool) {
    // SAFETY: process context.
    unsafe { bindings::rmmu_switch_tdp_mmu(on) }
}

/// Whether VMs created from now on are to be ours.
pub fn own_new_vms() -> bool {
    // SAFETY: a byte that sysfs writes; read once.
    unsafe { (&raw const bindings::rmmu_own_new_vms).read_volatile() }
}

/// How much to map around a page that faulted; a power of two.
pub fn fault_around_bytes() -> u64 {
    // SAFETY: a word that sysfs writes; read once.
    unsafe {
        (&raw const bindings::rmmu_fault_around_bytes)
            .read_volatile()
            .into()
    }
}

/// Whether the shadow MMU installs entries around a fault in advance.
pub fn shadow_prefetch() -> bool {
    // SAFETY: a byte that sysfs writes; read once.
    unsafe { (&raw const bindings::rmmu_shadow_prefetch).read_volatile() }
}

/// A variable of kvm.ko. It is looked up when KVM is hooked: that takes long, and VMs are created often.
struct Variable<T>(AtomicPtr<T>);

impl<T: Copy> Variable<T> {
    const fn new() -> Self {
        Variable(AtomicPtr::new(core::ptr::null_mut()))
    }

    /// Looks it up.
    fn bind(&self, name: &kernel::str::CStr) -> Result {
        self.0
            .store(symbols::require_kvm(name)? as *mut T, Ordering::Relaxed);
        Ok(())
    }

    /// Where it is; null before it is bound.
    fn address(&self) -> *mut T {
        self.0.load(Ordering::Relaxed)
    }

    /// Its value now; all zeroes before it is bound.
    fn read(&self) -> T
    where
        T: Zeroable,
    {
        let variable = self.address();
        if variable.is_null() {
            return T::zeroed();
        }
        // SAFETY: bound before any VM is ours, and kvm.ko stays while one is. `T` is the type it has in kvm.ko, of which every
        // value is valid.
        unsafe { variable.read_volatile() }
    }
}

macro_rules! variables {
    ($($(#[$attribute:meta])* $variable:ident: $ty:ty = $name:literal,)*) => {
        $($(#[$attribute])* static $variable: Variable<$ty> = Variable::new();)*

        fn bind_variables() -> Result {
            $($(#[$attribute])* { $variable.bind($name)?; })*
            Ok(())
        }
    };
}

// The types are those of their definitions in kvm.ko.
variables! {
    NX_HUGE_PAGES: i32 = c"nx_huge_pages",
    EAGER_PAGE_SPLIT: bool = c"eager_page_split",
    FLUSH_ON_REUSE: bool = c"force_flush_and_sync_on_reuse",
    NX_RECOVERY_RATIO: u32 = c"nx_huge_pages_recovery_ratio",
    NX_RECOVERY_PERIOD: u32 = c"nx_huge_pages_recovery_period_ms",
    HEADER_CACHE: *mut bindings::kmem_cache = c"mmu_page_header_cache",
    OPERATIONS: bindings::kvm_x86_ops = c"kvm_x86_ops",
    #[cfg(rmmu_has_nested_ops_table)]
    NESTED_OPERATIONS: bindings::kvm_x86_nested_ops = c"kvm_nested_ops",
    TDP_ENABLED: bool = c"tdp_enabled",
    TDP_MMU_ENABLED: bool = c"tdp_mmu_enabled",
    MAX_HUGE_PAGE_LEVEL: i32 = c"max_huge_page_level",
    AD_ENABLED: bool = c"kvm_ad_enabled",
    MMIO_CACHING: bool = c"enable_mmio_caching",
    HOST_VALUES: bindings::kvm_host_values = c"kvm_host",
    PRESENT_MASK: u64 = c"shadow_present_mask",
    ACCESSED_MASK: u64 = c"shadow_accessed_mask",
    DIRTY_MASK: u64 = c"shadow_dirty_mask",
    NX_MASK: u64 = c"shadow_nx_mask",
    USER_MASK: u64 = c"shadow_user_mask",
    XS_MASK: u64 = c"shadow_xs_mask",
    XU_MASK: u64 = c"shadow_xu_mask",
    ACC_TRACK_MASK: u64 = c"shadow_acc_track_mask",
    HOST_WRITABLE_MASK: u64 = c"shadow_host_writable_mask",
    MMU_WRITABLE_MASK: u64 = c"shadow_mmu_writable_mask",
    ME_VALUE: u64 = c"shadow_me_value",
    ME_MASK: u64 = c"shadow_me_mask",
    MMIO_MASK: u64 = c"shadow_mmio_mask",
    MMIO_ACCESS_MASK: u64 = c"shadow_mmio_access_mask",
    NONPRESENT_OR_RSVD_MASK: u64 = c"shadow_nonpresent_or_rsvd_mask",
    NONPRESENT_OR_RSVD_LOWER_GFN_MASK: u64 = c"shadow_nonpresent_or_rsvd_lower_gfn_mask",
}

static MAX_HUGE_LEVEL: AtomicUsize = AtomicUsize::new(1);

/// Looks the variables up; kvm.ko is there.
pub fn bind() -> Result {
    table::bind();
    bind_variables()?;
    // SAFETY: the address of kvm.ko's `struct kmem_cache *`, which is used only while a VM of ours, and so kvm.ko, lives.
    unsafe { bindings::rmmu_set_header_cache(HEADER_CACHE.address()) };
    Ok(())
}

/// kvm's `nx_huge_pages`.
pub fn nx_huge_pages() -> bool {
    NX_HUGE_PAGES.read() != 0
}

/// How kvm's parameters want NX splits to be recovered.
pub struct NxRecovery {
    /// One in so many candidates a round.
    pub ratio: u32,
    /// Milliseconds between rounds.
    pub period_ms: u32,
}

/// kvm's `nx_huge_pages_recovery_ratio` and `nx_huge_pages_recovery_period_ms`; none if recovery is off.
pub fn nx_recovery() -> Option<NxRecovery> {
    /// A period of 0 lets every candidate have its turn within an hour.
    const HOUR_MS: u32 = 60 * 60 * 1000;
    let ratio = NX_RECOVERY_RATIO.read();
    if !nx_huge_pages() || ratio == 0 {
        return None;
    }
    let period_ms = match NX_RECOVERY_PERIOD.read() {
        0 => HOUR_MS.checked_div(ratio.min(3600))?,
        period => period,
    };
    Some(NxRecovery { ratio, period_ms })
}

/// kvm's `eager_page_split`.
pub fn eager_page_split() -> bool {
    EAGER_PAGE_SPLIT.read()
}

/// kvm's `flush_on_reuse`.
pub fn flush_on_reuse() -> bool {
    FLUSH_ON_REUSE.read()
}

/// The highest level that the hardware maps.
pub fn max_huge_level() -> Level {
    Level::new(MAX_HUGE_LEVEL.load(Ordering::Relaxed) as u8).unwrap_or(Level::L4K)
}

/// KVM uses nested paging.
pub fn tdp_enabled() -> bool {
    TDP_ENABLED.read()
}

/// KVM uses its TDP MMU where it can.
pub fn kvm_tdp_mmu() -> bool {
    TDP_MMU_ENABLED.read()
}

/// The vendor module's operations for nested guests, of which kvm.ko has a copy.
#[cfg(rmmu_has_nested_ops_table)]
fn nested_operations() -> *const bindings::kvm_x86_nested_ops {
    NESTED_OPERATIONS.address()
}

/// The vendor module's operations for nested guests, which its table points to.
#[cfg(not(rmmu_has_nested_ops_table))]
fn nested_operations() -> *const bindings::kvm_x86_nested_ops {
    // SAFETY: kvm.ko's table of operations, filled in while a VM exists or is created.
    unsafe { (*OPERATIONS.address()).nested_ops }
}

/// Binds the vendor module's operations. Returns whether it matters if a page is a device's: for memory types, memory
/// encryption, or buffers that must be cleared.
pub fn bind_vendor() -> bool {
    // SAFETY: kvm.ko's table of operations, filled in while a VM exists or is created.
    let memtypes = unsafe { bindings::rmmu_bind_vendor(OPERATIONS.address(), nested_operations()) };
    // SAFETY: no precondition.
    let buffers = unsafe { bindings::rmmu_host_mmio_buffers() };
    memtypes || buffers || ME_VALUE.read() != 0
}

/// How entries of this VM look, out of KVM's masks. They are constant while a vendor module is loaded.
pub fn spte_format(kvm: &Kvm) -> SpteFormat {
    let max_level = MAX_HUGE_PAGE_LEVEL.read();
    MAX_HUGE_LEVEL.store(max_level.clamp(1, 3) as usize, Ordering::Relaxed);
    let physical_bits = u32::from(HOST_VALUES.read().maxphyaddr).clamp(32, 52);
    let nx = NX_MASK.read();
    let me_mask = ME_MASK.read();
    // Bits of the address that the host does not have, apart from those that select encryption.
    let no_address = (u64::MAX >> 12)
        & !u64::MAX.wrapping_shl(52)
        & u64::MAX.wrapping_shl(physical_bits)
        & !me_mask;
    let ept = nx == 0;
    SpteFormat {
        present: PRESENT_MASK.read(),
        accessed: ACCESSED_MASK.read(),
        dirty: DIRTY_MASK.read(),
        nx,
        user: USER_MASK.read(),
        xs: XS_MASK.read(),
        xu: XU_MASK.read(),
        acc_track: ACC_TRACK_MASK.read(),
        host_writable: HOST_WRITABLE_MASK.read(),
        mmu_writable: MMU_WRITABLE_MASK.read(),
        me_value: ME_VALUE.read(),
        me_mask,
        mmio_value: kvm.mmio_value(),
        mmio_mask: MMIO_MASK.read(),
        mmio_access_mask: MMIO_ACCESS_MASK.read(),
        nonpresent_or_rsvd: NONPRESENT_OR_RSVD_MASK.read(),
        nonpresent_or_rsvd_lower_gfn: NONPRESENT_OR_RSVD_LOWER_GFN_MASK.read(),
        base_addr_mask: 0x000f_ffff_ffff_f000 & !me_mask,
        rsvd: reserved_bits(no_address),
        // EPT: write without read (XWR 010, 110) and, without execute-only support, is what KVM never makes; see Intel
        // SDM 31.3.3.1, "EPT misconfigurations".
        bad_mt_xwr: if ept { bad_ept_types() } else { 0 },
        ad_enabled: AD_ENABLED.read(),
        mmio_caching: MMIO_CACHING.read(),
        // Without nested paging, entries are found by guest virtual addresses, and MMIO entries can have any frame.
        max_gfn: Gfn((1u64 << (if tdp_enabled() { physical_bits } else { 52 } - 12)) - 1),
    }
}

/// Bits that are reserved in an entry, by its page-size bit and level - 1: addresses the host lacks, and the low address
/// bits of large pages (AMD APM volume 2, 5.3; Intel SDM 31.3.2).
fn reserved_bits(no_address: u64) -> [[u64; 5]; 2] {
    let huge = |level: u32| no_address | ((1u64 << (12 + 9 * (level - 1))) - 1) & !0x1fff;
    [
        [no_address; 5],
        [
            no_address,
            huge(2),
            huge(3),
            no_address | 1 << 7,
            no_address | 1 << 7,
        ],
    ]
}

/// Combinations of memory type (bits 5:3) and XWR (bits 2:0) that are EPT misconfigurations, as a bitmap over bits 5:0.
fn bad_ept_types() -> u64 {
    let mut bad = 0u64;
    for bits in 0..64u32 {
        let (memtype, xwr) = (bits >> 3, bits & 7);
        if matches!(memtype, 2 | 3 | 7) || matches!(xwr, 0b010 | 0b110) {
            bad |= 1 << bits;
        }
    }
    bad
}

// SPDX-License-Identifier: GPL-2.0

//! Table pages: a page of entries, and the header that its `struct page` points to.
//!
//! Headers come from kvm.ko's own slab cache, and pages of the fault path from the vCPU's own caches, so that a VM of ours
//! costs what an in-tree VM costs, is charged to the same cgroup, and its vCPU caches are filled and freed by KVM. The
//! engine's header overlays `struct kvm_mmu_page`: vmx.c reads the role and `has_mapped_host_mmio` of a root, and `rcu_head`
//! carries the table to its end.

use crate::{
    kvm::{
        bindings::{self, check_prototype},
        shadow,
        vcpu::Vcpu,
    },
    mmu::{
        host::TableSource,
        role::Role,
        shadow::PagePtr,
        sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering},
        table::{offset, Entries, Table, TablePtr, KIND_TDP},
        types::{Hpa, PAGE_SHIFT},
    },
};
use core::{
    mem::{offset_of, size_of},
    ptr::NonNull,
};
use kernel::ffi::c_void;

const _: () = assert!(size_of::<Table>() <= offset_of!(bindings::kvm_mmu_page, callback_head));

// What code outside of KVM's MMU reads of a root's header is where that code looks for it. vmx.c takes the level of the EPTP
// and whether it tracks accesses from the role, and whether host MMIO is mapped; the other fields are KVM's, too.
const _: () = {
    assert!(offset::KIND == offset_of!(bindings::kvm_mmu_page, tdp_mmu_page));
    assert!(offset::ROLE == offset_of!(bindings::kvm_mmu_page, role));
    assert!(offset::GFN == offset_of!(bindings::kvm_mmu_page, gfn));
    assert!(offset::ENTRIES == offset_of!(bindings::kvm_mmu_page, spt));
    assert!(offset::ROOT_COUNT == offset_of!(bindings::kvm_mmu_page, __bindgen_anon_2));
    assert!(offset::HOST_MMIO == offset_of!(bindings::kvm_mmu_page, has_mapped_host_mmio));
    assert!(KIND_TDP == 1);
};

/// Table pages of all VMs that have not been freed, roots and those that wait for a grace period included.
static LIVE: AtomicI64 = AtomicI64::new(0);

/// Counts table pages that came (positive) or went.
pub(super) fn count_live(delta: i64) {
    LIVE.fetch_add(delta, Ordering::Relaxed);
}

/// Table pages that exist.
pub fn live() -> i64 {
    LIVE.load(Ordering::Relaxed)
}

/// Where the kernel maps all memory; constant after [`bind`].
static DIRECT_MAP: AtomicUsize = AtomicUsize::new(0);

/// The private word of the first page of memory; constant after [`bind`].
static FIRST_PRIVATE: AtomicUsize = AtomicUsize::new(0);

/// The root of a guest whose own root is no memory: a page of zeroes. Constant after [`bind`].
static DUMMY_ROOT: AtomicU64 = AtomicU64::new(0);

/// Looks up what is constant while the kernel runs. Before any VM is ours.
pub fn bind() {
    // SAFETY: no precondition.
    let (direct_map, first_private, dummy) = unsafe {
        (
            bindings::rmmu_direct_map(),
            bindings::rmmu_first_private(),
            bindings::rmmu_dummy_root(),
        )
    };
    DIRECT_MAP.store(direct_map, Ordering::Relaxed);
    FIRST_PRIVATE.store(first_private, Ordering::Relaxed);
    DUMMY_ROOT.store(dummy, Ordering::Relaxed);
}

/// The root of a guest whose own root is no memory.
#[inline]
pub fn dummy_root() -> Hpa {
    Hpa(DUMMY_ROOT.load(Ordering::Relaxed))
}

/// The header of the table page at `hpa`, which is the private word of its `struct page`; null if the page has none.
///
/// # Safety
///
/// There is memory at `hpa`, and its page is the caller's to look at.
#[inline]
pub(super) unsafe fn header_at(hpa: Hpa) -> *mut c_void {
    let pfn = (hpa.0 >> PAGE_SHIFT) as usize;
    let word = FIRST_PRIVATE
        .load(Ordering::Relaxed)
        .wrapping_add(pfn.wrapping_mul(bindings::RMMU_PAGE_STRIDE as usize));
    // SAFETY: memory has a struct page, in the one array of all of them. The word changes only while the page is nobody
    // else's.
    unsafe { *(word as *const *mut c_void) }
}

/// The physical address of a page of ours.
#[inline]
pub(super) fn hpa_of(page: NonNull<c_void>) -> Hpa {
    let hpa = page
        .addr()
        .get()
        .wrapping_sub(DIRECT_MAP.load(Ordering::Relaxed));
    Hpa(hpa as u64)
}

/// The entries of the table page at `hpa`, without a look at its header.
#[inline]
pub(super) fn entries_at(hpa: Hpa) -> NonNull<Entries> {
    let address = DIRECT_MAP
        .load(Ordering::Relaxed)
        .wrapping_add(hpa.0 as usize);
    // SAFETY: the direct map does not begin at 0.
    unsafe { NonNull::new_unchecked(address as *mut Entries) }
}

/// Waits until every table that was freed is gone.
pub fn wait_for_frees() {
    // SAFETY: process context, and no RCU section is entered.
    unsafe { bindings::rmmu_rcu_barrier() }
}

/// Makes a table of a fresh header and page.
///
/// # Safety
///
/// Both are valid, the header is zeroed, and nothing else points to either.
unsafe fn join(header: NonNull<c_void>, page: NonNull<c_void>) -> TablePtr {
    // SAFETY: the page is a whole page of the kernel's memory.
    unsafe { bindings::rmmu_table_join(header.as_ptr(), page.as_ptr()) };
    let hpa = hpa_of(page);
    count_live(1);
    // SAFETY: the caller promises a zeroed header of the size asserted above and a page that are nobody else's.
    unsafe { TablePtr::adopt(header.cast::<Table>(), page.cast::<Entries>(), hpa) }
}

/// A new table. Sleeps.
pub(super) fn alloc() -> Option<TablePtr> {
    // SAFETY: no precondition.
    let header = NonNull::new(unsafe { bindings::rmmu_header_alloc() })?;
    // SAFETY: no precondition.
    let Some(page) = NonNull::new(unsafe { bindings::rmmu_page_alloc() }) else {
        // SAFETY: allocated above, unused.
        unsafe { bindings::rmmu_header_free(header.as_ptr()) };
        return None;
    };
    // SAFETY: both are fresh, and the cache gives zeroed headers.
    Some(unsafe { join(header, page) })
}

/// Frees a table that nobody can reach.
///
/// # Safety
///
/// `table` was made by [`join`] and nothing points to it any more.
pub(super) unsafe fn free_now(table: TablePtr) {
    let page = table.entries().as_ptr().cast::<c_void>();
    // SAFETY: the caller's promise.
    unsafe {
        bindings::rmmu_table_part(page);
        bindings::rmmu_page_free(page);
        bindings::rmmu_header_free(table.as_ptr().as_ptr().cast());
    }
    count_live(-1);
}

/// Frees a table after a grace period.
///
/// # Safety
///
/// As for [`free_now`], except that readers under RCU may still look at the table.
pub(super) unsafe fn free_rcu(table: TablePtr) {
    // SAFETY: the header is an object of the cache of `struct kvm_mmu_page`, whose rcu_head the engine leaves alone.
    unsafe { bindings::rmmu_table_free_rcu(table.as_ptr().as_ptr().cast()) }
}

/// The grace period of a table, or of a shadow page, is over.
///
/// # Safety
///
/// `header` is what [`free_rcu`], or its like for shadow pages, handed to C, which calls this once for it.
#[no_mangle]
unsafe extern "C" fn rmmu_table_freed(header: *mut c_void) {
    let Some(header) = NonNull::new(header) else {
        return;
    };
    // SAFETY: handed to call_rcu(), with the promise that nothing but readers could reach it.
    unsafe {
        if shadow::is_shadow(header) {
            shadow::free_now(PagePtr::from_raw(header.cast()));
        } else {
            free_now(TablePtr::from_raw(header.cast()));
        }
    }
}
check_prototype!(rmmu_table_freed);

/// The role of a root that the caller holds a reference on.
pub fn role(root: TablePtr) -> Role {
    // SAFETY: the reference keeps it alive.
    unsafe { root.as_ref() }.role()
}

/// Whether a root, on which the caller holds a reference, was invalidated.
pub fn invalid(root: TablePtr) -> bool {
    // SAFETY: the reference keeps it alive.
    unsafe { root.as_ref() }.is_invalid()
}

/// The vCPU's caches as a source of tables.
pub struct VcpuCache<'a>(pub &'a Vcpu);

// SAFETY: what the caches give is fresh; `join` adopts it. KVM fills pages of mmu_shadow_page_cache with
// SHADOW_NONPRESENT_VALUE, which is the engine's NONPRESENT.
unsafe impl TableSource for VcpuCache<'_> {
    const PREFILLED: bool = true;

    fn take(&mut self) -> Option<TablePtr> {
        let (header, page) = self.0.take_table()?;
        // SAFETY: fresh out of the caches; headers are zeroed (gfp_zero).
        Some(unsafe { join(NonNull::new(header)?, NonNull::new(page)?) })
    }
}

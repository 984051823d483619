// SPDX-License-Identifier: GPL-2.0

//! What the shadow MMU needs from outside, on top of [`Host`].

use super::{
    page::{Page, PagePtr},
    rmap::DescPtr,
    role::PageRole,
};
use crate::mmu::{
    host::Host,
    sync::{atomic::AtomicU64, Flush, MmuWrite},
    table::Entries,
    types::{Gfn, GfnRange, Hpa, Level, Pfn},
};
use core::ptr::NonNull;

/// Events that KVM's statistics, or ours, count.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Counter {
    /// A page was zapped.
    ShadowZapped,
    /// A write to a shadowed table was emulated.
    PteWrite,
    /// Such a write replaced an entry above the last level.
    PdeZapped,
    /// A page was zapped because there were too many writes to its table.
    Flooded,
    /// Pages were zapped to make room.
    Recycled,
    /// A page was not found and had to be made.
    CacheMiss,
    /// Pages that are unsync now; goes down, too.
    Unsync,
    /// A page was brought up to date.
    Synced,
    /// An entry was installed in advance.
    Prefetched,
    /// A huge page of a nested guest was split in advance.
    NestedSplit,
}

/// Something about a page that an observer may want to know.
#[derive(Clone, Copy)]
pub enum PageEvent<'a> {
    /// It was found.
    Found(&'a Page),
    /// It was made.
    Made(&'a Page),
    /// It is about to become unsync.
    Unsynced(&'a Page),
    /// It is unsync, and about to be that no more.
    Synced(&'a Page),
    /// It is about to be zapped.
    Zapped(&'a Page),
}

/// Statistics of which KVM keeps the maximum.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Maximum {
    /// Entries that map one frame.
    RmapSize,
    /// Other pages in the bucket that a page was looked for in.
    HashCollisions,
}

/// The machine below one VM's shadow MMU.
///
/// # Safety
///
/// As for [`Host`], whose [`entries_of`](Host::entries_of) finds entries of shadow
/// pages, too; and:
///
/// - [`page_of`](ShadowHost::page_of) and [`page_at`](ShadowHost::page_at) return
///   the page that has these entries;
/// - a page is valid until it is handed to one of the two `free_page` functions;
///   after [`free_page_rcu`](ShadowHost::free_page_rcu), until every
///   [`Rcu`](Host::Rcu) guard that was alive is gone;
/// - a head that [`rmap`](ShadowHost::rmap) returns is zero at first and written
///   by the engine only, and the same for the same slot, index and level;
/// - [`with_unsync_lock`](ShadowHost::with_unsync_lock) runs one closure at a time
///   a VM.
pub unsafe trait ShadowHost: Host {
    /// The page whose entries are at `hpa`.
    fn page_of(&self, hpa: Hpa) -> PagePtr;

    /// The page with these entries.
    fn page_at(&self, entries: NonNull<Entries>) -> PagePtr;

    /// Frees a page after a grace period.
    fn free_page_rcu(&self, page: PagePtr);

    /// Frees a descriptor.
    fn free_desc(&self, desc: DescPtr);

    /// Counts a page as in use (`1`) or not (`-1`).
    fn account_page(&self, page: PagePtr, delta: i32);

    /// Counts pages that shadow a table of the guest.
    fn account_indirect(&self, delta: i64);

    /// The slot of `gfn`.
    fn slot(&self, smm: bool, gfn: Gfn) -> Option<&Self::Slot>;

    /// The frames of a slot.
    fn slot_range(&self, slot: &Self::Slot) -> GfnRange;

    /// The head of the list of entries of `level` that map `gfn`; none if the
    /// frame is not in the slot, or the slot has no lists.
    fn rmap<'s>(&'s self, slot: &'s Self::Slot, gfn: Gfn, level: Level) -> Option<&'s AtomicU64>;

    /// Writes to `gfn` are tracked.
    fn write_tracked(&self, slot: &Self::Slot, gfn: Gfn) -> bool;

    /// Counts who wants writes to `gfn` tracked. Protecting the frame is the
    /// engine's part.
    fn track_writes(&self, slot: &Self::Slot, gfn: Gfn, delta: i32);

    /// Counts reasons for not mapping `gfn` by a huge page.
    fn disallow_lpage(&self, slot: &Self::Slot, gfn: Gfn, delta: i32);

    /// `gfn` may be mapped by a huge page, in both address spaces.
    fn lpage_allowed(&self, slot: &Self::Slot, gfn: Gfn) -> bool;

    /// Takes write access to `gfn` from the TDP MMU's tables.
    fn protect_in_tdp(&self, lock: &MmuWrite<'_>, slot: &Self::Slot, gfn: Gfn) -> Flush;

    /// The slot logs dirty pages.
    fn dirty_logged(&self, slot: &Self::Slot) -> bool;

    /// Runs `f` under the lock of unsync marks.
    fn with_unsync_lock<R>(&self, f: impl FnOnce() -> R) -> R;

    /// A root in use was zapped: vCPUs must look for a new one.
    fn root_zapped(&self);

    /// Pages of nested guests that nothing points to any more are zapped.
    fn recursive_nested_zap(&self) -> bool;

    /// Host MMIO is about to be mapped below roots that are no pages, so that no header says so.
    fn host_mmio_mapped_without_root(&self);

    /// Something happened to a page. Called under the locks of the operation.
    #[inline]
    fn trace_page(&self, _event: PageEvent<'_>) {}

    /// Counts events.
    fn count(&self, counter: Counter, by: i64);

    /// Notes a candidate for a maximum.
    fn maximum(&self, what: Maximum, n: u64);
}

/// Where pages and descriptors come from: caches that were filled before any lock
/// was taken.
///
/// # Safety
///
/// What it gives was made by `adopt` and belongs to nobody else.
pub unsafe trait PageSource {
    /// A page, with translations if asked for, or nothing when a cache is empty.
    fn take_page(&mut self, translations: bool) -> Option<PagePtr>;

    /// A descriptor.
    fn take_desc(&mut self) -> Option<DescPtr>;
}

/// The vCPU on whose behalf the MMU works.
pub trait ShadowVcpu<H: ShadowHost>: PageSource {
    /// The role of the root the vCPU needs.
    fn root_role(&self) -> PageRole;

    /// The slot of `gfn`, if it is valid.
    fn slot<'h>(&self, host: &'h H, gfn: Gfn) -> Option<&'h H::Slot>;

    /// Entries may be installed in advance: no host mapping is being invalidated.
    /// Asked before anything is looked up for them, under the same hold of the lock.
    fn may_prefetch(&mut self) -> bool;

    /// Memory type of a leaf, as bits of an entry.
    fn memtype(&self, gfn: Gfn, host_mmio: bool) -> u64;

    /// The generation of the memslots, for MMIO.
    fn mmio_generation(&self) -> u64;

    /// The host's frames from `gfn` on, those of the front that it maps writable
    /// already; how many. Does not sleep. They stay the host's until
    /// [`release_prefetched`](ShadowVcpu::release_prefetched), which is called once if
    /// there are any; by the lock, which is held until then, or by references.
    fn prefetch_pages(
        &mut self,
        host: &H,
        lock: &MmuWrite<'_>,
        slot: &H::Slot,
        gfn: Gfn,
        pfns: &mut [Pfn],
    ) -> usize;

    /// Bringing pages up to date was interrupted: do it before the guest runs.
    fn request_sync(&mut self);

    /// Gives back what the last [`prefetch_pages`](ShadowVcpu::prefetch_pages)
    /// returned; it was or may have been mapped.
    fn release_prefetched(&mut self);
}

/// The caches of eager splitting.
pub trait SplitCaches: PageSource {
    /// There is enough for one more huge page.
    fn ready(&self) -> bool;

    /// Fills the caches; called without any lock. False if memory is short.
    fn top_up(&mut self) -> bool;
}

/// What an audit asks a host, besides what the engine needs.
pub trait AuditHost: ShadowHost {
    /// The header that the page of memory at this address says it has, and the frame
    /// that the header says it is for. The address may be of anything, freed memory
    /// too: neither answer is to be relied on. None if there is no memory, or it says
    /// nothing.
    fn claimed_header(&self, entries: u64) -> Option<(u64, Gfn)>;

    /// Where memory at `hpa` is mapped, whatever it is of.
    fn address_of(&self, hpa: Hpa) -> u64;

    /// How many reasons a slot counts against mapping `gfn`, which lies in it, by a
    /// huge page of `level`; and how many of them have nothing to do with tables: that
    /// the page would reach beyond the slot, or would not be aligned. None if the slot
    /// keeps no count.
    fn lpage_count(&self, slot: &Self::Slot, gfn: Gfn, level: Level) -> Option<(i64, i64)>;

    /// How many want writes to `gfn`, which lies in the slot, tracked. None if the
    /// slot keeps no count.
    fn write_track_count(&self, slot: &Self::Slot, gfn: Gfn) -> Option<i64>;

    /// Somebody besides the engine may have writes tracked.
    fn others_track_writes(&self) -> bool;

    /// The slot is one of the SMM address space.
    fn is_smm_slot(&self, slot: &Self::Slot) -> bool;
}

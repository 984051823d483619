// SPDX-License-Identifier: GPL-2.0

//! The legacy MMU: page tables for whatever the TDP MMU can not serve.
//!
//! - **Direct** pages map consecutive guest frames: guests without paging, and
//!   all guests on hardware with two-dimensional paging if the TDP MMU is off.
//! - **Shadow** pages translate a guest's own tables: one page for each table of
//!   the guest, with the host's frames in place of the guest's.
//! - **Nested** pages do the same with the tables by which the guest runs guests.
//!
//! # Keeping up with the guest
//!
//! A table of the guest that is shadowed is write-protected, so that each write to
//! it is seen ([`Shadow::track_write`]). For a table of the last level that is
//! given up at the first write: its page becomes **unsync**, the table writable.
//! A CPU may use old translations until the guest flushes them; that is when the
//! page is brought up to date ([`Shadow::sync_root`], [`Shadow::invalidate_addr`])
//! and the table protected again. Marks in the pages above an unsync page tell the
//! way to it.
//!
//! # Who may do what
//!
//! Everything is done under `mmu_lock` for **write**, but for this:
//!
//! - the fast fault and the walk for MMIO faults read entries under RCU, and the
//!   former changes bits of leaves by compare-exchange; so do CPUs. Hence leaves
//!   that have such bits are swapped, and pages freed after a grace period;
//! - [`Shadow::try_unsync`] is called by the TDP MMU under the lock for read. What
//!   it changes is guarded by the unsync lock then;
//! - what is asked without a lock is listed below.
//!
//! # What is asked without a lock
//!
//! Each answer lets the one who asks skip something, so it must not come too early.
//!
//! - **Is a root unsync?** ([`Shadow::is_unsync`]) No: the guest's flush needs no
//!   lock. The text of `unsync` says what makes that right.
//! - **Is a root obsolete?** ([`Shadow::is_obsolete`]) No: the vCPU keeps it. Who
//!   zaps a root or changes the generation asks all vCPUs to look again, under the
//!   same hold of the lock, and waits until they are out of the guest. A vCPU that
//!   looked too early looks again before it enters the guest. Faults ask under the
//!   lock.
//! - **Are there pages that shadow tables?** ([`Shadow::indirect_pages`]) No: a write
//!   that was emulated needs no further look. The write comes first, then a full
//!   barrier, then the question; where a table is shadowed, the count comes first,
//!   then a full barrier, and the guest's entry is read again after that. So either
//!   the count is seen, or what was written. When the count drops, the page has no
//!   entries any more.
//! - **What are the entries on the way to an address?** ([`Shadow::walk`],
//!   [`Shadow::fast_fault`], [`Shadow::clear_flood`]) RCU keeps the pages. What is
//!   read may be out of date: an MMIO entry carries the generation that it is right
//!   for, the fast fault changes an entry by compare-exchange only, and only gives
//!   back what `MMU-writable` or the saved bits of the entry itself say. Whoever
//!   takes that away exchanges the entry, too, and flushes.
//! - **How often was a table written to?** A wrong count makes a page go sooner or
//!   later than it would have. Nothing else depends on it.
//! - Numbers of pages for statistics and budgets, on which nothing depends.
//!
//! # How a page dies
//!
//! A page that is zapped loses its children, its parents, and its place in the list
//! of pages in use. It stays in the hash table, invalid, until it is freed: at the
//! end of the operation, after a TLB flush ([`Owed`]); if vCPUs use it as a root,
//! when the last of them lets go.
//!
//! # Files
//!
//! - `role`, `page`, `list`, `rmap`: the pages and how they are found
//! - `host`: the kernel and the vCPU
//! - `guest`: the guest's own tables
//! - `find`: looking up and making pages
//! - `leaf`, `link`: changing entries
//! - `zap`, `reclaim`: removing pages
//! - `unsync`, `sync`, `write`: keeping up with the guest
//! - `roots`, `fault`, `prefetch`, `fast`: what vCPUs ask for
//! - `slots`, `split`, `nx`: what the host asks for
//! - `inspect`: looking without touching
//! - `audit`, `audit_slot`: looking whether everything fits together

mod audit;
mod audit_slot;
mod fast;
mod fault;
mod find;
pub mod guest;
pub mod host;
mod inspect;
mod leaf;
mod link;
pub mod list;
mod nx;
pub mod page;
mod prefetch;
pub(crate) mod reclaim;
pub mod rmap;
pub mod role;
mod roots;
mod slots;
mod split;
mod sync;
mod unsync;
mod write;
mod zap;

pub use audit::ShadowedFrames;
pub use fault::WrongRoot;
pub use guest::GuestTables;
pub use host::{
    AuditHost, Counter, Maximum, PageEvent, PageSource, ShadowHost, ShadowVcpu, SplitCaches,
};
pub use list::Buckets;
pub use page::{Page, PagePtr, Translations, KIND_SHADOW};
pub use reclaim::NoSpace;
pub use rmap::{Desc, DescPtr};
pub use role::PageRole;
pub use roots::Root;
#[cfg(not(MODULE))]
pub use {
    guest::{GuestLeaf, GuestTable, GuestWalk, GROUP},
    inspect::PageInfo,
    split::SplitError,
    unsync::WriteProtect,
};

use crate::mmu::sync::{
    atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicU8, Ordering},
    Flush, MmuLocked, MmuWrite,
};
use core::{cell::Cell, ptr, ptr::NonNull};
use list::{ByHash, InUse, List, NxCandidates};

/// The shadow MMU of a VM.
#[derive(Debug)]
pub struct Shadow {
    /// The hash table, once there is one.
    buckets: AtomicPtr<Buckets>,
    /// Pages in use, newest first. Roots that were zapped are not in it.
    active: List<InUse>,
    nx: List<NxCandidates>,
    nx_count: AtomicU64,
    pages: AtomicU64,
    max_pages: AtomicU64,
    /// Pages that shadow tables of the guest.
    indirect: AtomicU64,
    /// Pages of another generation are obsolete. Two are enough: pages of the last
    /// one are gone before it is changed again.
    generation: AtomicU8,
    /// Pages are being brought up to date whose marks are gone already.
    syncing: AtomicBool,
}

impl Shadow {
    /// An MMU without any page, that may have `max_pages`.
    pub fn new(max_pages: u64) -> Shadow {
        Shadow {
            buckets: AtomicPtr::new(ptr::null_mut()),
            active: List::new(),
            nx: List::new(),
            nx_count: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            max_pages: AtomicU64::new(max_pages),
            indirect: AtomicU64::new(0),
            generation: AtomicU8::new(0),
            syncing: AtomicBool::new(false),
        }
    }

    /// Gives the MMU its hash table, before the first root is made.
    ///
    /// # Safety
    ///
    /// `buckets` points to zeroed memory that is nobody else's and lives until
    /// [`take_buckets`](Shadow::take_buckets).
    pub unsafe fn set_buckets(&self, buckets: NonNull<Buckets>) {
        self.buckets.store(buckets.as_ptr(), Ordering::Release);
    }

    /// There is a hash table.
    pub fn has_buckets(&self) -> bool {
        !self.buckets.load(Ordering::Acquire).is_null()
    }

    /// Takes the hash table back, when there are no pages any more.
    pub fn take_buckets(&self, lock: &MmuWrite<'_>) -> Option<NonNull<Buckets>> {
        if !self.is_empty(lock) {
            return None;
        }
        NonNull::new(self.buckets.swap(ptr::null_mut(), Ordering::AcqRel))
    }

    /// The pages that may be for this frame.
    #[inline]
    fn bucket<L: MmuLocked>(&self, gfn: u64, _lock: &L) -> Option<&List<ByHash>> {
        // SAFETY: Null, or what `set_buckets` got. It is taken back when there are
        // no pages, under the lock.
        unsafe { self.buckets.load(Ordering::Acquire).as_ref() }?.of(gfn)
    }

    /// The pages of a bucket of the hash table.
    fn bucket_number<L: MmuLocked>(&self, number: usize, _lock: &L) -> Option<&List<ByHash>> {
        // SAFETY: Null, or what `set_buckets` got, which is taken back under the lock
        // for write; the caller holds the lock.
        unsafe { self.buckets.load(Ordering::Acquire).as_ref() }?.get(number)
    }

    /// There is no page, not even a zapped root.
    pub fn is_empty(&self, lock: &MmuWrite<'_>) -> bool {
        self.active.is_empty(lock) && self.pages() == 0
    }

    /// Pages in use, KVM's `mmu_shadow_pages`.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// How many pages there may be.
    pub fn max_pages(&self) -> u64 {
        self.max_pages.load(Ordering::Relaxed)
    }

    /// Pages that shadow tables of the guest. Without a lock; who wrote to the
    /// guest's memory before looks after a full barrier.
    pub fn indirect_pages(&self) -> u64 {
        self.indirect.load(Ordering::SeqCst)
    }

    /// Pages that stand in the way of an NX huge page.
    pub fn nx_candidates(&self) -> u64 {
        self.nx_count.load(Ordering::Relaxed)
    }

    /// Runs one operation, then does what it owes.
    fn run<H: ShadowHost, R>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        f: impl for<'l> FnOnce(&Op<'l, H>) -> R,
    ) -> R {
        let op = self.op(host, lock, Owed::nothing());
        let result = f(&op);
        let owed = op.into_owed();
        owed.settle(self, host, lock);
        result
    }

    /// Begins an operation, to which its forerunner left `owed`.
    fn op<'l, H: ShadowHost>(
        &'l self,
        host: &'l H,
        lock: &'l MmuWrite<'_>,
        owed: Owed,
    ) -> Op<'l, H> {
        Op {
            shadow: self,
            host,
            lock,
            flush: Cell::new(owed.flush.needed()),
            zapped: owed.zapped,
        }
    }
}

/// An operation under the write lock.
struct Op<'l, H: ShadowHost> {
    shadow: &'l Shadow,
    host: &'l H,
    lock: &'l MmuWrite<'l>,
    flush: Cell<bool>,
    zapped: List<InUse>,
}

impl<'l, H: ShadowHost> Op<'l, H> {
    /// A flush is owed at the end.
    #[inline]
    fn owe_flush(&self, flush: bool) {
        if flush {
            self.flush.set(true);
        }
    }

    /// Does the flush that is owed so far: from now on no CPU can write to what was
    /// protected or unmapped.
    fn flush_now(&self) {
        if self.flush.replace(false) {
            self.host.flush_all();
        }
    }

    /// Hands over a page that nothing leads to any more, to be freed after a flush.
    fn discard(&self, page: &Page) {
        self.zapped.push(page, self.lock);
        self.owe_flush(true);
    }

    fn into_owed(self) -> Owed {
        Owed {
            flush: Flush::when(self.flush.get()),
            zapped: self.zapped,
        }
    }
}

/// What an operation leaves to be done: a flush, and zapped pages to be freed after
/// it.
#[must_use = "zapped pages must be freed"]
struct Owed {
    flush: Flush,
    zapped: List<InUse>,
}

impl Owed {
    const fn nothing() -> Owed {
        Owed {
            flush: Flush::none(),
            zapped: List::new(),
        }
    }

    /// Flushes if need be, and frees the pages. No reference to a page is left: it
    /// would borrow the lock.
    fn settle<H: ShadowHost>(self, shadow: &Shadow, host: &H, lock: &mut MmuWrite<'_>) {
        host.spend(self.flush, lock);
        while let Some(page) = self.zapped.first(lock) {
            self.zapped.remove(page, lock);
            if let Some(bucket) = shadow.bucket(page.gfn().0, lock) {
                bucket.remove(page, lock);
            }
            host.free_page_rcu(page.as_ptr());
        }
    }
}

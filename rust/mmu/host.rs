// SPDX-License-Identifier: GPL-2.0

//! What the engine needs from outside.

use crate::mmu::{
    spte::{Spte, SpteFormat},
    sync::{atomic::AtomicU64, Flush, MmuLocked, MmuRead, MmuWrite, RcuRead},
    table::{Entries, Table, TablePtr},
    types::{Gfn, GfnRange, Hpa, Level},
};
use core::ptr::NonNull;

/// Something an observer may want to know of, besides what the host accounts anyway.
#[derive(Clone, Copy)]
pub enum Event<'a> {
    /// An entry changed: `gfn` is the first frame it covers, `cell` where it is.
    SpteChanged {
        /// Where the entry is.
        cell: &'a AtomicU64,
        /// The first frame it covers.
        gfn: Gfn,
        /// The level of its table.
        level: Level,
        /// What it was.
        old: Spte,
        /// What it is.
        new: Spte,
    },
    /// A fault mapped a frame, or found it mapped the same way.
    SpteSet {
        /// Where the entry is.
        cell: &'a AtomicU64,
        /// The first frame it covers.
        gfn: Gfn,
        /// The level of its table.
        level: Level,
    },
    /// A fault noted that a frame is MMIO.
    MmioSet {
        /// Where the entry is.
        cell: &'a AtomicU64,
        /// The frame.
        gfn: Gfn,
        /// What the entry is now.
        spte: Spte,
    },
    /// A table is about to be linked, or to become a root.
    TableMade(&'a Table),
    /// A table was unlinked and is about to be emptied.
    TableRemoved(&'a Table),
    /// A huge page was to be replaced by a table.
    HugeSplit {
        /// The first frame of the huge page.
        gfn: Gfn,
        /// What mapped it.
        spte: Spte,
        /// Its level.
        level: Level,
        /// How that went.
        outcome: SplitOutcome,
    },
}

/// How the split of a huge page went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SplitOutcome {
    /// There is a table in its place.
    Done,
    /// The entry changed meanwhile.
    Raced,
    /// There was no memory for a table.
    NoMemory,
}

/// The machine below one VM's MMU.
///
/// # Safety
///
/// The engine turns what this returns into references, so:
///
/// - a [`TablePtr`] that [`alloc_table`](Host::alloc_table) returns was made by
///   [`TablePtr::adopt`], belongs to nobody else, and stays valid until it is
///   handed to one of the two `free_table` functions;
/// - after [`free_table_rcu`](Host::free_table_rcu) it stays valid until every
///   [`Rcu`](Host::Rcu) guard that was alive is gone;
/// - [`table_of`](Host::table_of) returns the very table that has this address,
///   and [`entries_of`](Host::entries_of) its entries;
/// - [`with_pages_lock`](Host::with_pages_lock) runs one closure at a time a VM.
pub unsafe trait Host {
    /// A memory slot.
    type Slot: ?Sized;

    /// Guard of an RCU read-side critical section.
    type Rcu<'a>: RcuRead
    where
        Self: 'a;

    /// Enters an RCU read-side critical section.
    fn rcu_read(&self) -> Self::Rcu<'_>;

    /// How entries look for this VM.
    fn format(&self) -> &SpteFormat;

    /// The CPU logs which pages it makes dirty (page-modification logging), by the
    /// address of the innermost guest. Constant from the VM's first root on.
    fn pml(&self) -> bool;

    /// The table at `hpa`, which a present entry that is no leaf points to.
    fn table_of(&self, hpa: Hpa) -> TablePtr;

    /// The entries of the table at `hpa`, without a look at its header.
    #[inline]
    fn entries_of(&self, hpa: Hpa) -> NonNull<Entries> {
        self.table_of(hpa).entries()
    }

    /// A new table; what its entries hold does not matter.
    /// May sleep: the engine calls it without any lock.
    fn alloc_table(&self) -> Option<TablePtr>;

    /// Frees a table that was never linked.
    fn free_table_now(&self, table: TablePtr);

    /// Frees a table after a grace period.
    fn free_table_rcu(&self, table: TablePtr);

    /// Counts a table, which is no root, as linked (`1`) or unlinked (`-1`).
    fn account_table(&self, table: TablePtr, delta: i32);

    /// Counts leaf entries that came (positive) or went.
    fn account_leaf(&self, level: Level, delta: i64);

    /// Counts pages that were mapped ahead and of which it is known now whether the
    /// guest used them.
    #[inline]
    fn account_ahead(&self, used: i64, unused: i64) {
        let _ = (used, unused);
    }

    /// Counts tables that exist only because of the NX huge page mitigation.
    fn account_nx_split(&self, delta: i64);

    /// Flushes all of the guest's translations from every TLB.
    fn flush_all(&self);

    /// Flushes translations of the range, cached table pointers included.
    fn flush_range(&self, range: GfnRange);

    /// Somebody waits for the lock or the CPU.
    fn need_break(&self) -> bool;

    /// Lets others have lock and CPU; outside of RCU.
    fn relax_read(&self, lock: &mut MmuRead<'_>);

    /// Lets others have lock and CPU; outside of RCU.
    fn relax_write(&self, lock: &mut MmuWrite<'_>);

    /// Runs `f` without `mmu_lock`.
    fn unlock_relock_read<R>(&self, lock: &mut MmuRead<'_>, f: impl FnOnce() -> R) -> R;

    /// Runs `f` without `mmu_lock`.
    fn unlock_relock_write<R>(&self, lock: &mut MmuWrite<'_>, f: impl FnOnce() -> R) -> R;

    /// Runs `f` under the lock of the list of roots and the list of NX candidates.
    fn with_pages_lock<R>(&self, f: impl FnOnce() -> R) -> R;

    /// The guest may write to `gfn` from now on, and the slot logs that. Whoever
    /// takes the mark out of the log sees the change of the entry before it; on x86
    /// the locked instructions for both see to that.
    fn mark_dirty(&self, slot: &Self::Slot, gfn: Gfn);

    /// Huge pages must not be executable.
    fn nx_huge_pages(&self) -> bool;

    /// The first mapping of host MMIO below a root is about to be installed.
    #[inline]
    fn host_mmio_mapped(&self) {}

    /// Something happened. Called under the locks of the operation, and within RCU.
    #[inline]
    fn trace(&self, _event: Event<'_>) {}

    /// An invariant is broken: warn, and let the VM run no more.
    fn bug(&self, what: &'static str);

    /// Something should not be as it is, and is put right: warn.
    fn warn(&self, what: &'static str);

    /// Does the flush that is owed.
    #[inline]
    fn spend<L: MmuLocked>(&self, flush: Flush, _lock: &L) {
        if flush.needed() {
            self.flush_all();
        }
    }

    /// Does the flush that is owed, all of it within `range`.
    #[inline]
    fn spend_range<L: MmuLocked>(&self, flush: Flush, range: GfnRange, _lock: &L) {
        if flush.needed() {
            self.flush_range(range);
        }
    }
}

/// Where the fault path gets tables from: the vCPU's cache, filled before any
/// lock was taken.
///
/// # Safety
///
/// As for [`Host::alloc_table`]. If [`PREFILLED`](TableSource::PREFILLED), every
/// entry of what [`take`](TableSource::take) returns is `Spte::NONPRESENT`.
pub unsafe trait TableSource {
    /// The entries are initialised already.
    const PREFILLED: bool = false;

    /// A table of its own, or nothing when the cache is empty.
    fn take(&mut self) -> Option<TablePtr>;
}

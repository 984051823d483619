// SPDX-License-Identifier: GPL-2.0

//! The audit: everything that must be true of the tables of a live VM, looked at.
//!
//! The engine keeps several views of the same thing: entries and reverse maps, links
//! and the lists of parents, unsync pages and the marks above them, protected tables
//! and the counters of their slots. An operation that updates one view and forgets
//! another does no harm at once; it does when somebody else relies on the other view,
//! perhaps after memory was freed. The audit compares the views, and does not rely on
//! any of them: an address that a reverse map or a list of parents has is followed
//! only once a page in use is known to be there.
//!
//! It holds `mmu_lock` for write and lets go of it between steps, so that what it
//! compares was read under one hold of the lock. A step is a page, a page's worth of
//! frames, or a look at the headers of all pages.
//!
//! - [`Shadow::audit`](crate::mmu::shadow::Shadow::audit): pages, entries, links, lists
//! - [`Shadow::audit_slot`](crate::mmu::shadow::Shadow::audit_slot): reverse maps and
//!   counters of a slot
//! - [`Tdp::audit`](crate::mmu::tdp::Tdp::audit): roots, tables, entries

use crate::mmu::{
    spte::Spte,
    sync::MmuWrite,
    types::{Gfn, Level},
};

/// An invariant that does not hold.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Broken {
    /// A leaf is not in the reverse map of the frame it maps, or is there twice.
    LeafNotInRmap,
    /// A reverse map has the address of something that is no entry of a page in use.
    RmapDangling,
    /// A reverse map has an entry that is no leaf of its frame and level.
    RmapWrongLeaf,
    /// The descriptors of a reverse map do not fit together.
    RmapShape,
    /// A leaf maps a frame that no slot has.
    LeafWithoutSlot,
    /// A leaf is not aligned to its level, or the page it maps is not.
    LeafAlignment,
    /// An entry has bits set that the format reserves.
    ReservedBits,
    /// A leaf is writable, but not host-writable and MMU-writable.
    LeafWritable,
    /// A leaf may become writable although writes to its frame must be seen.
    ProtectedWritable,
    /// An entry points to something that is no page in use.
    LinkDangling,
    /// An entry points to a page whose role or frame is not what the entry is for.
    LinkWrongPage,
    /// A page does not know an entry that points to it, or knows it twice.
    LinkNotInParents,
    /// A page knows a parent that does not point to it.
    ParentWrong,
    /// A page above an unsync page has no mark for it.
    UnsyncMark,
    /// The number of a page's marks is not what it counts.
    UnsyncCount,
    /// A page is unsync that is direct, above the last level, or has marks.
    UnsyncPage,
    /// A zapped page has entries, parents, or is in the list of pages in use.
    ZappedInUse,
    /// A page cannot be found: by its address, its hash, or in the list of pages in use.
    PageUnfindable,
    /// The table that a page shadows is in no slot, or writes to it are not tracked.
    TableUntracked,
    /// The count of pages, or of those that shadow tables, is wrong.
    PageCount,
    /// The list of NX candidates, or its count, is wrong.
    NxList,
    /// A slot counts other tables of a frame than there are.
    WriteTrackCount,
    /// A slot counts other reasons against a huge page than there are.
    LpageCount,
    /// The header of a table does not say what the entry is for that leads to it.
    TableHeader,
    /// A root has no reference, or is to be zapped though it is valid.
    RootState,
    /// An entry is frozen though nobody is removing it.
    FrozenLeft,
    /// The statistics of leaves, pages or NX splits are not what there is.
    Accounting,
}

impl Broken {
    /// The invariant's name, as reports have it.
    pub const fn name(self) -> &'static str {
        match self {
            Broken::LeafNotInRmap => "leaf-not-in-rmap",
            Broken::RmapDangling => "rmap-dangling",
            Broken::RmapWrongLeaf => "rmap-wrong-leaf",
            Broken::RmapShape => "rmap-shape",
            Broken::LeafWithoutSlot => "leaf-without-slot",
            Broken::LeafAlignment => "leaf-alignment",
            Broken::ReservedBits => "reserved-bits",
            Broken::LeafWritable => "leaf-writable",
            Broken::ProtectedWritable => "protected-writable",
            Broken::LinkDangling => "link-dangling",
            Broken::LinkWrongPage => "link-wrong-page",
            Broken::LinkNotInParents => "link-not-in-parents",
            Broken::ParentWrong => "parent-wrong",
            Broken::UnsyncMark => "unsync-mark",
            Broken::UnsyncCount => "unsync-count",
            Broken::UnsyncPage => "unsync-page",
            Broken::ZappedInUse => "zapped-in-use",
            Broken::PageUnfindable => "page-unfindable",
            Broken::TableUntracked => "table-untracked",
            Broken::PageCount => "page-count",
            Broken::NxList => "nx-list",
            Broken::WriteTrackCount => "write-track-count",
            Broken::LpageCount => "lpage-count",
            Broken::TableHeader => "table-header",
            Broken::RootState => "root-state",
            Broken::FrozenLeft => "frozen-left",
            Broken::Accounting => "accounting",
        }
    }
}

/// A place where an invariant does not hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What is broken.
    pub what: Broken,
    /// The frame it is about: the one that is mapped, or that of the guest's table.
    pub gfn: Gfn,
    /// The level of the entry, or of the page.
    pub level: Level,
    /// The entry, if it is about one.
    pub spte: Spte,
}

/// How much was looked at.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Looked {
    /// Roots of the TDP MMU.
    pub roots: u64,
    /// Entries of the TDP MMU, in all its tables.
    pub entries: u64,
    /// Shadow pages.
    pub pages: u64,
    /// Entries of shadow pages that are present.
    pub shadow_entries: u64,
    /// Entries of reverse maps.
    pub rmap_entries: u64,
    /// Frames whose counters were compared.
    pub frames: u64,
}

/// An audit that is under way.
pub struct Audit<F> {
    /// What was looked at so far.
    pub looked: Looked,
    /// Leaves of both MMUs by [`Level::slot`], as far as they were looked at.
    pub leaves: [u64; 5],
    /// Findings so far.
    pub broken: u64,
    report: F,
}

impl<F: FnMut(Finding)> Audit<F> {
    /// An audit that tells `report` what it finds.
    pub fn new(report: F) -> Self {
        Audit {
            looked: Looked::default(),
            leaves: [0; 5],
            broken: 0,
            report,
        }
    }

    pub(super) fn found(&mut self, what: Broken, gfn: Gfn, level: Level, spte: Spte) {
        self.broken = self.broken.wrapping_add(1);
        (self.report)(Finding {
            what,
            gfn,
            level,
            spte,
        });
    }

    /// Reports `what` unless `holds`.
    #[inline]
    pub(super) fn check(&mut self, holds: bool, what: Broken, gfn: Gfn, level: Level, spte: Spte) {
        if !holds {
            self.found(what, gfn, level, spte);
        }
    }

    /// Counts a leaf.
    pub(super) fn count_leaf(&mut self, level: Level) {
        if let Some(count) = self.leaves.get_mut(level.slot()) {
            *count = count.wrapping_add(1);
        }
    }

    /// Compares how many leaves of each level the statistics have with how many there
    /// are. Only if nothing changed between the first step and the last.
    pub fn compare_leaves(&mut self, accounted: impl Fn(Level) -> i64) {
        for level in [Level::L4K, Level::L2M, Level::L1G] {
            let there = self.leaves.get(level.slot()).copied().unwrap_or(0);
            let holds = accounted(level) == there as i64;
            self.check(holds, Broken::Accounting, Gfn(0), level, Spte::NONPRESENT);
        }
    }
}

/// What the audit of the TDP MMU asks about the frames that it finds mapped.
pub trait Frames {
    /// A slot of the address space has the frame.
    fn has_slot(&self, smm: bool, gfn: Gfn) -> bool;

    /// Nothing forbids that the guest writes to the frames of a leaf without being
    /// seen.
    fn may_be_writable(&self, smm: bool, gfn: Gfn, level: Level, lock: &MmuWrite<'_>) -> bool;
}

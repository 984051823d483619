// SPDX-License-Identifier: GPL-2.0

//! Leaves: the one place where they are made, changed and removed.

use super::{
    host::{Maximum, PageSource, ShadowHost},
    page::{Entry, Page},
    rmap::{NoDesc, Rmap},
    unsync::Purpose,
    Op,
};
use crate::mmu::{
    host::Event,
    spte::{leaf_change_needs_flush, LeafArgs, Spte, SpteFormat},
    sync::{atomic::AtomicU64, Flush},
    tdp::Outcome,
    types::{Gfn, Level, Pfn, ACC_WRITE},
};

/// More entries than this for one frame are not worth their memory.
const RMAP_LIMIT: u64 = 1000;

/// A leaf to be installed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    pub(super) gfn: Gfn,
    pub(super) pfn: Pfn,
    /// What the guest's tables grant.
    pub(super) access: u8,
    pub(super) write_fault: bool,
    pub(super) host_writable: bool,
    pub(super) prefetch: bool,
    pub(super) memtype: u64,
    pub(super) is_host_mmio: bool,
}

impl<'l, H: ShadowHost> Op<'l, H> {
    #[inline]
    pub(super) fn format(&self) -> &'l SpteFormat {
        self.host.format()
    }

    /// Maps memory at `entry`.
    pub(super) fn set_leaf<S: PageSource>(
        &self,
        source: &mut S,
        slot: &H::Slot,
        entry: Entry<'l>,
        leaf: &Leaf,
    ) -> Outcome {
        let format = self.format();
        let old = entry.spte();
        // The page alone does not tell: frames that share one (the zero page, what KSM
        // merged, two slots at one address) have a reverse map each, and what is
        // mapped for one of them must leave its map before it is mapped for another.
        let same_leaf =
            old.is_leaf(entry.level()) && old.pfn(format) == leaf.pfn && entry.gfn() == leaf.gfn;
        if same_leaf && leaf.prefetch {
            return Outcome::Spurious;
        }
        if old.is_present() && !same_leaf {
            self.unlink_or_drop(entry);
            self.owe_flush(true);
        }

        let Some((new, protected)) = self.make_leaf(slot, entry.page, leaf, entry.spte()) else {
            return Outcome::Retry;
        };
        let mut outcome = if new == old {
            Outcome::Spurious
        } else {
            Outcome::Fixed
        };
        if protected && leaf.write_fault {
            outcome = Outcome::WriteProtected;
        }
        if same_leaf {
            if new != old {
                self.owe_flush(self.update(entry, new));
            }
            self.note_translation(entry, leaf.gfn, leaf.access);
        } else if let Err(NoDesc) = self.install(source, slot, entry, leaf.gfn, leaf.access, new) {
            return Outcome::OutOfMemory;
        }
        if new != old {
            self.host.trace(Event::SpteSet {
                cell: entry.cell(),
                gfn: leaf.gfn,
                level: entry.level(),
            });
        }
        // The log is harvested under the write lock, so it does not miss this.
        if new.is_writable() && self.host.dirty_logged(slot) {
            self.host.mark_dirty(slot, leaf.gfn);
        }
        outcome
    }

    /// Installs a leaf at an entry that is not present.
    pub(super) fn install<S: PageSource>(
        &self,
        source: &mut S,
        slot: &H::Slot,
        entry: Entry<'l>,
        gfn: Gfn,
        access: u8,
        new: Spte,
    ) -> Result<(), NoDesc> {
        let level = entry.level();
        let Some(rmap) = self.host.rmap(slot, gfn, level).map(Rmap::new) else {
            self.host
                .bug("rmmu: a frame to be mapped has no reverse map");
            return Err(NoDesc);
        };
        let count = rmap.count(self.lock);
        if count > RMAP_LIMIT {
            self.drop_all(rmap);
            self.owe_flush(true);
        }
        rmap.add(entry.as_ptr(), source, self.lock)?;
        self.host.maximum(Maximum::RmapSize, count);
        self.note_translation(entry, gfn, access);
        self.host.account_leaf(level, 1);
        entry.store(new);
        Ok(())
    }

    #[inline]
    fn note_translation(&self, entry: Entry<'l>, gfn: Gfn, access: u8) {
        if !entry.page.set_translation(entry.index, gfn, access) {
            self.host
                .bug("rmmu: a direct page can not translate to anything else");
        }
    }

    /// The entry for a leaf of `page`, and whether it is write-protected although
    /// guest and host would allow writes. `old` is what it is going to replace.
    pub(super) fn make_leaf(
        &self,
        slot: &H::Slot,
        page: &Page,
        leaf: &Leaf,
        old: Spte,
    ) -> Option<(Spte, bool)> {
        let purpose = if leaf.prefetch {
            Purpose::Prefetch
        } else {
            Purpose::Fault
        };
        self.make_leaf_for(slot, page, leaf, old, purpose)
    }

    /// As [`make_leaf`](Op::make_leaf), for a purpose.
    pub(super) fn make_leaf_for(
        &self,
        slot: &H::Slot,
        page: &Page,
        leaf: &Leaf,
        old: Spte,
        purpose: Purpose,
    ) -> Option<(Spte, bool)> {
        let format = self.format();
        let role = page.role();
        let wants_write = leaf.host_writable && leaf.access & ACC_WRITE != 0;
        // A leaf that is writable already was checked before: pages of the frame's
        // table are unsync.
        let was_writable = old.is_leaf(role.level()) && old.is_writable();
        let write_protect = wants_write
            && !was_writable
            && self
                .shadow
                .try_unsync_for(self.host, self.lock, slot, leaf.gfn, purpose)
                .is_err();
        let args = LeafArgs {
            gfn: leaf.gfn,
            pfn: leaf.pfn,
            level: role.level(),
            access: leaf.access,
            host_writable: leaf.host_writable,
            prefetch: leaf.prefetch,
            write_protect,
            nx_huge_page: self.host.nx_huge_pages(),
            memtype: leaf.memtype,
            is_host_mmio: leaf.is_host_mmio,
            ad: role.ad_mode(self.host),
        };
        match Spte::leaf(format, &args) {
            Ok(spte) => Some((spte, write_protect)),
            Err(_) => {
                self.host.bug("rmmu: an entry would have reserved bits set");
                None
            }
        }
    }

    /// Replaces a present leaf by one for the same page; true if a flush is owed.
    pub(super) fn update(&self, entry: Entry<'l>, new: Spte) -> bool {
        let format = self.format();
        let mut old = entry.spte();
        if old.needs_atomic_update(format) {
            old = entry.swap(new);
        } else {
            entry.store(new);
        }
        if !new.is_consistent(format) || old.pfn(format) != new.pfn(format) {
            self.host
                .bug("rmmu: a leaf was replaced by one that does not fit");
        }
        leaf_change_needs_flush(format, old, new)
    }

    /// Clears an entry that is no table; true if it was a leaf. The reverse map is
    /// the caller's.
    fn clear(&self, entry: Entry<'l>) -> bool {
        let mut old = entry.spte();
        if old.is_present() && old.needs_atomic_update(self.format()) {
            old = entry.swap(Spte::NONPRESENT);
        } else {
            entry.store(Spte::NONPRESENT);
        }
        if old.is_present() {
            self.host.account_leaf(entry.level(), -1);
        }
        old.is_present()
    }

    /// Removes a leaf, or clears an entry that is not present; true if it was a
    /// leaf.
    pub(super) fn drop_leaf(&self, entry: Entry<'l>) -> bool {
        if !self.clear(entry) {
            return false;
        }
        let rmap = self
            .rmap_of(entry.page, entry.gfn())
            .is_some_and(|rmap| rmap.remove(self.host, entry.as_ptr(), self.lock));
        if !rmap {
            self.host.bug("rmmu: a leaf is in no reverse map");
        }
        true
    }

    /// Removes all leaves of a map; true if there was one.
    pub(super) fn drop_all(&self, rmap: Rmap<'_>) -> bool {
        let mut any = false;
        while let Some(pointer) = rmap.pop(self.host, self.lock) {
            any = true;
            if !self.clear(pointer.entry(self.host, self.lock)) {
                self.host.bug("rmmu: a reverse map leads to no leaf");
            }
        }
        any
    }

    fn rmap_of(&self, page: &Page, gfn: Gfn) -> Option<Rmap<'l>> {
        let slot = self.host.slot(page.role().is_smm(), gfn)?;
        self.host.rmap(slot, gfn, page.level()).map(Rmap::new)
    }

    /// Takes write access from all leaves that map `gfn` at `min_level` or above,
    /// and the permission to give it back without asking us.
    pub(super) fn protect_rmaps(&self, slot: &H::Slot, gfn: Gfn, min_level: Level) -> Flush {
        let mut flush = Flush::none();
        for level in min_level.get()..=Level::MAX_HUGE.get() {
            let rmap = Level::new(level).and_then(|level| self.host.rmap(slot, gfn, level));
            if let Some(rmap) = rmap {
                flush = flush.merge(self.protect_rmap(rmap, true));
            }
        }
        flush
    }

    /// As [`protect_rmaps`](Op::protect_rmaps), in the TDP MMU's tables, too.
    pub(super) fn protect_gfn(&self, slot: &H::Slot, gfn: Gfn, min_level: Level) -> Flush {
        let ours = self.protect_rmaps(slot, gfn, min_level);
        ours.merge(self.host.protect_in_tdp(self.lock, slot, gfn))
    }

    /// Takes write access from the leaves of a map; if `for_table`, also the
    /// permission to give it back without asking us.
    pub(super) fn protect_rmap(&self, rmap: &AtomicU64, for_table: bool) -> Flush {
        let format = self.format();
        let mut flush = false;
        Rmap::new(rmap).for_each(self.host, self.lock, |entry| {
            let spte = entry.spte();
            let mut bits = Spte::WRITABLE_MASK;
            if for_table {
                bits |= format.mmu_writable;
            }
            if spte.is_writable() || for_table && spte.is_mmu_writable(format) {
                flush |= self.update(entry, spte.without(bits));
            }
        });
        Flush::when(flush)
    }
}

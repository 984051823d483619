// SPDX-License-Identifier: GPL-2.0

//! The audit of the shadow MMU's pages; see [`crate::mmu::audit`].

use super::{
    host::AuditHost,
    list::Buckets,
    page::{Entry, Nx, Page},
    rmap::{EntryPtr, Rmap},
    Op, Owed, Shadow,
};
use crate::mmu::{
    audit::{Audit, Broken, Finding, Frames},
    spte::Spte,
    sync::{atomic::Ordering, MmuLocked, MmuWrite},
    table::ENTRIES,
    types::{Gfn, Level},
};
use core::ptr;

impl Shadow {
    /// Looks at all pages: what their entries map and lead to, who leads to them, the
    /// marks about unsync pages, and the lists that they are in. Yields on the way.
    pub fn audit<H: AuditHost, F: FnMut(Finding)>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        audit: &mut Audit<F>,
    ) {
        if !self.has_buckets() {
            return;
        }
        self.op(host, lock, Owed::nothing()).audit_lists(audit);
        for number in 0..Buckets::COUNT {
            self.op(host, lock, Owed::nothing())
                .audit_bucket(number, audit);
            if host.need_break() {
                lock.relax(host);
            }
        }
    }

    /// A table at `gfn` is shadowed of which every write must be seen.
    fn must_see_writes(&self, gfn: Gfn, smm: bool, lock: &MmuWrite<'_>) -> bool {
        self.indirect.load(Ordering::Relaxed) != 0
            && self
                .find_shadowing(gfn, lock, |page| {
                    page.role().is_smm() == smm && !page.is_unsync()
                })
                .is_some()
    }
}

impl<'l, H: AuditHost> Op<'l, H> {
    /// The headers of all pages, and the lists and counts that they are in.
    fn audit_lists<F: FnMut(Finding)>(&self, audit: &mut Audit<F>) {
        let (mut valid, mut held, mut indirect, mut candidates) = (0u64, 0u64, 0u64, 0u64);
        for number in 0..Buckets::COUNT {
            self.for_each_in_bucket(number, |page| {
                let role = page.role();
                if !role.is_invalid() {
                    valid = valid.wrapping_add(1);
                    indirect = indirect.wrapping_add(role.has_guest_entries().into());
                }
                if !role.is_invalid() || page.roots.get() != 0 {
                    held = held.wrapping_add(1);
                }
                candidates = candidates.wrapping_add((page.nx.get() == Nx::Candidate).into());
            });
        }
        let mut broken = |what| audit.found(what, Gfn(0), Level::L4K, Spte::NONPRESENT);

        let mut listed: u64 = 0;
        let mut at = self.shadow.active.first(self.lock);
        while let Some(page) = at {
            // More than there are: the list is a circle.
            if listed > valid {
                break;
            }
            listed = listed.wrapping_add(1);
            if page.role().is_invalid() {
                broken(Broken::ZappedInUse);
            }
            at = self.shadow.active.after(page, self.lock);
        }
        if listed != valid {
            broken(Broken::PageUnfindable);
        }
        let accounted = self.shadow.indirect.load(Ordering::Relaxed);
        if self.shadow.pages() != held || accounted != indirect {
            broken(Broken::PageCount);
        }

        let mut listed: u64 = 0;
        let mut at = self.shadow.nx.first(self.lock);
        while let Some(page) = at {
            if listed > candidates {
                break;
            }
            listed = listed.wrapping_add(1);
            if page.nx.get() != Nx::Candidate || page.role().is_invalid() {
                broken(Broken::NxList);
            }
            at = self.shadow.nx.after(page, self.lock);
        }
        if listed != candidates || self.shadow.nx_candidates() != candidates {
            broken(Broken::NxList);
        }
    }

    pub(super) fn for_each_in_bucket(&self, number: usize, mut f: impl FnMut(&'l Page)) {
        let Some(bucket) = self.shadow.bucket_number(number, self.lock) else {
            return;
        };
        let mut at = bucket.first(self.lock);
        while let Some(page) = at {
            f(page);
            at = bucket.after(page, self.lock);
        }
    }

    fn audit_bucket<F: FnMut(Finding)>(&self, number: usize, audit: &mut Audit<F>) {
        self.for_each_in_bucket(number, |page| {
            audit.looked.pages = audit.looked.pages.wrapping_add(1);
            let found_again = Buckets::number_of(page.gfn().0) == number
                && self.live_page(ptr::from_ref(page.entries()).addr() as u64)
                    == Some(page.as_ptr());
            audit.check(
                found_again,
                Broken::PageUnfindable,
                page.gfn(),
                page.level(),
                Spte::NONPRESENT,
            );
            self.audit_page(page, audit);
        });
    }

    fn audit_page<F: FnMut(Finding)>(&self, page: &'l Page, audit: &mut Audit<F>) {
        let role = page.role();
        let mut check = |holds, what| {
            audit.check(holds, what, page.gfn(), role.level(), Spte::NONPRESENT);
        };
        check(
            page.unsync_marks() == page.unsync_count(),
            Broken::UnsyncCount,
        );
        if page.is_unsync() {
            check(
                role.level() == Level::L4K
                    && role.has_guest_entries()
                    && !page.has_unsync_children(),
                Broken::UnsyncPage,
            );
        }
        if role.is_invalid() {
            let empty = (0..ENTRIES).all(|index| !Entry::new(page, index).spte().is_present());
            check(
                empty && page.parents().is_empty() && !page.is_unsync(),
                Broken::ZappedInUse,
            );
            return;
        }
        if role.has_guest_entries() {
            check(self.tracks_table(page), Broken::TableUntracked);
        }
        self.audit_parents(page, audit);
        for index in 0..ENTRIES {
            self.audit_entry(Entry::new(page, index), audit);
        }
    }

    /// Writes to the table of a page are tracked as they must be, and no huge page may
    /// map it.
    fn tracks_table(&self, page: &Page) -> bool {
        let Some(slot) = self.host.slot(page.role().is_smm(), page.gfn()) else {
            return false;
        };
        let huge = self.host.lpage_count(slot, page.gfn(), Level::L2M);
        let tracked = page.level() == Level::L4K || self.host.write_tracked(slot, page.gfn());
        tracked && huge.is_some_and(|(count, of_slot)| count > of_slot)
    }

    fn audit_parents<F: FnMut(Finding)>(&self, page: &'l Page, audit: &mut Audit<F>) {
        let format = self.format();
        let mut wrong: u64 = 0;
        let shape = page.parents().for_each_pointer(self.lock, |pointer| {
            let links = self.live_entry(pointer).is_some_and(|entry| {
                let spte = entry.spte();
                spte.is_nonleaf(entry.level()) && spte.hpa(format) == page.hpa()
            });
            wrong = wrong.wrapping_add((!links).into());
        });
        let mut check = |holds, what| {
            audit.check(holds, what, page.gfn(), page.level(), Spte::NONPRESENT);
        };
        check(shape, Broken::RmapShape);
        check(wrong == 0, Broken::ParentWrong);
    }

    fn audit_entry<F: FnMut(Finding)>(&self, entry: Entry<'l>, audit: &mut Audit<F>) {
        let format = self.format();
        let (spte, level) = (entry.spte(), entry.level());
        if !spte.is_present() {
            let frozen = spte.is_frozen();
            audit.check(!frozen, Broken::FrozenLeft, entry.gfn(), level, spte);
            return;
        }
        audit.looked.shadow_entries = audit.looked.shadow_entries.wrapping_add(1);
        let reserved = format.reserved(spte.raw(), level);
        audit.check(
            reserved == 0,
            Broken::ReservedBits,
            entry.gfn(),
            level,
            spte,
        );
        if spte.is_nonleaf(level) {
            self.audit_link(entry, spte, audit);
        } else {
            audit.count_leaf(level);
            self.audit_leaf(entry, spte, audit);
        }
    }

    fn audit_link<F: FnMut(Finding)>(&self, entry: Entry<'l>, spte: Spte, audit: &mut Audit<F>) {
        let (page, level) = (entry.page, entry.level());
        let mut check = |holds, what| audit.check(holds, what, page.gfn(), level, spte);
        let child = self
            .live_page(self.host.address_of(spte.hpa(self.format())))
            .map(|child| child.page(self.lock))
            .filter(|child| !child.role().is_invalid());
        let Some(child) = child else {
            check(false, Broken::LinkDangling);
            return;
        };
        let (role, of_child) = (page.role(), child.role());
        let fits = role.child(entry.index, of_child.is_direct(), of_child.access())
            == Some(of_child)
            && (!role.is_direct() || of_child.is_direct() && child.gfn() == entry.gfn());
        check(fits, Broken::LinkWrongPage);
        let mut known: u64 = 0;
        child.parents().for_each_pointer(self.lock, |pointer| {
            known = known.wrapping_add((pointer == entry.as_ptr()).into());
        });
        check(known == 1, Broken::LinkNotInParents);
        if child.is_unsync() || child.has_unsync_children() {
            check(page.has_unsync_mark(entry.index), Broken::UnsyncMark);
        }
    }

    fn audit_leaf<F: FnMut(Finding)>(&self, entry: Entry<'l>, spte: Spte, audit: &mut Audit<F>) {
        let format = self.format();
        let (gfn, level, smm) = (entry.gfn(), entry.level(), entry.page.role().is_smm());
        let mut check = |holds, what| audit.check(holds, what, gfn, level, spte);
        let aligned = (gfn.0 | spte.pfn(format).0) & level.gfn_mask() == 0;
        check(aligned, Broken::LeafAlignment);
        check(spte.is_consistent(format), Broken::LeafWritable);
        let Some(slot) = self.host.slot(smm, gfn) else {
            check(false, Broken::LeafWithoutSlot);
            return;
        };
        let mut known: u64 = 0;
        if let Some(rmap) = self.host.rmap(slot, gfn, level) {
            Rmap::new(rmap).for_each_pointer(self.lock, |pointer| {
                known = known.wrapping_add((pointer == entry.as_ptr()).into());
            });
        }
        check(known == 1, Broken::LeafNotInRmap);
        if spte.is_mmu_writable(format) {
            let frames = ShadowedFrames {
                host: self.host,
                shadow: self.shadow,
            };
            let safe = frames.may_be_writable(smm, gfn, level, self.lock);
            check(safe, Broken::ProtectedWritable);
        }
    }

    /// The page in use whose entries are at an address, of which nothing is known.
    pub(super) fn live_page(&self, entries: u64) -> Option<super::PagePtr> {
        let (header, gfn) = self.host.claimed_header(entries)?;
        let bucket = self.shadow.bucket(gfn.0, self.lock)?;
        let mut at = bucket.first(self.lock);
        while let Some(page) = at {
            if ptr::from_ref(page).addr() as u64 == header {
                let same = ptr::from_ref(page.entries()).addr() as u64 == entries;
                return same.then_some(page.as_ptr());
            }
            at = bucket.after(page, self.lock);
        }
        None
    }

    /// The entry at an address that a reverse map has, if a page in use is there.
    pub(super) fn live_entry(&self, pointer: EntryPtr) -> Option<Entry<'l>> {
        let (entries, index) = pointer.place();
        let page = self.live_page(entries)?;
        Some(Entry::new(page.page(self.lock), index))
    }
}

/// The frames of a VM with a shadow MMU.
pub struct ShadowedFrames<'a, H> {
    /// The host.
    pub host: &'a H,
    /// Its shadow MMU.
    pub shadow: &'a Shadow,
}

impl<H: AuditHost> Frames for ShadowedFrames<'_, H> {
    fn has_slot(&self, smm: bool, gfn: Gfn) -> bool {
        self.host.slot(smm, gfn).is_some()
    }

    fn may_be_writable(&self, smm: bool, gfn: Gfn, level: Level, lock: &MmuWrite<'_>) -> bool {
        let Some(slot) = self.host.slot(smm, gfn) else {
            return true;
        };
        if level == Level::L4K {
            return !self.host.write_tracked(slot, gfn)
                && !self.shadow.must_see_writes(gfn, smm, lock);
        }
        // A huge page never maps a table so that it can be written to, be the table in
        // sync or not.
        let count = self.host.lpage_count(slot, gfn, level);
        count.is_none_or(|(count, of_slot)| count == of_slot)
    }
}

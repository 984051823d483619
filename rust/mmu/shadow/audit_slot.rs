// SPDX-License-Identifier: GPL-2.0

//! The audit of what slots keep for the MMU; see [`crate::mmu::audit`].

use super::{host::AuditHost, list::Buckets, rmap::Rmap, Op, Owed, Shadow};
use crate::mmu::{
    audit::{Audit, Broken, Finding},
    spte::Spte,
    sync::{MmuLocked, MmuWrite},
    types::{Gfn, GfnRange, Level},
};

impl Shadow {
    /// Looks at the reverse maps of a slot, and at what it counts about its frames.
    /// Yields on the way.
    pub fn audit_slot<H: AuditHost, F: FnMut(Finding)>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        slot: &H::Slot,
        audit: &mut Audit<F>,
    ) {
        let range = host.slot_range(slot);
        for level in [Level::L4K, Level::L2M, Level::L1G] {
            // What one step looks at: frames of one page of the next level.
            let step = level.parent().unwrap_or(level);
            let mut gfn = range.start;
            while gfn < range.end {
                let end = gfn.round_down(step).add(step.pages()).min(range.end);
                let part = GfnRange::new(gfn, end);
                let op = self.op(host, lock, Owed::nothing());
                op.audit_rmaps(slot, part, level, audit);
                if level == Level::L4K {
                    op.audit_counters(slot, part, audit);
                }
                if level == Level::L2M {
                    op.audit_gigabyte(slot, part, audit);
                }
                gfn = end;
                if host.need_break() {
                    lock.relax(host);
                }
            }
        }
    }
}

impl<H: AuditHost> Op<'_, H> {
    fn audit_rmaps<F: FnMut(Finding)>(
        &self,
        slot: &H::Slot,
        part: GfnRange,
        level: Level,
        audit: &mut Audit<F>,
    ) {
        let smm = self.host.is_smm_slot(slot);
        let mut gfn = part.start;
        while gfn < part.end {
            // The first frame may be in the middle of a huge page, whose map it has.
            let mapped = gfn.round_down(level);
            if let Some(rmap) = self.host.rmap(slot, gfn, level) {
                let rmap = Rmap::new(rmap);
                let (mut dangling, mut wrong, mut count) = (0u64, 0u64, 0u64);
                let shape = rmap.for_each_pointer(self.lock, |pointer| {
                    count = count.wrapping_add(1);
                    let Some(entry) = self.live_entry(pointer) else {
                        dangling = dangling.wrapping_add(1);
                        return;
                    };
                    let fits = entry.spte().is_leaf(level)
                        && entry.level() == level
                        && entry.gfn() == mapped
                        && entry.page.role().is_smm() == smm;
                    wrong = wrong.wrapping_add((!fits).into());
                });
                audit.looked.rmap_entries = audit.looked.rmap_entries.wrapping_add(count);
                let mut check = |holds, what| {
                    audit.check(holds, what, mapped, level, Spte::NONPRESENT);
                };
                check(shape, Broken::RmapShape);
                check(dangling == 0, Broken::RmapDangling);
                check(wrong == 0, Broken::RmapWrongLeaf);
            }
            gfn = mapped.add(level.pages());
        }
    }

    /// Counters of the frames of one huge page of 2 MiB.
    fn audit_counters<F: FnMut(Finding)>(
        &self,
        slot: &H::Slot,
        part: GfnRange,
        audit: &mut Audit<F>,
    ) {
        let smm = self.host.is_smm_slot(slot);
        let mut tables: i64 = 0;
        let mut gfn = part.start;
        while gfn < part.end {
            let mut tracked: i64 = 0;
            self.shadow.for_each_shadowing(gfn, self.lock, |page| {
                if page.role().is_smm() == smm {
                    tables = tables.wrapping_add(1);
                    tracked = tracked.wrapping_add((page.level() > Level::L4K).into());
                }
            });
            if let Some(count) = self.host.write_track_count(slot, gfn) {
                let holds = self.is_count(count, tracked);
                audit.check(
                    holds,
                    Broken::WriteTrackCount,
                    gfn,
                    Level::L4K,
                    Spte::NONPRESENT,
                );
            }
            gfn = gfn.add(1);
        }
        audit.looked.frames = audit.looked.frames.wrapping_add(part.pages());
        self.audit_lpage_count(slot, part.start, Level::L2M, tables, audit);
    }

    /// The counter of one huge page of 1 GiB. The frames are too many to look each up.
    fn audit_gigabyte<F: FnMut(Finding)>(
        &self,
        slot: &H::Slot,
        part: GfnRange,
        audit: &mut Audit<F>,
    ) {
        let smm = self.host.is_smm_slot(slot);
        let mut tables: i64 = 0;
        for number in 0..Buckets::COUNT {
            self.for_each_in_bucket(number, |page| {
                let role = page.role();
                let counts = !role.is_invalid()
                    && role.has_guest_entries()
                    && role.is_smm() == smm
                    && part.contains(page.gfn());
                tables = tables.wrapping_add(counts.into());
            });
        }
        self.audit_lpage_count(slot, part.start, Level::L1G, tables, audit);
    }

    fn audit_lpage_count<F: FnMut(Finding)>(
        &self,
        slot: &H::Slot,
        gfn: Gfn,
        level: Level,
        tables: i64,
        audit: &mut Audit<F>,
    ) {
        let Some((count, of_slot)) = self.host.lpage_count(slot, gfn, level) else {
            return;
        };
        let holds = self.is_count(count, of_slot.wrapping_add(tables));
        audit.check(holds, Broken::LpageCount, gfn, level, Spte::NONPRESENT);
    }

    /// A slot's count is what it must be; or more, if others count, too.
    fn is_count(&self, count: i64, expected: i64) -> bool {
        count == expected || self.host.others_track_writes() && count > expected
    }
}

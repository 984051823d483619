// SPDX-License-Identifier: GPL-2.0

//! The audit of the TDP MMU's tables; see [`crate::mmu::audit`].

use super::{
    roots::Which,
    walk::{child_table, mapped_by, Cursor, Entry},
    Tdp,
};
use crate::mmu::{
    audit::{Audit, Broken, Finding, Frames},
    host::Host,
    spte::Spte,
    sync::{atomic::Ordering, MmuLocked, MmuWrite, RcuRead},
    table::Table,
    types::{Gfn, GfnRange, Level},
};
use core::ptr;

impl Tdp {
    /// Looks at all roots, and at the tables and entries below them. Yields on the
    /// way.
    pub fn audit<H: Host, S: Frames, F: FnMut(Finding)>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        frames: &S,
        audit: &mut Audit<F>,
    ) {
        self.audit_nx(host, audit);
        let all = Which {
            smm: None,
            invalid: true,
        };
        let roots = self.roots(host, all);
        let mut next = roots.after(None);
        while let Some(root) = next {
            audit.looked.roots = audit.looked.roots.wrapping_add(1);
            // Ours is one reference; one more is the MMU's own, or a vCPU's.
            let held = root.refs.load(Ordering::Relaxed) > 1;
            let scheduled = root.zap_scheduled.load(Ordering::Relaxed);
            audit.check(
                held && (root.is_invalid() || !scheduled) && root.gfn() == Gfn(0),
                Broken::RootState,
                root.gfn(),
                root.level(),
                Spte::NONPRESENT,
            );
            self.audit_root(host, lock, frames, &root, audit);
            next = roots.after(Some(root));
        }
    }

    fn audit_root<H: Host, S: Frames, F: FnMut(Finding)>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        frames: &S,
        root: &Table,
        audit: &mut Audit<F>,
    ) {
        let all = GfnRange::new(Gfn(0), root.level().root_end());
        let mut left = mapped_by(host, root, all);
        while !left.is_empty() {
            left.start = audit_entries(host, lock, frames, root, left, audit);
            if !left.is_empty() {
                lock.relax(host);
            }
        }
    }

    fn audit_nx<H: Host, F: FnMut(Finding)>(&self, host: &H, audit: &mut Audit<F>) {
        let holds = host.with_pages_lock(|| {
            let mut previous = ptr::null_mut();
            let mut at = self.nx_first.load(Ordering::Relaxed);
            let mut count: u64 = 0;
            // SAFETY: A table in the list is not freed before it left it, which takes
            // the pages lock.
            while let Some(table) = unsafe { at.as_ref() } {
                let fits = table.nx_listed.load(Ordering::Relaxed)
                    && table.nx_disallowed.load(Ordering::Relaxed)
                    && table.nx_prev.load(Ordering::Relaxed) == previous;
                if !fits || count > self.nx_candidates() {
                    return false;
                }
                count = count.wrapping_add(1);
                previous = at;
                at = table.nx_next.load(Ordering::Relaxed);
            }
            count == self.nx_candidates() && self.nx_last.load(Ordering::Relaxed) == previous
        });
        audit.check(holds, Broken::NxList, Gfn(0), Level::L4K, Spte::NONPRESENT);
    }
}

/// Looks at the entries of a range, until somebody waits for the lock; returns where
/// to go on.
fn audit_entries<H: Host, S: Frames, F: FnMut(Finding)>(
    host: &H,
    lock: &MmuWrite<'_>,
    frames: &S,
    root: &Table,
    range: GfnRange,
    audit: &mut Audit<F>,
) -> Gfn {
    let rcu = host.rcu_read();
    let mut cursor = Cursor::new(host, &rcu, root, range, Level::L4K);
    while let Some(entry) = cursor.next() {
        if cursor.goal() != range.start && host.need_break() {
            return cursor.goal();
        }
        audit.looked.entries = audit.looked.entries.wrapping_add(1);
        let (spte, level) = (entry.spte, entry.level);
        if !spte.is_present() {
            // What is frozen is being removed, and that takes the lock.
            let left = spte.is_frozen() && !root.is_invalid();
            audit.check(!left, Broken::FrozenLeft, entry.gfn, level, spte);
            continue;
        }
        let reserved = host.format().reserved(spte.raw(), level);
        audit.check(reserved == 0, Broken::ReservedBits, entry.gfn, level, spte);
        if entry.is_nonleaf() {
            let fits = fits_link(host, root, &entry, &rcu);
            audit.check(fits, Broken::TableHeader, entry.gfn, level, spte);
        } else {
            audit.count_leaf(level);
            audit_leaf(host, frames, lock, root, &entry, audit);
        }
    }
    range.end
}

/// The table that an entry points to says that it is for this entry.
fn fits_link<H: Host, R: RcuRead>(host: &H, root: &Table, entry: &Entry<'_>, rcu: &R) -> bool {
    let table = child_table(host, entry.spte, rcu);
    let Some(level) = entry.level.child() else {
        return false;
    };
    table.hpa() == entry.spte.hpa(host.format())
        && table.gfn() == entry.gfn
        && table.role() == root.role().with_level(level).complete()
}

fn audit_leaf<H: Host, S: Frames, F: FnMut(Finding)>(
    host: &H,
    frames: &S,
    lock: &MmuWrite<'_>,
    root: &Table,
    entry: &Entry<'_>,
    audit: &mut Audit<F>,
) {
    let format = host.format();
    let (gfn, level, spte) = (entry.gfn, entry.level, entry.spte);
    let mut check = |holds, what| audit.check(holds, what, gfn, level, spte);
    let aligned = (gfn.0 | spte.pfn(format).0) & level.gfn_mask() == 0;
    check(aligned, Broken::LeafAlignment);
    check(spte.is_consistent(format), Broken::LeafWritable);
    // An invalid root may map what a slot was that is gone by now; nobody uses it.
    if root.is_invalid() {
        return;
    }
    let smm = root.is_smm();
    check(frames.has_slot(smm, gfn), Broken::LeafWithoutSlot);
    if spte.is_mmu_writable(format) {
        let safe = frames.may_be_writable(smm, gfn, level, lock);
        check(safe, Broken::ProtectedWritable);
    }
}

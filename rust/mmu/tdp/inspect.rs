// SPDX-License-Identifier: GPL-2.0

//! Looking at the tables without touching them, and without `mmu_lock`.

use super::{
    walk::{child_entries, mapped_by, Cursor, Entry},
    Tdp,
};
use crate::mmu::{
    host::Host,
    spte::Spte,
    table::TablePtr,
    types::{Gfn, GfnRange, Level},
};

impl Tdp {
    /// Stores the entries that cover `gfn`, from the root down, at `sptes[level]`.
    /// Returns the lowest level reached, and that of the root. The caller holds a
    /// reference to `root`.
    pub fn walk<H: Host>(
        &self,
        host: &H,
        root: TablePtr,
        gfn: Gfn,
        sptes: &mut [Spte; 6],
    ) -> Option<(Level, Level)> {
        // SAFETY: The caller's reference keeps the root alive.
        let root = unsafe { root.as_ref() };
        if gfn >= root.level().root_end() {
            return None;
        }
        let rcu = host.rcu_read();
        let mut entry = Entry::at(root.entries(), gfn, root.level());
        loop {
            if let Some(place) = sptes.get_mut(usize::from(entry.level.get())) {
                *place = entry.spte;
            }
            match (entry.is_nonleaf(), entry.level.child()) {
                (true, Some(level)) => {
                    entry = Entry::at(child_entries(host, entry.spte, &rcu), gfn, level);
                }
                _ => return Some((entry.level, root.level())),
            }
        }
    }

    /// Tells `f` about up to `limit` entries from `from` on that are not plainly
    /// empty: leaves, and MMIO. Returns where to go on, or nothing at the end. The
    /// caller holds a reference to `root`.
    ///
    /// The limit also bounds the entries looked at, since this is one RCU section.
    pub fn visit_leaves<H: Host>(
        &self,
        host: &H,
        root: TablePtr,
        from: Gfn,
        limit: usize,
        mut f: impl FnMut(Gfn, Level, Spte),
    ) -> Option<Gfn> {
        // SAFETY: The caller's reference keeps the root alive.
        let root = unsafe { root.as_ref() };
        let format = host.format();
        let all = GfnRange::new(from, format.gfn_end());
        let range = mapped_by(host, root, all);
        if range.is_empty() {
            return None;
        }
        let rcu = host.rcu_read();
        let mut cursor = Cursor::new(host, &rcu, root, range, Level::L4K);
        let mut seen: usize = 0;
        while let Some(entry) = cursor.next() {
            // A section that stops where it began would never end.
            if seen >= limit && cursor.goal() != from {
                return Some(cursor.goal());
            }
            seen = seen.wrapping_add(1);
            if entry.is_leaf() || !entry.spte.is_present() && entry.spte.is_mmio(format) {
                f(entry.gfn, entry.level, entry.spte);
            }
        }
        None
    }
}

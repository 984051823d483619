// SPDX-License-Identifier: GPL-2.0

//! Looking without touching.

use super::{host::ShadowHost, page::Entry, roots::Root, Owed, PageRole, Shadow};
use crate::mmu::{
    spte::Spte,
    sync::MmuWrite,
    table::ENTRIES,
    types::{Gfn, Hpa, Level},
};

/// What there is to know about a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageInfo {
    /// The frame of the guest's table; of a direct page, the first it maps.
    pub gfn: Gfn,
    /// The role.
    pub role: PageRole,
    /// The address of its entries.
    pub hpa: Hpa,
    /// vCPUs that use it as a root.
    pub roots: u32,
    /// Entries that point to it.
    pub parents: u64,
    /// Entries that are present.
    pub present: u32,
    /// The guest may have changed the table.
    pub unsync: bool,
    /// The same for a page below.
    pub unsync_children: bool,
}

/// The tables have no more levels.
const LEVELS: usize = 5;

impl Shadow {
    /// Shows every page in use.
    pub fn visit_pages(&self, lock: &MmuWrite<'_>, mut f: impl FnMut(&PageInfo)) {
        let mut at = self.active.first(lock);
        while let Some(page) = at {
            at = self.active.after(page, lock);
            let present = (0..ENTRIES).filter(|&i| Entry::new(page, i).spte().is_present());
            f(&PageInfo {
                gfn: page.gfn(),
                role: page.role(),
                hpa: page.hpa(),
                roots: page.roots.get(),
                parents: page.parents().count(lock),
                present: present.count() as u32,
                unsync: page.is_unsync(),
                unsync_children: page.has_unsync_children(),
            });
        }
    }

    /// Shows every leaf below a root: the frame of the address in the guest's
    /// space, the frame it translates to, level and entry. False from `f` ends it.
    pub fn visit_leaves<H: ShadowHost>(
        &self,
        host: &H,
        lock: &MmuWrite<'_>,
        root: Root<'_>,
        mut f: impl FnMut(Gfn, Gfn, Level, Spte) -> bool,
    ) {
        // Nothing is changed, so nothing is going to be owed.
        let op = self.op(host, lock, Owed::nothing());
        let starts: usize = match root {
            Root::Page(_) => 1,
            Root::Pae(_) => 4,
        };
        for start in 0..starts {
            let base = (start as u64) << 30;
            let Some(first) = op.first_entry(root, base) else {
                continue;
            };
            // The way down: where in which page, and the address there.
            let mut path = [None; LEVELS];
            let mut depth = 0;
            path[0] = Some((first.page, 0, base >> 12));
            while let Some(Some((page, index, addr))) = path.get(depth).copied() {
                if index == ENTRIES {
                    if depth == 0 {
                        break;
                    }
                    depth = depth.wrapping_sub(1);
                    continue;
                }
                let level = page.level();
                let next = Gfn(addr).add(level.pages()).0;
                if let Some(place) = path.get_mut(depth) {
                    *place = Some((page, index.wrapping_add(1), next));
                }
                let entry = Entry::new(page, index);
                let spte = entry.spte();
                if spte.is_leaf(level) {
                    if !f(Gfn(addr), entry.gfn(), level, spte) {
                        return;
                    }
                } else if let (Some(child), Some(place)) =
                    (op.child_of(entry), path.get_mut(depth.wrapping_add(1)))
                {
                    *place = Some((child, 0, addr));
                    depth = depth.wrapping_add(1);
                }
            }
        }
    }
}

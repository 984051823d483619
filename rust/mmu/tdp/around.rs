// SPDX-License-Identifier: GPL-2.0

//! Fault-around: the neighbours of a page that faulted are mapped with it, if the
//! host has them mapped already.
//!
//! A neighbour is nobody's access. Its entry is neither accessed nor dirty, so that
//! aging sees an idle page as idle, and hardware sets the bits when the guest comes.
//! It carries a mark, by which aging and zapping tell later whether it was of use;
//! the first to look takes the mark away and counts.
//!
//! Only entries that hold nothing at all are filled. What is there, be it a page, a
//! table, MMIO or a frozen entry, is somebody's answer already. All neighbours are in
//! the table of the page that faulted, hence in its walk.

use super::{
    fault::Fault,
    walk::{lowest_table, Entry},
    Tdp,
};
use crate::mmu::{
    host::Host,
    role::Role,
    spte::{LeafArgs, Spte},
    table::{Entries, TablePtr},
    types::{Gfn, GfnRange, Level, Pfn},
};

/// A neighbour, as the host has it mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// The host's frame.
    pub pfn: Pfn,
    /// The guest may write to it.
    pub writable: bool,
}

/// What is around a page that faulted.
pub trait Around {
    /// The frames to map, the one that faulted among them. All are in the slot of
    /// that one, and none is being invalidated.
    fn range(&self) -> GfnRange;

    /// What the host has at a frame.
    fn page(&self, gfn: Gfn) -> Option<Neighbour>;

    /// So many pages were mapped.
    fn mapped(&mut self, pages: u64);
}

/// No fault-around.
pub(super) struct Nothing;

impl Around for Nothing {
    #[inline]
    fn range(&self) -> GfnRange {
        GfnRange::new(Gfn(0), Gfn(0))
    }

    #[inline]
    fn page(&self, _gfn: Gfn) -> Option<Neighbour> {
        None
    }

    #[inline]
    fn mapped(&mut self, _pages: u64) {}
}

impl Tdp {
    /// Maps what is around the frame of a fault that was just served at an entry of
    /// `table`, a table of the last level.
    #[inline]
    pub(super) fn fill_around<H: Host, A: Around>(
        &self,
        host: &H,
        table: &Entries,
        role: &Role,
        fault: &Fault<'_, H::Slot>,
        around: &mut A,
    ) {
        let range = around.range();
        // Ahead means: seen to be used by the accessed bit. Without one, each page
        // would cost the fault that it is to save. Where huge pages are not allowed,
        // or dirty pages are logged, one page is what was asked for.
        if range.is_empty()
            || !host.format().ad_enabled
            || fault.dirty_track
            || fault.req_level > Level::L4K
        {
            return;
        }
        self.fill(host, table, role, fault, around, range);
    }

    #[inline(never)]
    fn fill<H: Host, A: Around>(
        &self,
        host: &H,
        table: &Entries,
        role: &Role,
        fault: &Fault<'_, H::Slot>,
        around: &mut A,
        range: GfnRange,
    ) {
        let format = host.format();
        let range = range.intersect(GfnRange::of(fault.gfn, Level::L2M));
        let mut args = LeafArgs {
            gfn: fault.gfn,
            pfn: fault.pfn,
            level: Level::L4K,
            access: role.access,
            host_writable: false,
            prefetch: true,
            write_protect: false,
            nx_huge_page: false,
            memtype: fault.memtype,
            is_host_mmio: false,
            ad: role.ad_mode(host),
        };
        let mut count = 0i64;
        let mut gfn = range.start;
        while gfn < range.end {
            let entry = Entry::at(table, gfn, Level::L4K);
            if entry.spte == Spte::NONPRESENT {
                let Some(page) = around.page(gfn) else {
                    break;
                };
                args.gfn = gfn;
                args.pfn = page.pfn;
                args.host_writable = page.writable;
                let Ok(leaf) = Spte::leaf(format, &args) else {
                    host.bug("rmmu: an entry would have reserved bits set");
                    break;
                };
                let leaf = leaf.mapped_ahead(format);
                if self.install_ahead(host, &entry, leaf) {
                    count = count.wrapping_add(1);
                }
            }
            gfn = gfn.add(1);
        }
        if count != 0 {
            host.account_leaf(Level::L4K, count);
        }
        around.mapped(count as u64);
    }

    /// How many pages of the range were used, and how many are still as they were
    /// mapped ahead. The range lies in one table of the last level; what is not mapped
    /// any more counts as neither. The caller holds a reference to `root`.
    pub fn ahead_in_use<H: Host>(&self, host: &H, root: TablePtr, range: GfnRange) -> (u64, u64) {
        // SAFETY: The caller's reference keeps the root alive.
        let root = unsafe { root.as_ref() };
        let format = host.format();
        let rcu = host.rcu_read();
        let (mut used, mut unused) = (0u64, 0u64);
        let range = range.intersect(GfnRange::of(range.start, Level::L2M));
        let Some(table) = lowest_table(host, root, range.start, &rcu) else {
            return (0, 0);
        };
        let mut gfn = range.start;
        while gfn < range.end {
            let spte = Entry::at(table, gfn, Level::L4K).spte;
            if spte.is_present() {
                let counter = if spte.is_ahead() && !spte.is_accessed(format) {
                    &mut unused
                } else {
                    &mut used
                };
                *counter = counter.wrapping_add(1);
            }
            gfn = gfn.add(1);
        }
        (used, unused)
    }
}

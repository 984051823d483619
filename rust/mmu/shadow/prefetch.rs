// SPDX-License-Identifier: GPL-2.0

//! Installing leaves in advance: those of the aligned group of eight around one
//! that a fault installed.
//!
//! A guest that touched one page is likely to touch the next. An entry in advance
//! must not change what anybody sees: it is not accessed, neither for the host nor,
//! since an entry of the guest that was not accessed is left alone, for the guest.
//! Without accessed bits in hardware nobody could tell, so nothing is done. Nor is
//! it if the slot logs dirty pages: they would all be in the log.
//!
//! It is for free or not at all: the first frame that can not be mapped ends it.

use super::{
    fault::Group,
    guest::{GuestTables, GROUP},
    host::{Counter, ShadowHost, ShadowVcpu},
    leaf::Leaf,
    page::Entry,
    Op,
};
use crate::mmu::{
    spte::Spte,
    tdp::Outcome,
    types::{Gfn, Level, Pfn},
};

impl<'l, H: ShadowHost> Op<'l, H> {
    /// Maps neighbours of `entry`, which is in a direct page.
    pub(super) fn prefetch_direct<V: ShadowVcpu<H>>(&self, vcpu: &mut V, entry: Entry<'l>) {
        if !self.may_prefetch(vcpu, entry) {
            return;
        }
        let page = entry.page;
        let access = page.role().access();
        let group = group_of(entry.index);
        let mut absent = (0..GROUP).fold(0u32, |absent, i| {
            let neighbour = Entry::new(page, group.wrapping_add(i));
            absent | u32::from(!neighbour.spte().is_present()) << i
        });
        absent &= !(1 << entry.index.wrapping_sub(group));
        // Runs of entries that are not present, each looked up at once.
        while absent != 0 {
            let start = absent.trailing_zeros();
            let run = (absent >> start).trailing_ones();
            let first = Entry::new(page, group.wrapping_add(start as usize));
            if !self.prefetch(vcpu, first, first.gfn(), run as usize, access) {
                return;
            }
            absent &= u32::MAX << start.wrapping_add(run);
        }
    }

    /// Maps neighbours of `entry`, which shadows an entry of the guest's `group`.
    pub(super) fn prefetch_guest<V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        vcpu: &mut V,
        guest: &G,
        entry: Entry<'l>,
        group: &Group,
    ) {
        if !self.may_prefetch(vcpu, entry) {
            return;
        }
        let page = entry.page;
        let first = group_of(entry.index);
        for (i, &raw) in group.iter().enumerate() {
            let neighbour = Entry::new(page, first.wrapping_add(i));
            if neighbour.index == entry.index || neighbour.spte().is_present() {
                continue;
            }
            let Some(leaf) = guest.leaf_4k(raw) else {
                return;
            };
            let access = page.role().access() & leaf.access;
            if !self.prefetch(vcpu, neighbour, leaf.gfn, 1, access) {
                return;
            }
        }
    }

    fn may_prefetch<V: ShadowVcpu<H>>(&self, vcpu: &mut V, entry: Entry<'l>) -> bool {
        entry.level() == Level::L4K && !entry.page.role().is_ad_disabled() && vcpu.may_prefetch()
    }

    /// Maps `count` frames from `gfn` on, at entries from `first` on, that are not
    /// present. True if all of them could be mapped.
    fn prefetch<V: ShadowVcpu<H>>(
        &self,
        vcpu: &mut V,
        first: Entry<'l>,
        gfn: Gfn,
        count: usize,
        access: u8,
    ) -> bool {
        // An entry with no right at all would be no entry.
        if access == 0 && self.format().present == Spte::NONPRESENT.raw() {
            return false;
        }
        let Some(slot) = vcpu.slot(self.host, gfn) else {
            return false;
        };
        if self.host.dirty_logged(slot) {
            return false;
        }
        let mut pfns = [Pfn(0); GROUP];
        let Some(wanted) = pfns.get_mut(..count) else {
            return false;
        };
        let got = vcpu.prefetch_pages(self.host, self.lock, slot, gfn, wanted);
        if got == 0 {
            return false;
        }
        let mut mapped: usize = 0;
        for (i, &pfn) in pfns.iter().take(got.min(count)).enumerate() {
            let gfn = gfn.add(i as u64);
            let leaf = Leaf {
                gfn,
                pfn,
                access,
                write_fault: false,
                host_writable: true,
                prefetch: true,
                memtype: vcpu.memtype(gfn, false),
                is_host_mmio: false,
            };
            let entry = Entry::new(first.page, first.index.wrapping_add(i));
            if self.set_leaf(vcpu, slot, entry, &leaf) != Outcome::Fixed {
                break;
            }
            mapped = mapped.wrapping_add(1);
        }
        vcpu.release_prefetched();
        self.host.count(Counter::Prefetched, mapped as i64);
        mapped == count
    }
}

#[inline]
fn group_of(index: usize) -> usize {
    index & !(GROUP - 1)
}

// SPDX-License-Identifier: GPL-2.0

//! Writes to the guest's tables.

use super::{
    host::{Counter, ShadowHost},
    page::{Entry, Page},
    roots::Root,
    Op, Shadow,
};
use crate::mmu::{
    sync::MmuWrite,
    table::ENTRIES,
    types::{Gfn, Level, PAGE_SHIFT},
};

/// So many writes to a table that no walk used between them: it is a table no more,
/// or being rewritten as a whole.
const FLOOD: u8 = 3;

const PAGE_MASK: u64 = (1 << PAGE_SHIFT) - 1;

impl Shadow {
    /// The guest's memory at `gpa` was written to by emulation. `nonzero` says
    /// whether the entry of the guest that was written is not zero.
    ///
    /// What was written counts from now on: entries made from it are removed.
    pub fn track_write<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        gpa: u64,
        bytes: usize,
        nonzero: bool,
    ) {
        host.count(Counter::PteWrite, 1);
        self.run(host, lock, |op| {
            let gfn = Gfn(gpa >> PAGE_SHIFT);
            self.find_shadowing(gfn, op.lock, |page| {
                op.written(page, gpa, bytes, nonzero);
                false
            });
        });
    }

    /// Zaps what shadows the table at `gfn`, so that it need not be protected from
    /// writes; true if that helps against a write fault.
    pub fn unprotect_gfn<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        gfn: Gfn,
    ) -> bool {
        self.run(host, lock, |op| op.zap_shadowing(gfn))
    }

    /// A write fault on a table came through these pages, so they are in use.
    /// Without a lock.
    pub fn clear_flood<H: ShadowHost>(&self, host: &H, root: Root<'_>, addr: u64) {
        let _rcu = host.rcu_read();
        let format = host.format();
        let Some((mut hpa, mut level)) = root.start(format, addr) else {
            return;
        };
        loop {
            let page = host.page_of(hpa);
            page.clear_writes();
            let spte = super::fast::read_entry(host, hpa, level, addr, &_rcu);
            match level.child() {
                Some(child) if spte.is_nonleaf(level) => {
                    hpa = spte.hpa(format);
                    level = child;
                }
                _ => return,
            }
        }
    }
}

impl<'l, H: ShadowHost> Op<'l, H> {
    fn written(&self, page: &'l Page, gpa: u64, bytes: usize, nonzero: bool) {
        if is_misaligned(page, gpa, bytes) || is_flooded(page) {
            self.prepare_zap(page);
            self.host.count(Counter::Flooded, 1);
            return;
        }
        let Some((first, count)) = written_entries(page, gpa) else {
            return;
        };
        for index in first..first.saturating_add(count) {
            let entry = Entry::new(page, index);
            let was_present = entry.spte().is_present();
            self.zap_entry(entry, true);
            if nonzero && page.level() != Level::L4K {
                self.host.count(Counter::PdeZapped, 1);
            }
            self.owe_flush(was_present);
        }
    }
}

/// Tables of the last level become unsync instead.
fn is_flooded(page: &Page) -> bool {
    page.level() != Level::L4K && page.count_write() >= FLOOD
}

/// A write that is not of one entry: too much trouble, and a sign that the page is
/// no table.
fn is_misaligned(page: &Page, gpa: u64, bytes: usize) -> bool {
    let size: u64 = if page.role().has_small_entries() {
        4
    } else {
        8
    };
    let offset = gpa & PAGE_MASK;
    // A system may write just the byte with the status bits.
    if offset & (size - 1) == 0 && bytes == 1 {
        return false;
    }
    let last = offset.wrapping_add(bytes as u64).wrapping_sub(1);
    (offset ^ last) & !(size - 1) != 0 || bytes < 4
}

/// Which entries of `page` shadow the guest's entry at `gpa`: the first, and how
/// many. None if another page of the same table does.
fn written_entries(page: &Page, gpa: u64) -> Option<(usize, usize)> {
    let offset = (gpa & PAGE_MASK) as usize;
    let role = page.role();
    if !role.has_small_entries() {
        return Some((offset / 8, 1));
    }
    let index = offset / 4;
    // A four-byte entry of the directory covers 4 MiB, which takes two entries.
    let per_entry = if role.level() == Level::L4K { 1 } else { 2 };
    let index = index.wrapping_mul(per_entry);
    (index / ENTRIES == usize::from(role.quadrant())).then_some((index % ENTRIES, per_entry))
}

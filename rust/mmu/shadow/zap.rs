// SPDX-License-Identifier: GPL-2.0

//! Zapping pages.

use super::{
    host::{Counter, PageEvent, ShadowHost},
    page::{Entry, Page},
    unsync::is_untouched,
    Op, Owed, Shadow,
};
use crate::mmu::{
    sync::{atomic::Ordering, Flush, MmuLocked, MmuWrite},
    table::ENTRIES,
    types::Gfn,
};

/// Pages that are zapped between looks at whether to yield.
const ZAP_BATCH: u64 = 10;

/// What a zap came to.
#[derive(Clone, Copy)]
pub(super) struct Zapped {
    /// Pages that are gone.
    pub(super) pages: u64,
    /// Others than the page itself are among them, so that neighbours in lists may
    /// be gone, too.
    pub(super) others: bool,
}

impl<'l, H: ShadowHost> Op<'l, H> {
    /// Takes a page, and unsync pages below it, out of use. What vCPUs do not use
    /// as a root is freed at the end of the operation.
    pub(super) fn prepare_zap(&self, page: &'l Page) -> Zapped {
        self.host.trace_page(PageEvent::Zapped(page));
        self.host.count(Counter::ShadowZapped, 1);
        let mut pages = self.zap_unsync_below(page);
        for index in 0..ENTRIES {
            let entry = Entry::new(page, index);
            if !is_untouched(entry.spte()) {
                pages = pages.wrapping_add(self.zap_entry(entry, true));
            }
        }
        self.unlink_parents(page);
        let others = pages > 0;

        let role = page.role();
        if !role.is_invalid() {
            if role.has_guest_entries() {
                self.unprotect_table(page);
            }
            // A zapped page is in no list but that of what is to be freed.
            self.shadow.active.remove(page, self.lock);
        }
        if page.is_unsync() {
            self.mark_synced(page);
        }
        self.forget_nx_candidate(page);
        let was_obsolete = self.shadow.is_obsolete_page(page);
        page.invalidate();
        if page.roots.get() == 0 {
            pages = pages.wrapping_add(1);
            self.shadow.pages.fetch_sub(1, Ordering::Relaxed);
            self.host.account_page(page.as_ptr(), -1);
            self.discard(page);
        } else {
            // CPUs may still have what was below.
            self.owe_flush(true);
            // vCPUs with an obsolete root were told already.
            if !was_obsolete {
                self.host.root_zapped();
            }
        }
        Zapped { pages, others }
    }

    /// Zaps the unsync pages below: when nothing leads to them any more, they would
    /// not be found by those who protect their tables again.
    ///
    /// The page may be a root that vCPUs use until the end of the operation, and they
    /// ask for its marks without the lock. So a mark goes when there is nothing stale
    /// below it any more, and not before.
    fn zap_unsync_below(&self, page: &'l Page) -> u64 {
        let mut pages: u64 = 0;
        let mut next = page.next_unsync_child(0);
        while let Some(index) = next {
            if let Some(child) = self.child_of(Entry::new(page, index)) {
                let zapped = if child.is_unsync() {
                    // Of the last level, so that this goes no deeper.
                    self.prepare_zap(child).pages
                } else {
                    self.zap_unsync_below(child)
                };
                pages = pages.wrapping_add(zapped);
            }
            page.clear_unsync_child(index);
            next = page.next_unsync_child(index.wrapping_add(1));
        }
        pages
    }

    /// Zaps all pages that shadow the table at `gfn`. True if there were any, and
    /// none is a root in use, which a vCPU would make again at once.
    pub(super) fn zap_shadowing(&self, gfn: Gfn) -> bool {
        let mut any = false;
        let mut roots = false;
        self.shadow.find_shadowing(gfn, self.lock, |page| {
            any = true;
            roots |= page.roots.get() != 0;
            self.prepare_zap(page);
            false
        });
        any && !roots
    }
}

impl Shadow {
    /// Makes all pages obsolete. The caller makes vCPUs look for new roots under
    /// the same hold of the lock, and then calls
    /// [`zap_obsolete`](Shadow::zap_obsolete). It serialises this against itself.
    pub fn invalidate_all(&self, _lock: &MmuWrite<'_>) {
        self.generation.fetch_xor(1, Ordering::Relaxed);
    }

    /// Zaps all obsolete pages, and yields on the way.
    pub fn zap_obsolete<H: ShadowHost>(&self, host: &H, lock: &mut MmuWrite<'_>) {
        // No vCPU uses these pages any more, so the flush can wait until the end.
        let mut owed = Owed::nothing();
        loop {
            let op = self.op(host, lock, owed);
            let more = op.zap_some_obsolete();
            owed = op.into_owed();
            if !more {
                break;
            }
            lock.relax(host);
        }
        owed.settle(self, host, lock);
    }

    /// Zaps all pages, and yields on the way.
    pub fn zap_all<H: ShadowHost>(&self, host: &H, lock: &mut MmuWrite<'_>) {
        loop {
            let more = self.run(host, lock, |op| {
                let mut batch: u64 = 0;
                while let Some(page) = self.active.first(op.lock) {
                    batch = batch.wrapping_add(op.prepare_zap(page).pages);
                    if batch >= ZAP_BATCH && host.need_break() {
                        return true;
                    }
                }
                false
            });
            if !more {
                return;
            }
            lock.relax(host);
        }
    }

    /// Zaps all that is left when the VM ends. Roots are gone by then.
    pub fn uninit<H: ShadowHost>(&self, host: &H, lock: &mut MmuWrite<'_>) {
        self.zap_all(host, lock);
        if !self.is_empty(lock) {
            host.bug("rmmu: a root outlives its VM");
        }
    }

    /// Zaps pages of tables in the slot, which is on its way out, and does the
    /// flush that is owed already.
    pub fn zap_slot_pages<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        slot: &H::Slot,
        flush: Flush,
    ) {
        let range = host.slot_range(slot);
        let mut gfn = range.start;
        let mut owed = Owed::nothing();
        owed.flush = flush;
        while gfn < range.end && self.indirect.load(Ordering::Relaxed) != 0 {
            let op = self.op(host, lock, owed);
            while gfn < range.end {
                op.zap_shadowing(gfn);
                gfn = gfn.add(1);
                if gfn.0 % 512 == 0 && host.need_break() {
                    break;
                }
            }
            op.into_owed().settle(self, host, lock);
            owed = Owed::nothing();
            if gfn < range.end && host.need_break() {
                lock.relax(host);
            }
        }
        owed.settle(self, host, lock);
    }
}

impl<H: ShadowHost> Op<'_, H> {
    /// True if it stopped to let others have the lock.
    fn zap_some_obsolete(&self) -> bool {
        let active = &self.shadow.active;
        let mut batch: u64 = 0;
        // Obsolete pages are at the end, since new pages go to the front.
        while let Some(page) = active.last(self.lock) {
            if !self.shadow.is_obsolete_page(page) {
                return false;
            }
            if batch >= ZAP_BATCH && self.host.need_break() {
                return true;
            }
            batch = batch.wrapping_add(self.prepare_zap(page).pages);
        }
        false
    }
}

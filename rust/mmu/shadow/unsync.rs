// SPDX-License-Identifier: GPL-2.0

//! Unsync pages: becoming one, and finding them.
//!
//! A page of the last level may be unsync: the guest can write to its table, and
//! what it writes counts when it flushes. Each page above has a bit for each entry
//! below which there may be an unsync page. A bit too many costs a look; one too
//! few would be a flush that does nothing.
//!
//! The walk for a sync takes a page's mark away as it hands the page out. So it never
//! comes across the same one twice, and when it comes to its end nothing is left to
//! walk for. Whoever asked must bring all it got up to date or zap it, whatever
//! happens. A page for which there was no room keeps its mark. A page that is
//! unsync is of the last level and has nothing below.
//!
//! # Asking without the lock
//!
//! A vCPU whose guest flushes asks for the marks of its root without the lock
//! ([`Shadow::is_unsync`]), and goes on if there are none. Then all that its hardware
//! can reach from the root must be as new as what the guest had written before it
//! flushed. These orders see to that:
//!
//! 1. *A page becomes unsync*: the marks, then the page's own flag, then the writable
//!    entry, with a release between. What the guest writes comes through that entry, so
//!    whoever flushes after the write sees the marks, or what took them away. Several
//!    may mark at a time, under the lock for read; the unsync lock is between them. Who
//!    finds that the page is unsync already relies on the marks of the other.
//! 2. *A sync* takes the marks away first, and says that it is under way before that
//!    (`syncing`) and that it is done after its last page. The one who asks looks at
//!    the marks first: if it sees that one is gone, it sees that a sync is under way,
//!    or all that the sync did. Otherwise it takes the lock, and so waits for it.
//!    Syncs do not nest, and each has the lock for write from the first mark to the
//!    last page, so that a flag is enough. Where it yields, the flag is down, and what
//!    is left to be done still has its marks, up to the root.
//! 3. *A zap* takes a mark away when the pages below are unlinked, with a release:
//!    who sees that it is gone finds no way to them. No flag is needed, so that a zap
//!    may come about in the course of anything else.
//! 4. *A link* to a page that is unsync and stays so: the marks, a full barrier, then
//!    the page is brought up to date, then the link. The guest may write to the table
//!    all the while, and flush: its write, a full barrier, the question. Either the
//!    marks are seen, or the write is read. Pages above the last level are linked with
//!    nothing unsync below: that was protected and brought up to date under the same
//!    hold of the lock.
//! 5. *A link that goes* leaves the marks behind, for the next sync to clear.

use super::{
    host::{Counter, PageEvent, ShadowHost},
    page::{Entry, Page},
    Op, Shadow,
};
use crate::mmu::{
    spte::Spte,
    sync::{
        atomic::{smp_wmb, AtomicU64, Ordering},
        MmuLocked,
    },
    types::{Gfn, Level},
};

/// How many pages a walk hands out at a time.
pub(super) const BATCH: usize = 16;

/// A frame must not be writable for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteProtect;

/// Why a frame would be made writable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// The guest accessed it.
    Fault,
    /// Nobody did: no reason to give up the protection of a table.
    Prefetch,
    /// A page is being brought up to date. The guest's flush is not complete, so
    /// that no page may become unsync in its course.
    Sync,
}

/// Pages to be brought up to date.
pub(super) struct Unsynced<'l> {
    pages: [Option<&'l Page>; BATCH],
    count: usize,
}

/// There was no room for a page: walk again when these are done.
pub(super) struct Full;

impl<'l> Unsynced<'l> {
    pub(super) const fn new() -> Unsynced<'l> {
        Unsynced {
            pages: [None; BATCH],
            count: 0,
        }
    }

    /// Adds a page that is not there yet.
    fn add(&mut self, page: &'l Page) -> Result<(), Full> {
        if self.iter().any(|other| core::ptr::eq(other, page)) {
            return Ok(());
        }
        *self.pages.get_mut(self.count).ok_or(Full)? = Some(page);
        self.count = self.count.wrapping_add(1);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &'l Page> + '_ {
        self.pages.iter().copied().flatten()
    }
}

impl Shadow {
    /// Lets the guest write to `gfn`: pages that shadow it become unsync. Fails if
    /// writes must be seen.
    ///
    /// The TDP MMU calls it under the lock for read, and installs the writable
    /// entry under the same hold of the lock.
    pub fn try_unsync<H: ShadowHost, L: MmuLocked>(
        &self,
        host: &H,
        lock: &L,
        slot: &H::Slot,
        gfn: Gfn,
        prefetch: bool,
    ) -> Result<(), WriteProtect> {
        let purpose = if prefetch {
            Purpose::Prefetch
        } else {
            Purpose::Fault
        };
        self.try_unsync_for(host, lock, slot, gfn, purpose)
    }

    #[inline]
    pub(super) fn try_unsync_for<H: ShadowHost, L: MmuLocked>(
        &self,
        host: &H,
        lock: &L,
        slot: &H::Slot,
        gfn: Gfn,
        purpose: Purpose,
    ) -> Result<(), WriteProtect> {
        // All tables above the last level are tracked, so what is found below is of
        // the last level.
        if host.write_tracked(slot, gfn) {
            return Err(WriteProtect);
        }
        // A frame that is shadowed must not be mapped huge.
        if self.indirect.load(Ordering::Relaxed) == 0 || host.lpage_allowed(slot, gfn) {
            return Ok(());
        }
        self.unsync_all(host, lock, gfn, purpose)
    }

    #[inline(never)]
    fn unsync_all<H: ShadowHost, L: MmuLocked>(
        &self,
        host: &H,
        lock: &L,
        gfn: Gfn,
        purpose: Purpose,
    ) -> Result<(), WriteProtect> {
        let refuses = |page: &Page| purpose == Purpose::Sync || !page.is_unsync();
        if self.find_shadowing(gfn, lock, refuses).is_some() {
            if purpose != Purpose::Fault {
                return Err(WriteProtect);
            }
            // Somebody else may make the same pages unsync at the same time.
            host.with_unsync_lock(|| {
                self.find_shadowing(gfn, lock, |page| {
                    if !page.is_unsync() {
                        self.unsync(host, lock, page);
                    }
                    false
                });
            });
        }
        // The marks before the writable entry: a vCPU whose guest has written
        // through the entry, and flushes, must see them, whatever the entry is
        // installed with.
        smp_wmb();
        Ok(())
    }

    fn unsync<H: ShadowHost, L: MmuLocked>(&self, host: &H, lock: &L, page: &Page) {
        if page.level() != Level::L4K {
            host.bug("rmmu: a page above the last level would become unsync");
            return;
        }
        host.trace_page(PageEvent::Unsynced(page));
        host.count(Counter::Unsync, 1);
        // The marks first: whoever sees that the page is unsync already makes its
        // table writable without a look at the marks.
        self.mark_parents_unsync(host, lock, page);
        page.set_unsync(true);
    }

    fn mark_parents_unsync<H: ShadowHost, L: MmuLocked>(&self, host: &H, lock: &L, page: &Page) {
        page.parents().for_each(host, lock, |entry| {
            self.mark_unsync(host, lock, entry);
        });
    }

    /// Notes that there is an unsync page below `entry`, there and further up.
    fn mark_unsync<H: ShadowHost, L: MmuLocked>(&self, host: &H, lock: &L, entry: Entry<'_>) {
        // If it is not the first, those above know.
        if entry.page.mark_unsync_child(entry.index) {
            self.mark_parents_unsync(host, lock, entry.page);
        }
    }
}

impl<'l, H: ShadowHost> Op<'l, H> {
    pub(super) fn mark_unsync(&self, entry: Entry<'l>) {
        self.shadow.mark_unsync(self.host, self.lock, entry);
    }

    /// The page is not unsync any more.
    pub(super) fn mark_synced(&self, page: &Page) {
        self.host.trace_page(PageEvent::Synced(page));
        page.set_unsync(false);
        self.host.count(Counter::Unsync, -1);
    }

    /// Collects unsync pages below `page` and takes their marks away; see the
    /// module's text.
    pub(super) fn collect_unsync(
        &self,
        page: &'l Page,
        found: &mut Unsynced<'l>,
    ) -> Result<(), Full> {
        let mut next = page.next_unsync_child(0);
        while let Some(index) = next {
            let entry = Entry::new(page, index);
            if let Some(child) = self.child_of(entry) {
                if child.is_unsync() {
                    found.add(child)?;
                } else if child.has_unsync_children() {
                    self.collect_unsync(child, found)?;
                }
            }
            page.clear_unsync_child(index);
            next = page.next_unsync_child(index.wrapping_add(1));
        }
        Ok(())
    }
}

/// No entry of a group is present, nor says anything else.
#[inline]
pub(super) fn are_untouched(group: &[AtomicU64]) -> bool {
    let all = group
        .iter()
        .fold(0, |all, cell| all | cell.load(Ordering::Relaxed));
    all == Spte::NONPRESENT.raw()
}

/// An entry no one has written to since the page was made.
#[inline]
pub(super) fn is_untouched(spte: Spte) -> bool {
    spte == Spte::NONPRESENT
}

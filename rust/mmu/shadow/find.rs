// SPDX-License-Identifier: GPL-2.0

//! Looking up pages, and making those that are not there.

use super::{
    guest::GuestTables,
    host::{Counter, Maximum, PageEvent, PageSource, ShadowHost, ShadowVcpu},
    page::{Entry, Page, PagePtr},
    rmap::DescPtr,
    role::PageRole,
    sync::OutOfSync,
    Op, Shadow,
};
use crate::mmu::{
    sync::{
        atomic::{smp_mb, Ordering},
        MmuLocked,
    },
    types::{Gfn, Level},
};

/// On whose behalf pages are looked up.
pub(super) trait Context<H: ShadowHost>: PageSource {
    /// Brings a page that is unsync up to date; true if a flush is owed.
    fn sync(&mut self, op: &Op<'_, H>, page: &Page) -> Result<bool, OutOfSync>;
}

/// Direct pages and roots only, which are never unsync.
pub(super) struct NeverUnsync<'a, S>(pub(super) &'a mut S);

/// Pages that shadow tables of a guest.
pub(super) struct Indirect<'a, V, G> {
    vcpu: &'a mut V,
    guest: &'a G,
}

impl<'a, V, G> Indirect<'a, V, G> {
    pub(super) fn new(vcpu: &'a mut V, guest: &'a G) -> Self {
        Indirect { vcpu, guest }
    }
}

// SAFETY: It gives what the source it stands for gives.
unsafe impl<S: PageSource> PageSource for NeverUnsync<'_, S> {
    #[inline]
    fn take_page(&mut self, translations: bool) -> Option<PagePtr> {
        self.0.take_page(translations)
    }

    #[inline]
    fn take_desc(&mut self) -> Option<DescPtr> {
        self.0.take_desc()
    }
}

impl<H: ShadowHost, S: PageSource> Context<H> for NeverUnsync<'_, S> {
    fn sync(&mut self, op: &Op<'_, H>, _page: &Page) -> Result<bool, OutOfSync> {
        op.host
            .bug("rmmu: a direct page, or one above the last level, is unsync");
        Err(OutOfSync)
    }
}

// SAFETY: As above.
unsafe impl<V: PageSource, G> PageSource for Indirect<'_, V, G> {
    #[inline]
    fn take_page(&mut self, translations: bool) -> Option<PagePtr> {
        self.vcpu.take_page(translations)
    }

    #[inline]
    fn take_desc(&mut self) -> Option<DescPtr> {
        self.vcpu.take_desc()
    }
}

impl<H: ShadowHost, V: ShadowVcpu<H>, G: GuestTables> Context<H> for Indirect<'_, V, G> {
    fn sync(&mut self, op: &Op<'_, H>, page: &Page) -> Result<bool, OutOfSync> {
        op.sync_page(self.vcpu, self.guest, page)
    }
}

/// The page that belongs below an entry.
pub(super) enum Child<'l> {
    /// It is linked there.
    Linked(&'l Page),
    /// It must be linked.
    Found(&'l Page),
}

impl Shadow {
    /// The page can not be used any more, because it was zapped or is about to be.
    #[inline]
    pub(super) fn is_obsolete_page(&self, page: &Page) -> bool {
        page.role().is_invalid() || page.generation() != self.generation.load(Ordering::Relaxed)
    }

    /// The first page for which `f` returns true, of those that shadow the guest's
    /// table at `gfn`.
    pub(super) fn find_shadowing<'l, L: MmuLocked>(
        &self,
        gfn: Gfn,
        lock: &'l L,
        mut f: impl FnMut(&'l Page) -> bool,
    ) -> Option<&'l Page> {
        let bucket = self.bucket(gfn.0, lock)?;
        let mut at = bucket.first(lock);
        while let Some(page) = at {
            at = bucket.after(page, lock);
            if page.gfn() == gfn
                && page.role().has_guest_entries()
                && !self.is_obsolete_page(page)
                && f(page)
            {
                return Some(page);
            }
        }
        None
    }

    /// Calls `f` with every page that shadows the guest's table at `gfn` and was not
    /// zapped, obsolete or not.
    pub(super) fn for_each_shadowing<'l, L: MmuLocked>(
        &self,
        gfn: Gfn,
        lock: &'l L,
        mut f: impl FnMut(&'l Page),
    ) {
        let Some(bucket) = self.bucket(gfn.0, lock) else {
            return;
        };
        let mut at = bucket.first(lock);
        while let Some(page) = at {
            at = bucket.after(page, lock);
            let role = page.role();
            if page.gfn() == gfn && role.has_guest_entries() && !role.is_invalid() {
                f(page);
            }
        }
    }
}

impl<'l, H: ShadowHost> Op<'l, H> {
    /// The page for `gfn` and `role`, to be linked at `above` if it is no root; made if
    /// it is not there. None if the caches are empty, or the frame is in no slot.
    pub(super) fn get_page<C: Context<H>>(
        &self,
        cx: &mut C,
        gfn: Gfn,
        role: PageRole,
        above: Option<Entry<'l>>,
    ) -> Option<&'l Page> {
        if let Some(page) = self.find_page(cx, gfn, role, above) {
            self.host.trace_page(PageEvent::Found(page));
            return Some(page);
        }
        self.host.count(Counter::CacheMiss, 1);
        let page = self.make_page(cx, gfn, role)?;
        self.host.trace_page(PageEvent::Made(page));
        Some(page)
    }

    fn find_page<C: Context<H>>(
        &self,
        cx: &mut C,
        gfn: Gfn,
        role: PageRole,
        above: Option<Entry<'l>>,
    ) -> Option<&'l Page> {
        let bucket = self.shadow.bucket(gfn.0, self.lock)?;
        let mut collisions: u64 = 0;
        let mut found = None;
        // What is zapped on the way stays in the bucket until it is freed.
        let mut at = bucket.first(self.lock);
        while let Some(page) = at {
            at = bucket.after(page, self.lock);
            if self.shadow.is_obsolete_page(page) {
                continue;
            }
            if page.gfn() != gfn {
                collisions = collisions.wrapping_add(1);
                continue;
            }
            if page.role() != role {
                // The table becomes one of a higher level, and is going to be
                // protected from writes, which an unsync page must not be.
                if role.level() > Level::L4K && page.is_unsync() {
                    self.prepare_zap(page);
                }
                continue;
            }
            if role.is_direct() {
                found = Some(page);
                break;
            }
            if page.is_unsync() {
                // Brought up to date but left unsync: the guest need not fault
                // again for every page that shadows this table. It goes on writing
                // meanwhile, and flushes by asking for the marks above: what it wrote
                // is read here, or the marks are seen there.
                if let Some(above) = above {
                    self.mark_unsync(above);
                    smp_mb();
                }
                match cx.sync(self, page) {
                    Ok(flush) => self.owe_flush(flush),
                    Err(OutOfSync) => {
                        self.prepare_zap(page);
                        break;
                    }
                }
            }
            page.clear_writes();
            found = Some(page);
            break;
        }
        if collisions != 0 {
            self.host.maximum(Maximum::HashCollisions, collisions);
        }
        found
    }

    fn make_page<C: Context<H>>(&self, cx: &mut C, gfn: Gfn, role: PageRole) -> Option<&'l Page> {
        let bucket = self.shadow.bucket(gfn.0, self.lock)?;
        let slot = if role.has_guest_entries() {
            Some(self.host.slot(role.is_smm(), gfn)?)
        } else {
            None
        };
        let translations = !role.is_direct() && role.level() <= Level::MAX_HUGE;
        let pointer = cx.take_page(translations)?;
        let page = pointer.page(self.lock);
        let generation = self.shadow.generation.load(Ordering::Relaxed);
        page.prepare(role, gfn, generation);
        // New pages go to the front: those behind the first obsolete one, seen
        // from the end, are not obsolete.
        self.shadow.active.push(page, self.lock);
        self.shadow.pages.fetch_add(1, Ordering::Relaxed);
        self.host.account_page(pointer, 1);
        bucket.push(page, self.lock);
        if let Some(slot) = slot {
            self.protect_table(slot, page);
        }
        Some(page)
    }

    /// Sees to it that no write to the table that `page` shadows goes unnoticed.
    fn protect_table(&self, slot: &H::Slot, page: &Page) {
        self.shadow.indirect.fetch_add(1, Ordering::Relaxed);
        self.host.account_indirect(1);
        // Either whoever emulates a write to the table sees the count, or we see
        // what was written when the entry is read again.
        smp_mb();
        self.host.disallow_lpage(slot, page.gfn(), 1);
        if page.level() > Level::L4K {
            self.host.track_writes(slot, page.gfn(), 1);
        }
        let flush = self.protect_gfn(slot, page.gfn(), Level::L4K);
        self.owe_flush(flush.needed());
        // Also what was unmapped earlier in this operation may be in some TLB and
        // writable, and the entries are read soon.
        self.flush_now();
    }

    /// Takes back what [`protect_table`](Op::protect_table) did for a page.
    pub(super) fn unprotect_table(&self, page: &Page) {
        self.shadow.indirect.fetch_sub(1, Ordering::Relaxed);
        self.host.account_indirect(-1);
        let Some(slot) = self.host.slot(page.role().is_smm(), page.gfn()) else {
            self.host
                .bug("rmmu: a slot went before the pages of its tables");
            return;
        };
        self.host.disallow_lpage(slot, page.gfn(), -1);
        if page.level() > Level::L4K {
            self.host.track_writes(slot, page.gfn(), -1);
        }
    }

    /// The page that belongs below `entry`.
    pub(super) fn get_child<C: Context<H>>(
        &self,
        cx: &mut C,
        entry: Entry<'l>,
        gfn: Gfn,
        direct: bool,
        access: u8,
    ) -> Option<Child<'l>> {
        let role = entry.page.role().child(entry.index, direct, access)?;
        if let Some(child) = self.child_of(entry) {
            if child.gfn() == gfn && child.role() == role {
                return Some(Child::Linked(child));
            }
        }
        self.get_page(cx, gfn, role, Some(entry)).map(Child::Found)
    }

    /// The page an entry points to.
    #[inline]
    pub(super) fn child_of(&self, entry: Entry<'l>) -> Option<&'l Page> {
        let spte = entry.spte();
        let hpa = spte.hpa(self.host.format());
        spte.is_nonleaf(entry.level())
            .then(|| self.host.page_of(hpa).page(self.lock))
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Roots, and where walks begin.

use super::{
    find::NeverUnsync,
    host::{PageSource, ShadowHost},
    page::{Entry, PagePtr},
    role::PageRole,
    Op, Shadow,
};
use crate::mmu::{
    spte::SpteFormat,
    sync::{
        atomic::{smp_mb, Ordering},
        MmuWrite,
    },
    types::{Gfn, Hpa, Level},
};

/// Where a walk begins. Whoever has one holds references to the pages.
#[derive(Clone, Copy, Debug)]
pub enum Root<'r> {
    /// A page.
    Page(PagePtr),
    /// The four entries of PAE paging, each with its page of the level of 2 MiB; 0
    /// if there is none.
    Pae(&'r [u64; 4]),
}

impl Root<'_> {
    /// The first page of a walk to `addr`, and its level.
    pub(super) fn start(self, format: &SpteFormat, addr: u64) -> Option<(Hpa, Level)> {
        match self {
            Root::Page(root) => Some((root.hpa(), root.role().level())),
            Root::Pae(entries) => {
                let entry = entries.get((addr >> 30) as usize & 3).copied()?;
                let hpa = entry & format.base_addr_mask & !format.me_mask;
                (hpa != 0).then_some((Hpa(hpa), Level::L2M))
            }
        }
    }
}

impl Shadow {
    /// A root for the guest's table at `gfn`, with a reference. The role has the
    /// root's level and quadrant. None if the caches are empty, or the frame is in
    /// no slot.
    ///
    /// The guest's tables are not looked at: roots are above the last level, so that
    /// one that is found is not unsync.
    pub fn alloc_root<H: ShadowHost, S: PageSource>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        source: &mut S,
        gfn: Gfn,
        role: PageRole,
    ) -> Option<PagePtr> {
        self.run(host, lock, |op| {
            let page = op.get_page(&mut NeverUnsync(source), gfn, role, None)?;
            page.roots.set(page.roots.get().wrapping_add(1));
            Some(page.as_ptr())
        })
    }

    /// Gives back one reference to each root. Zapped roots go with the last one.
    pub fn put_roots<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        roots: impl IntoIterator<Item = PagePtr>,
    ) {
        self.run(host, lock, |op| {
            for root in roots {
                let page = root.page(op.lock);
                let Some(left) = page.roots.get().checked_sub(1) else {
                    host.bug("rmmu: a root is put that nobody holds");
                    continue;
                };
                page.roots.set(left);
                if left == 0 && page.role().is_invalid() {
                    op.prepare_zap(page);
                }
            }
        });
    }

    /// The root was zapped, or will be. Without a lock; the caller holds a
    /// reference.
    pub fn is_obsolete(&self, root: PagePtr) -> bool {
        root.role().is_invalid() || root.generation() != self.generation.load(Ordering::Relaxed)
    }

    /// The root, or a page below, must be brought up to date before it is used
    /// after a flush of the guest. Without a lock; the caller holds a reference.
    ///
    /// Also true while another vCPU brings pages up to date, of whatever root: the
    /// marks go first. Whoever takes the lock then waits until it is done. See
    /// `unsync` for the whole of it.
    pub fn is_unsync(&self, root: PagePtr) -> bool {
        // What the guest wrote before it flushed went through a writable entry,
        // which was installed after the marks. And of a page that is being linked
        // below the root, either the marks are seen here, or what was written is there.
        smp_mb();
        root.any_unsync() || self.syncing.load(Ordering::Acquire)
    }

    /// The guest's CPU begins to use the root: its table is one still, so that the
    /// writes to it so far are no flood. Without a lock; the caller holds a
    /// reference.
    pub fn note_root_in_use(&self, root: PagePtr) {
        root.clear_writes();
    }
}

impl<'l, H: ShadowHost> Op<'l, H> {
    /// The first entry of a walk to `addr`.
    pub(super) fn first_entry(&self, root: Root<'_>, addr: u64) -> Option<Entry<'l>> {
        let page = match root {
            Root::Page(root) => root.page(self.lock),
            Root::Pae(_) => {
                let (hpa, _) = root.start(self.format(), addr)?;
                self.host.page_of(hpa).page(self.lock)
            }
        };
        Some(Entry::at(page, addr))
    }

    /// The next entry of a walk to `addr`, if there is a page below.
    pub(super) fn next_entry(&self, entry: Entry<'l>, addr: u64) -> Option<Entry<'l>> {
        self.child_of(entry).map(|child| Entry::at(child, addr))
    }
}

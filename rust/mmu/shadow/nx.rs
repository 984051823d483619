// SPDX-License-Identifier: GPL-2.0

//! NX candidates: direct pages that exist only because a huge page must not be
//! executable.

use super::{
    host::ShadowHost,
    page::{Nx, Page},
    Op, Shadow,
};
use crate::mmu::{
    sync::{atomic::Ordering, MmuLocked, MmuWrite},
    types::Gfn,
};

impl Shadow {
    /// Takes up to `budget` of the oldest candidates from the list, and zaps all of
    /// them but those for which `skip(gfn, smm)` says that their slot logs dirty
    /// pages: they would come back as they are. Returns how many it zapped.
    pub fn recover_nx<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        budget: u64,
        mut skip: impl FnMut(Gfn, bool) -> bool,
    ) -> u64 {
        let mut left = budget;
        let mut zapped: u64 = 0;
        while left > 0 {
            self.run(host, lock, |op| {
                while left > 0 {
                    let Some(page) = self.nx.last(op.lock) else {
                        left = 0;
                        return;
                    };
                    left = left.wrapping_sub(1);
                    op.forget_nx_candidate(page);
                    if !skip(page.gfn(), page.role().is_smm()) {
                        op.prepare_zap(page);
                        zapped = zapped.wrapping_add(1);
                    }
                    if host.need_break() {
                        return;
                    }
                }
            });
            if left > 0 {
                lock.relax(host);
            }
        }
        zapped
    }
}

impl<H: ShadowHost> Op<'_, H> {
    /// A page was linked because a huge page is not allowed; `possible` says that
    /// nothing else is in the way of one.
    pub(super) fn note_nx_candidate(&self, page: &Page, possible: bool) {
        if page.nx.get() == Nx::Free {
            page.nx.set(Nx::Disallowed);
        }
        // The page may be linked elsewhere, too.
        if !possible || page.nx.replace(Nx::Candidate) == Nx::Candidate {
            return;
        }
        self.shadow.nx.push(page, self.lock);
        self.shadow.nx_count.fetch_add(1, Ordering::Relaxed);
        self.host.account_nx_split(1);
    }

    pub(super) fn forget_nx_candidate(&self, page: &Page) {
        if page.nx.replace(Nx::Free) == Nx::Candidate {
            self.shadow.nx.remove(page, self.lock);
            self.shadow.nx_count.fetch_sub(1, Ordering::Relaxed);
            self.host.account_nx_split(-1);
        }
    }
}

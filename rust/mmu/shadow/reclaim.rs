// SPDX-License-Identifier: GPL-2.0

//! The quota of pages.

use super::{
    host::{Counter, ShadowHost},
    Op, Shadow,
};
use crate::mmu::sync::{atomic::Ordering, MmuWrite};

/// A fault finds so many pages free, or room is made.
pub(crate) const MIN_FREE: u64 = 5;
/// So many are free then.
pub(crate) const REFILL: u64 = 25;

/// The quota of pages is used up, and nothing could be zapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoSpace;

impl Shadow {
    /// How many pages may be made.
    pub fn available(&self) -> u64 {
        self.max_pages().saturating_sub(self.pages())
    }

    /// Makes room for the pages that serving a fault takes.
    pub fn make_available<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
    ) -> Result<(), NoSpace> {
        let available = self.available();
        if available >= MIN_FREE {
            return Ok(());
        }
        self.zap_oldest(host, lock, REFILL.wrapping_sub(available));
        // One page is enough to go on. The quota is arbitrary, and exceeding it by
        // a few pages does no harm; refusing to serve a fault ends the guest.
        if self.available() == 0 {
            return Err(NoSpace);
        }
        Ok(())
    }

    /// Sets the quota. It is what is in use at least.
    pub fn set_max_pages<H: ShadowHost>(&self, host: &H, lock: &mut MmuWrite<'_>, goal: u64) {
        let mut goal = goal;
        let pages = self.pages();
        if pages > goal {
            self.zap_oldest(host, lock, pages.wrapping_sub(goal));
            goal = goal.max(self.pages());
        }
        self.max_pages.store(goal, Ordering::Relaxed);
    }

    fn zap_oldest<H: ShadowHost>(&self, host: &H, lock: &mut MmuWrite<'_>, goal: u64) {
        let zapped = self.run(host, lock, |op| op.zap_oldest(goal));
        host.count(Counter::Recycled, zapped as i64);
    }
}

impl<H: ShadowHost> Op<'_, H> {
    /// Zaps the oldest pages until `goal` pages are gone.
    fn zap_oldest(&self, goal: u64) -> u64 {
        let active = &self.shadow.active;
        let mut gone: u64 = 0;
        let mut at = active.last(self.lock);
        while let Some(page) = at {
            at = active.before(page, self.lock);
            // Roots in use could not be freed, and vCPUs would make them again.
            if page.roots.get() != 0 {
                continue;
            }
            let zapped = self.prepare_zap(page);
            gone = gone.wrapping_add(zapped.pages);
            if gone >= goal {
                break;
            }
            if zapped.others {
                at = active.last(self.lock);
            }
        }
        gone
    }
}

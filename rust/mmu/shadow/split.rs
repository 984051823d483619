// SPDX-License-Identifier: GPL-2.0

//! Splitting huge pages of nested guests when the dirty log begins, so that vCPUs
//! need not do it one fault at a time.
//!
//! The caches are filled without the lock. A huge page of which many nested
//! addresses map the same frames needs a descriptor for each small page, in the
//! worst case; that is what the caches hold at least.

use super::{
    find::NeverUnsync,
    host::{Counter, ShadowHost, SplitCaches},
    page::Entry,
    reclaim::MIN_FREE,
    rmap::Rmap,
    Op, Shadow,
};
use crate::mmu::{
    sync::MmuWrite,
    table::ENTRIES,
    types::{Gfn, GfnRange, Level},
};

/// Why huge pages were left as they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SplitError {
    /// The quota of pages is used up.
    NoSpace,
    /// The caches could not be filled.
    NoMemory,
}

/// What became of the huge pages of a map.
enum Step {
    /// There are none any more.
    Done,
    /// The caches must be filled, or others want the lock.
    Pause,
    Failed(SplitError),
}

impl Shadow {
    /// Splits huge pages of nested guests that map frames of the range, down to
    /// `target`. Yields on the way.
    pub fn split_huge<H: ShadowHost, C: SplitCaches>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        caches: &mut C,
        slot: &H::Slot,
        range: GfnRange,
        target: Level,
    ) -> Result<(), SplitError> {
        let range = range.intersect(host.slot_range(slot));
        let mut level = Level::MAX_HUGE;
        while level > target {
            let mut gfn = range.start;
            while gfn < range.end {
                let step = self.run(host, lock, |op| {
                    op.split_maps(caches, slot, level, &mut gfn, range)
                });
                match step {
                    Step::Done => {}
                    Step::Failed(error) => return Err(error),
                    Step::Pause => {
                        if !host.unlock_relock_write(lock, || caches.top_up()) {
                            return Err(SplitError::NoMemory);
                        }
                    }
                }
            }
            level = level.child().unwrap_or(target);
        }
        Ok(())
    }
}

impl<'l, H: ShadowHost> Op<'l, H> {
    /// Splits from `gfn` on, which it moves.
    fn split_maps<C: SplitCaches>(
        &self,
        caches: &mut C,
        slot: &H::Slot,
        level: Level,
        gfn: &mut Gfn,
        range: GfnRange,
    ) -> Step {
        while *gfn < range.end {
            while let Some(huge) = self.find_huge(slot, *gfn, level) {
                if self.shadow.available() <= MIN_FREE {
                    return Step::Failed(SplitError::NoSpace);
                }
                if !caches.ready() || self.host.need_break() {
                    return Step::Pause;
                }
                if !self.split(caches, slot, huge) {
                    return Step::Failed(SplitError::NoMemory);
                }
            }
            *gfn = gfn.round_down(level).add(level.pages());
        }
        Step::Done
    }

    fn find_huge(&self, slot: &H::Slot, gfn: Gfn, level: Level) -> Option<Entry<'l>> {
        let rmap = Rmap::new(self.host.rmap(slot, gfn, level)?);
        rmap.find(self.host, self.lock, |entry| {
            entry.page.role().is_guest_mode() && entry.spte().is_large()
        })
    }

    /// Replaces a huge leaf by a direct page that maps the same.
    fn split<C: SplitCaches>(&self, caches: &mut C, slot: &H::Slot, huge: Entry<'l>) -> bool {
        let format = self.format();
        let leaf = huge.spte();
        let gfn = huge.gfn();
        let access = huge.page.access_of(huge.index);
        let Some(role) = huge.page.role().child(huge.index, true, access) else {
            return false;
        };
        let Some(page) = self.get_page(&mut NeverUnsync(caches), gfn, role, Some(huge)) else {
            return false;
        };
        for index in 0..ENTRIES {
            let entry = Entry::new(page, index);
            if entry.spte().is_present() {
                // The page is in use for another huge page with the same frames.
                // What it has is right, but a page further down may be incomplete,
                // which unmaps something.
                self.owe_flush(entry.spte().is_nonleaf(role.level()));
                continue;
            }
            let nx = self.host.nx_huge_pages();
            let small = leaf.small_from_huge(format, role.level(), access, index, nx);
            if self
                .install(caches, slot, entry, page.gfn_of(index), access, small)
                .is_err()
            {
                return false;
            }
        }
        // Nothing is unmapped, so no flush is needed.
        self.drop_leaf(huge);
        if self.link_unmapped(caches, huge, page).is_err() {
            self.owe_flush(true);
            return false;
        }
        self.host.count(Counter::NestedSplit, 1);
        true
    }
}

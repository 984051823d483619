// SPDX-License-Identifier: GPL-2.0

//! What the host asks for by memory slot: notifiers, aging, the dirty log.
//!
//! All of it goes through the reverse maps of the slot's frames.

use super::{host::ShadowHost, rmap::Rmap, Op, Owed, Shadow};
use crate::mmu::{
    spte::Spte,
    sync::{atomic::AtomicU64, Flush, MmuLocked, MmuWrite},
    types::{Gfn, GfnRange, Level},
};

/// A range of a slot's frames.
struct Part<'s, S: ?Sized> {
    slot: &'s S,
    /// The frames, none of which is outside of the slot.
    range: GfnRange,
    min_level: Level,
    max_level: Level,
}

/// When a walk lets others have the lock.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Yield {
    Never,
    /// After the flush that is owed.
    Flushed,
    /// The caller flushes anyway, after it dropped the lock.
    Unflushed,
}

impl Shadow {
    /// Calls `f` for every map of the part that is not empty.
    fn for_each_rmap<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        part: &Part<'_, H::Slot>,
        yields: Yield,
        flush: Flush,
        mut f: impl for<'l> FnMut(&Op<'l, H>, &AtomicU64),
    ) -> Flush {
        // A VM may have slots with reverse maps, but no nested guest any more.
        if self.pages() == 0 {
            return flush;
        }
        let mut flush = flush;
        let range = part.range.intersect(host.slot_range(part.slot));
        for level in part.min_level.get()..=part.max_level.get() {
            let Some(level) = Level::new(level) else {
                continue;
            };
            let mut gfn = range.start;
            while gfn < range.end {
                let op = self.op(host, lock, Owed::nothing());
                let mut pause = false;
                while gfn < range.end && !pause {
                    if let Some(rmap) = host.rmap(part.slot, gfn, level) {
                        if !Rmap::new(rmap).is_empty() {
                            f(&op, rmap);
                        }
                    }
                    gfn = gfn.round_down(level).add(level.pages());
                    pause = yields != Yield::Never && host.need_break();
                }
                let owed = op.into_owed();
                flush = flush.merge(owed.flush);
                if pause {
                    if yields == Yield::Flushed {
                        host.spend(flush, lock);
                        flush = Flush::none();
                    }
                    lock.relax(host);
                }
            }
        }
        flush
    }

    /// Unmaps frames of a slot.
    pub fn unmap_range<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        slot: &H::Slot,
        range: GfnRange,
        can_yield: bool,
        flush: Flush,
    ) -> Flush {
        let part = Part {
            slot,
            range,
            min_level: Level::L4K,
            max_level: Level::MAX_HUGE,
        };
        let yields = if can_yield {
            Yield::Flushed
        } else {
            Yield::Never
        };
        self.for_each_rmap(host, lock, &part, yields, flush, |op, rmap| {
            let any = op.drop_all(Rmap::new(rmap));
            op.owe_flush(any);
        })
    }

    /// Makes frames of a slot old; true if any was young. With `test_only` nothing
    /// changes.
    pub fn age<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        slot: &H::Slot,
        range: GfnRange,
        test_only: bool,
    ) -> bool {
        let format = host.format();
        let part = Part {
            slot,
            range,
            min_level: Level::L4K,
            max_level: Level::MAX_HUGE,
        };
        let mut young = false;
        let flush = self.for_each_rmap(
            host,
            lock,
            &part,
            Yield::Never,
            Flush::none(),
            |op, rmap| {
                if test_only && young {
                    return;
                }
                Rmap::new(rmap).for_each(host, op.lock, |entry| {
                    let spte = entry.spte();
                    if spte.is_accessed(format) {
                        young = true;
                        // Whoever changed the entry first uses it.
                        if !test_only {
                            entry.replace(spte, spte.mark_old(format));
                        }
                    }
                });
            },
        );
        // Aging tolerates CPUs that still have the old bits.
        host.spend(flush, lock);
        young
    }

    /// Takes write access from what maps the slot at `min_level` or above, for the
    /// dirty log.
    pub fn write_protect_slot<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        slot: &H::Slot,
        min_level: Level,
    ) -> Flush {
        let part = Part {
            slot,
            range: host.slot_range(slot),
            min_level,
            max_level: Level::MAX_HUGE,
        };
        let mut any = false;
        let flush = self.for_each_rmap(
            host,
            lock,
            &part,
            Yield::Unflushed,
            Flush::none(),
            |op, rmap| {
                Rmap::new(rmap).for_each(host, op.lock, |entry| {
                    any |= entry.spte().is_writable();
                });
                op.owe_flush(op.protect_rmap(rmap, false).needed());
            },
        );
        flush.merge(Flush::when(any))
    }

    /// Takes write access from what maps `gfn` at `min_level` or above, for good:
    /// only a fault that asks us gives it back.
    pub fn write_protect_gfn<H: ShadowHost>(
        &self,
        host: &H,
        lock: &MmuWrite<'_>,
        slot: &H::Slot,
        gfn: Gfn,
        min_level: Level,
    ) -> Flush {
        let op = self.op(host, lock, Owed::nothing());
        op.protect_rmaps(slot, gfn, min_level)
    }

    /// Makes the next write to each frame of the slot seen, by the dirty bit or by
    /// protection. The caller flushes.
    pub fn clear_dirty_slot<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        slot: &H::Slot,
    ) -> Flush {
        let part = Part {
            slot,
            range: host.slot_range(slot),
            min_level: Level::L4K,
            max_level: Level::L4K,
        };
        self.for_each_rmap(
            host,
            lock,
            &part,
            Yield::Unflushed,
            Flush::none(),
            |op, rmap| op.owe_flush(op.clear_dirty(rmap)),
        )
    }

    /// The same for frames from `base` on whose bit in `mask` is set; if
    /// `by_protection`, always by protection. The caller flushes.
    #[allow(clippy::too_many_arguments)]
    pub fn clear_dirty_masked<H: ShadowHost>(
        &self,
        host: &H,
        lock: &MmuWrite<'_>,
        slot: &H::Slot,
        base: Gfn,
        mask: u64,
        by_protection: bool,
    ) {
        let op = self.op(host, lock, Owed::nothing());
        let mut left = mask;
        while left != 0 {
            let gfn = base.add(left.trailing_zeros().into());
            left &= left.wrapping_sub(1);
            let Some(rmap) = host.rmap(slot, gfn, Level::L4K) else {
                continue;
            };
            if by_protection {
                // The caller flushes whatever comes of it.
                let _ = op.protect_rmap(rmap, false);
            } else {
                op.clear_dirty(rmap);
            }
        }
    }

    /// Unmaps what could be mapped by huge pages, now that dirty pages are not
    /// logged any more; the next fault does. `max_level_of` says what slot and host
    /// allow.
    pub fn recover_huge<H: ShadowHost>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        slot: &H::Slot,
        max_level_of: impl Fn(Gfn) -> Level,
    ) {
        let range = host.slot_range(slot);
        let part = Part {
            slot,
            range,
            min_level: Level::L4K,
            max_level: Level::L2M,
        };
        let flush = self.for_each_rmap(
            host,
            lock,
            &part,
            Yield::Flushed,
            Flush::none(),
            |op, rmap| {
                // A page that shadows a table of the guest has entries as small as
                // the guest's. Only direct pages can be done without. What is not
                // present any more was dropped: should an entry stay in a map that it
                // does not belong to, it is not found over and over.
                while let Some(entry) = Rmap::new(rmap).find(host, op.lock, |entry| {
                    let page = entry.page;
                    entry.spte().is_present()
                        && page.role().is_direct()
                        && range.contains(page.gfn())
                        && page.level() < max_level_of(page.gfn())
                }) {
                    op.drop_leaf(entry);
                    op.owe_flush(true);
                }
            },
        );
        host.spend(flush, lock);
    }
}

impl<H: ShadowHost> Op<'_, H> {
    /// Makes the next write to each leaf of a map seen; true if anything changed.
    fn clear_dirty(&self, rmap: &AtomicU64) -> bool {
        let format = self.format();
        let mut any = false;
        Rmap::new(rmap).for_each(self.host, self.lock, |entry| {
            let by_protection = !entry.spte().tracks_dirty_by_bit();
            let bit = Spte::dirty_bit(format, by_protection);
            any |= entry.clear(bit).raw() & bit != 0;
        });
        any
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The dirty log, and write tracking.
//!
//! For the log a write must be seen once after each harvest: either the entry
//! loses its writable bit, and the next write faults, or its dirty bit, and the
//! CPU logs the page. CPUs may go on with stale translations until the caller
//! flushes, which it does before it shows the log to anybody. Write tracking is
//! stricter: it takes MMU-writable away as well, so that nothing makes the entry
//! writable behind the tracker's back, and is flushed before the lock drops.

use super::{
    change::clear_bits,
    roots::Which,
    walk::{mapped_by, walk, Cursor, Plan, Step},
    Tdp,
};
use crate::mmu::{
    host::Host,
    spte::Spte,
    sync::{Flush, MmuRead, MmuWrite},
    table::Table,
    types::{Gfn, GfnRange, Level},
};

impl Tdp {
    /// Write-protects the leaves of `min_level` and above in the range, for the
    /// dirty log.
    pub fn write_protect_slot<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuRead<'_>,
        smm: bool,
        range: GfnRange,
        min_level: Level,
    ) -> Flush {
        self.clear_in_range(host, lock, smm, range, min_level, |_| Spte::WRITABLE_MASK)
    }

    /// Clears what says that a page is dirty, in the range.
    pub fn clear_dirty_range<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuRead<'_>,
        smm: bool,
        range: GfnRange,
    ) {
        let format = host.format();
        let cleared = self.clear_in_range(host, lock, smm, range, Level::L4K, |root| {
            let by_protection = root.role().tracks_writes_by_protection(host);
            Spte::dirty_bit(format, by_protection)
        });
        // Who switches the log on flushes in any case.
        let _ = cleared;
    }

    /// Clears bits, chosen by root, of the leaves in the range; a flush is owed if
    /// a leaf had one of them.
    fn clear_in_range<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuRead<'_>,
        smm: bool,
        range: GfnRange,
        min_level: Level,
        bits_of: impl Fn(&Table) -> u64,
    ) -> Flush {
        let plan = Plan {
            range,
            min_level,
            may_yield: true,
            unlinks_tables: false,
        };
        let roots = self.roots(host, Which::valid(smm));
        let mut changed = false;
        let mut next = roots.after(None);
        while let Some(root) = next {
            let bits = bits_of(&root);
            // A yield needs no flush: it is owed for the harvest, not the lock.
            let walked = walk(host, lock, &root, plan, Flush::none(), |entry, _, _| {
                if !entry.is_leaf() || entry.spte.raw() & bits == 0 {
                    return Step::Next;
                }
                match self.try_change(host, true, entry, entry.spte.without(bits)) {
                    Ok(()) => {
                        changed = true;
                        Step::Next
                    }
                    Err(conflict) => conflict.into(),
                }
            });
            host.spend(walked.flush, lock);
            next = roots.after(Some(root));
        }
        Flush::when(changed)
    }

    /// Write-protects the leaf of `min_level` or above that maps `gfn`, so that it
    /// stays write-protected. The flush that is owed must be done before the lock
    /// drops.
    pub fn write_protect_gfn<H: Host>(
        &self,
        host: &H,
        lock: &MmuWrite<'_>,
        smm: bool,
        gfn: Gfn,
        min_level: Level,
    ) -> Flush {
        let rcu = host.rcu_read();
        let bits = Spte::WRITABLE_MASK | host.format().mmu_writable;
        let protected = self.any_root_rcu(Which::valid(smm), &rcu, |root| {
            let range = mapped_by(host, root, GfnRange::of(gfn, Level::L4K));
            if range.is_empty() {
                return false;
            }
            let mut changed = false;
            let mut cursor = Cursor::new(host, &rcu, root, range, min_level);
            while let Some(mut entry) = cursor.next() {
                if entry.is_leaf() && entry.spte.raw() & bits != 0 {
                    clear_bits(host, &mut entry, bits, lock);
                    changed = true;
                }
            }
            changed
        });
        Flush::when(protected)
    }

    /// Clears what says that a page is dirty, or with `wrprot` write-protects, for
    /// the 4 KiB leaves of the frames `base_gfn + i` for each bit `i` of `mask`.
    pub fn clear_dirty_masked<H: Host>(
        &self,
        host: &H,
        lock: &MmuWrite<'_>,
        smm: bool,
        base_gfn: Gfn,
        mask: u64,
        wrprot: bool,
    ) {
        if mask == 0 {
            return;
        }
        let rcu = host.rcu_read();
        let format = host.format();
        let wanted = GfnRange::new(
            base_gfn.add(u64::from(mask.trailing_zeros())),
            base_gfn.add(u64::from(64u32.wrapping_sub(mask.leading_zeros()))),
        );
        self.any_root_rcu(Which::valid(smm), &rcu, |root| {
            let by_protection = wrprot || root.role().tracks_writes_by_protection(host);
            let bits = Spte::dirty_bit(format, by_protection);
            let range = mapped_by(host, root, wanted);
            if range.is_empty() {
                return false;
            }
            let mut cursor = Cursor::new(host, &rcu, root, range, Level::L4K);
            while let Some(mut entry) = cursor.next() {
                if entry.level > Level::L4K || !entry.is_leaf() {
                    continue;
                }
                let bit = entry.gfn.0.wrapping_sub(base_gfn.0) & 63;
                if (mask >> bit) & 1 != 0 && entry.spte.raw() & bits != 0 {
                    clear_bits(host, &mut entry, bits, lock);
                }
            }
            false
        });
    }
}

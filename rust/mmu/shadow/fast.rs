// SPDX-License-Identifier: GPL-2.0

//! What is done without `mmu_lock`: the fast page fault, and looking up entries.
//!
//! Pages are freed after a grace period, so that a walk under RCU may come to one
//! that was zapped, but not to one that is gone.

use super::{host::ShadowHost, roots::Root, Shadow};
use crate::mmu::{
    host::Host,
    spte::Spte,
    sync::{
        atomic::{AtomicU64, Ordering},
        RcuRead,
    },
    table::{Entries, ENTRIES},
    tdp::{fast_fix, FastFix, FastOutcome, FAST_TRIES},
    types::{Gfn, Hpa, Level},
};

/// The entry for `addr` of the page at `hpa`.
#[inline]
fn cell<'r, H: Host, R: RcuRead>(
    host: &H,
    hpa: Hpa,
    level: Level,
    addr: u64,
    _rcu: &'r R,
) -> &'r AtomicU64 {
    // SAFETY: The page was found by a walk in this RCU section, or is a root that
    // the caller holds.
    let entries: &'r Entries = unsafe { host.entries_of(hpa).as_ref() };
    &entries[(addr >> level.shift()) as usize % ENTRIES]
}

/// The entry for `addr` of the page at `hpa`.
#[inline]
pub(super) fn read_entry<H: Host, R: RcuRead>(
    host: &H,
    hpa: Hpa,
    level: Level,
    addr: u64,
    rcu: &R,
) -> Spte {
    Spte(cell(host, hpa, level, addr, rcu).load(Ordering::Acquire))
}

/// The lowest entry for `addr` below the page at `start`, what it is, and its level.
#[inline]
fn lowest<'r, H: Host, R: RcuRead>(
    host: &H,
    start: (Hpa, Level),
    addr: u64,
    rcu: &'r R,
) -> (&'r AtomicU64, Spte, Level) {
    let (mut hpa, mut level) = start;
    loop {
        let cell = cell(host, hpa, level, addr, rcu);
        let spte = Spte(cell.load(Ordering::Acquire));
        match level.child() {
            Some(child) if spte.is_nonleaf(level) => {
                hpa = spte.hpa(host.format());
                level = child;
            }
            _ => return (cell, spte, level),
        }
    }
}

impl Shadow {
    /// Serves a fault on a present leaf of a direct root that was write-protected
    /// for the dirty log, or made inaccessible by aging. The caller holds references
    /// to the root.
    ///
    /// `observe` is told, in the RCU section, where the entry is, what it was, and
    /// how it ended.
    #[allow(clippy::too_many_arguments)]
    pub fn fast_fault<H: ShadowHost>(
        &self,
        host: &H,
        root: Root<'_>,
        gfn: Gfn,
        write: bool,
        exec: bool,
        slot: Option<&H::Slot>,
        dirty_track: bool,
        observe: impl FnOnce(&AtomicU64, Spte, FastOutcome),
    ) -> FastOutcome {
        let format = host.format();
        let addr = gfn.to_gpa();
        let rcu = host.rcu_read();
        let Some(start) = root.start(format, addr) else {
            return FastOutcome::Invalid;
        };
        let (mut cell, mut old, mut level) = lowest(host, start, addr, &rcu);
        let mut outcome = FastOutcome::Invalid;
        for _ in 0..FAST_TRIES {
            if !old.is_leaf(level) {
                break;
            }
            let new = match fast_fix(format, old, level, write, exec, dirty_track) {
                FastFix::Change(new) => new,
                FastFix::Impossible => break,
                FastFix::Spurious => {
                    outcome = FastOutcome::Spurious;
                    break;
                }
            };
            let fixed = cell
                .compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok();
            if fixed {
                // Dirty only now: harvested before, it would be protected again by
                // nobody.
                if let (Some(slot), true) = (slot, new.is_writable() && !old.is_writable()) {
                    host.mark_dirty(slot, gfn);
                }
                outcome = FastOutcome::Fixed;
                break;
            }
            (cell, old, level) = lowest(host, start, addr, &rcu);
        }
        observe(cell, old, outcome);
        outcome
    }

    /// The entries on the way to `addr`, by level; the lowest level that was
    /// reached, and the first. The caller holds references to the root.
    pub fn walk<H: ShadowHost>(
        &self,
        host: &H,
        root: Root<'_>,
        addr: u64,
        sptes: &mut [Spte; 6],
    ) -> Option<(Level, Level)> {
        let format = host.format();
        let rcu = host.rcu_read();
        let (mut hpa, first) = root.start(format, addr)?;
        let mut level = first;
        loop {
            let spte = read_entry(host, hpa, level, addr, &rcu);
            if let Some(place) = sptes.get_mut(usize::from(level.get())) {
                *place = spte;
            }
            match level.child() {
                Some(child) if spte.is_nonleaf(level) => {
                    hpa = spte.hpa(format);
                    level = child;
                }
                _ => return Some((level, first)),
            }
        }
    }
}

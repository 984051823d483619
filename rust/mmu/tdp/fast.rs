// SPDX-License-Identifier: GPL-2.0

//! Changes without `mmu_lock`: the fast page fault, and aging.
//!
//! RCU keeps the tables; a compare-exchange makes sure that the bits change in the
//! entry that was looked at. Neither changes what is mapped, so there is nothing
//! to account and nothing to flush: a CPU that still has the old bits faults, or
//! misses one access in the eyes of aging, which tolerates that.

use super::{
    roots::Which,
    walk::{child_entries, mapped_by, Entry},
    Tdp,
};
use crate::mmu::{
    host::Host,
    spte::{Spte, SpteFormat},
    sync::{
        atomic::{AtomicU64, Ordering},
        RcuRead,
    },
    table::{Entries, Table, TablePtr},
    types::{Gfn, GfnRange, Level},
};

/// How often a fast fault tries before it leaves the fault to the slow path.
pub const FAST_TRIES: u32 = 4;

/// How a fast page fault ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FastOutcome {
    /// This is for the slow path.
    Invalid,
    /// The entry allows the access now.
    Fixed,
    /// The entry allowed it already.
    Spurious,
}

/// How a leaf can be made to allow an access without a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FastFix {
    /// It allows the access already.
    Spurious,
    /// It can not.
    Impossible,
    /// By this.
    Change(Spte),
}

/// What makes the leaf `old` of `level` allow the access.
#[inline]
pub fn fast_fix(
    format: &SpteFormat,
    old: Spte,
    level: Level,
    write: bool,
    exec: bool,
    dirty_track: bool,
) -> FastFix {
    if old.access_allowed(format, write, exec) {
        return FastFix::Spurious;
    }
    let mut new = old;
    if !format.ad_enabled && old.is_access_tracked(format) {
        new = new.mark_young(format);
    }
    if write && old.is_mmu_writable(format) {
        // All of a huge page would become writable, but only one frame of it dirty.
        if dirty_track && level > Level::L4K {
            return FastFix::Impossible;
        }
        new = new.make_writable();
    }
    if new == old || !new.access_allowed(format, write, exec) {
        return FastFix::Impossible;
    }
    FastFix::Change(new)
}

impl Tdp {
    /// Serves a fault on a present entry that was write-protected for the dirty
    /// log, or made inaccessible by aging. The caller holds a reference to `root`.
    ///
    /// `observe` is told, in the RCU section, where the entry is, what it was, and
    /// how it ended.
    #[allow(clippy::too_many_arguments)]
    pub fn fast_fault<H: Host>(
        &self,
        host: &H,
        root: TablePtr,
        gfn: Gfn,
        write: bool,
        exec: bool,
        slot: Option<&H::Slot>,
        dirty_track: bool,
        observe: impl FnOnce(&AtomicU64, Spte, FastOutcome),
    ) -> FastOutcome {
        // SAFETY: The caller's reference keeps the root alive.
        let root = unsafe { root.as_ref() };
        if gfn >= root.level().root_end() {
            return FastOutcome::Invalid;
        }

        let rcu = host.rcu_read();
        let mut entry = lowest(host, root, gfn, &rcu);
        let mut outcome = FastOutcome::Invalid;
        for _ in 0..FAST_TRIES {
            if !entry.is_leaf() {
                break;
            }
            let fix = fast_fix(
                host.format(),
                entry.spte,
                entry.level,
                write,
                exec,
                dirty_track,
            );
            let new = match fix {
                FastFix::Change(new) => new,
                FastFix::Impossible => break,
                FastFix::Spurious => {
                    outcome = FastOutcome::Spurious;
                    break;
                }
            };
            if replace(&entry, new) {
                // Dirty only now: harvested before, it would be protected again
                // by nobody.
                if let (Some(slot), true) = (slot, new.is_writable() && !entry.spte.is_writable()) {
                    host.mark_dirty(slot, gfn);
                }
                outcome = FastOutcome::Fixed;
                break;
            }
            entry = lowest(host, root, gfn, &rcu);
        }
        observe(entry.cell, entry.spte, outcome);
        outcome
    }

    /// Makes the pages of the range old, in the address space `smm` or in both; true if
    /// any was young. With `test_only` nothing changes.
    pub fn age<H: Host>(
        &self,
        host: &H,
        smm: Option<bool>,
        range: GfnRange,
        test_only: bool,
    ) -> bool {
        let rcu = host.rcu_read();
        let which = Which {
            smm,
            invalid: false,
        };
        self.any_root_rcu(which, &rcu, |root| {
            age_root(host, root, range, test_only, &rcu)
        })
    }
}

fn age_root<H: Host, R: RcuRead>(
    host: &H,
    root: &Table,
    range: GfnRange,
    test_only: bool,
    rcu: &R,
) -> bool {
    let range = mapped_by(host, root, range);
    let mut gfn = range.start;
    let mut young = false;
    // Mostly it is one page: straight down, and then along the table as far as the range goes.
    while gfn < range.end {
        let (table, mut entry) = lowest_and_table(host, root, gfn, rcu);
        loop {
            young |= entry.is_leaf() && age_leaf(host, &entry, test_only);
            if test_only && young {
                return true;
            }
            gfn = entry.range().end;
            if gfn >= range.end || gfn.index(entry.level) == 0 {
                break;
            }
            entry = Entry::at(table, gfn, entry.level);
            if entry.is_nonleaf() {
                break;
            }
        }
    }
    young
}

fn age_leaf<H: Host>(host: &H, entry: &Entry<'_>, test_only: bool) -> bool {
    let format = host.format();
    let accessed = entry.spte.is_accessed(format);
    if test_only || (!accessed && !entry.spte.is_ahead()) {
        return accessed;
    }
    // Whoever changed the entry first zaps it or uses it; it is fine as it is.
    let new = entry.spte.mark_old(format).looked_at();
    if replace(entry, new) {
        entry.trace_change(host, new);
        if entry.spte.is_ahead() {
            host.account_ahead(i64::from(accessed), i64::from(!accessed));
        }
    }
    accessed
}

/// The lowest entry that covers `gfn`.
#[inline]
pub(super) fn lowest<'r, H: Host, R: RcuRead>(
    host: &H,
    root: &'r Table,
    gfn: Gfn,
    rcu: &'r R,
) -> Entry<'r> {
    lowest_and_table(host, root, gfn, rcu).1
}

#[inline]
fn lowest_and_table<'r, H: Host, R: RcuRead>(
    host: &H,
    root: &'r Table,
    gfn: Gfn,
    rcu: &'r R,
) -> (&'r Entries, Entry<'r>) {
    let mut table = root.entries();
    let mut entry = Entry::at(table, gfn, root.level());
    while let (true, Some(level)) = (entry.is_nonleaf(), entry.level.child()) {
        table = child_entries(host, entry.spte, rcu);
        entry = Entry::at(table, gfn, level);
    }
    (table, entry)
}

/// Changes bits of a leaf that do not change what it maps.
#[inline]
fn replace(entry: &Entry<'_>, new: Spte) -> bool {
    entry
        .cell
        .compare_exchange(entry.spte.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok()
}

// SPDX-License-Identifier: GPL-2.0

//! The one place where entries change, and what follows from a change.
//!
//! [`Tdp::try_change`] replaces an entry if it is still what the caller saw.
//! [`Tdp::clear_exclusive`] removes an entry under the write lock. Both end in
//! [`Tdp::account_change`], which counts leaves and takes down the subtree that
//! was cut off. [`clear_bits`] can not change what is mapped, so nothing follows.
//!
//! A change that would give a frame another page without an invalid entry between
//! is refused: CPUs would use both pages at once.

use super::{
    walk::{Entry, Step},
    Tdp,
};
use crate::mmu::{
    host::{Event, Host, SplitOutcome},
    role::Role,
    spte::Spte,
    sync::{
        atomic::{AtomicU64, Ordering},
        MmuWrite,
    },
    table::TablePtr,
    types::{Level, ENTRIES},
};

/// Why an entry did not change.
pub(super) enum Conflict {
    /// Somebody else changed it first; the caller's copy is up to date again.
    Raced,
    /// The change is forbidden. The VM is marked as broken.
    Refused,
}

impl From<Conflict> for Step {
    fn from(conflict: Conflict) -> Step {
        match conflict {
            Conflict::Raced => Step::Again,
            Conflict::Refused => Step::Next,
        }
    }
}

impl Tdp {
    /// Replaces the entry by `new` if it still is `entry.spte`.
    ///
    /// On success the entry's copy is what was replaced.
    #[inline]
    pub(super) fn try_change<H: Host>(
        &self,
        host: &H,
        shared: bool,
        entry: &mut Entry<'_>,
        new: Spte,
    ) -> Result<(), Conflict> {
        let old = entry.spte;
        if !may_replace(host, entry.level, old, new) {
            host.bug("rmmu: a present entry must not change the page it points to");
            return Err(Conflict::Refused);
        }
        // Release publishes the entries of a new table together with it.
        match entry
            .cell
            .compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => {
                self.account_change(host, shared, entry, new);
                Ok(())
            }
            Err(now) => {
                entry.spte = Spte(now);
                Err(Conflict::Raced)
            }
        }
    }

    /// Installs `new`, a leaf, where there has never been anything; true if it did.
    ///
    /// The leaf is for the caller to account, with others of its kind.
    #[inline]
    pub(super) fn install_ahead<H: Host>(&self, host: &H, entry: &Entry<'_>, new: Spte) -> bool {
        if !new.is_consistent(host.format()) {
            host.bug("rmmu: a writable entry must be MMU-writable and host-writable");
            return false;
        }
        // Nothing is published together with a leaf, and whoever was faster has it.
        let done = entry
            .cell
            .compare_exchange(
                Spte::NONPRESENT.0,
                new.0,
                Ordering::Relaxed,
                Ordering::Relaxed,
            )
            .is_ok();
        if done {
            entry.trace_change(host, new);
        }
        done
    }

    /// Removes the entry and everything below it. Nobody else may be installing
    /// or removing.
    #[inline]
    pub(super) fn clear_exclusive<H: Host>(&self, host: &H, entry: &mut Entry<'_>) {
        entry.spte = take(host, entry.cell, entry.spte, entry.level, Spte::NONPRESENT);
        self.account_change(host, false, entry, Spte::NONPRESENT);
    }

    /// Does what follows from the change of an entry of a linked table, of which
    /// the caller has the copy of before.
    #[inline]
    fn account_change<H: Host>(&self, host: &H, shared: bool, entry: &Entry<'_>, new: Spte) {
        let (level, old) = (entry.level, entry.spte);
        let is_leaf = new.is_leaf(level);
        if is_leaf && !new.is_consistent(host.format()) {
            host.bug("rmmu: a writable entry must be MMU-writable and host-writable");
        }
        match (old.is_leaf(level), is_leaf) {
            (false, true) => host.account_leaf(level, 1),
            (true, false) => host.account_leaf(level, -1),
            _ => {}
        }
        if old.is_ahead() && !new.is_ahead() {
            // A new leaf in its place is the answer to a fault of the guest.
            let used = i64::from(is_leaf || old.is_accessed(host.format()));
            host.account_ahead(used, 1i64.wrapping_sub(used));
        }
        if old.is_nonleaf(level) && !new.is_nonleaf(level) {
            self.remove_table(host, shared, host.table_of(old.hpa(host.format())));
        }
        entry.trace_change(host, new);
    }

    /// Takes down a table that no entry points to any more, and all below it.
    ///
    /// The one who replaced the entry calls this, so it happens once a table.
    #[inline(never)]
    fn remove_table<H: Host>(&self, host: &H, shared: bool, table: TablePtr) {
        // SAFETY: The table was linked until now. It is freed by the end of this
        // function at the earliest, because only whoever unlinked it frees it.
        let header = unsafe { table.as_ref() };
        let level = header.level();
        let mut leaves: i64 = 0;
        let (mut used, mut unused) = (0i64, 0i64);

        host.trace(Event::TableRemoved(header));
        host.account_table(table, -1);
        self.forget_nx_candidate(host, header);

        let mut gfn = header.gfn();
        for cell in header.entries() {
            let first = gfn;
            gfn = gfn.add(level.pages());
            let old = if shared {
                // A fault may be about to install something here; from now on it
                // finds the entry frozen.
                Spte(cell.swap(Spte::FROZEN.0, Ordering::AcqRel))
            } else {
                let old = Spte(cell.load(Ordering::Acquire));
                // What is not present stays so under the write lock.
                if !old.is_present() {
                    continue;
                }
                take(host, cell, old, level, Spte::FROZEN)
            };
            if old.is_frozen() {
                host.bug("rmmu: a table was removed twice");
            } else if old.is_leaf(level) {
                leaves = leaves.wrapping_add(1);
                if old.is_ahead() {
                    let counter = if old.is_accessed(host.format()) {
                        &mut used
                    } else {
                        &mut unused
                    };
                    *counter = counter.wrapping_add(1);
                }
            } else if old.is_nonleaf(level) {
                self.remove_table(host, shared, host.table_of(old.hpa(host.format())));
            }
            host.trace(Event::SpteChanged {
                cell,
                gfn: first,
                level,
                old,
                new: Spte::FROZEN,
            });
        }
        if leaves != 0 {
            host.account_leaf(level, leaves.wrapping_neg());
        }
        if used | unused != 0 {
            host.account_ahead(used, unused);
        }
        host.free_table_rcu(table);
    }

    /// Links `table` in place of the entry, which the caller last saw as
    /// `entry.spte`. On failure the table is still the caller's.
    #[inline]
    pub(super) fn link_table<H: Host>(
        &self,
        host: &H,
        shared: bool,
        entry: &mut Entry<'_>,
        table: TablePtr,
    ) -> Result<(), Conflict> {
        let format = host.format();
        let new = Spte::nonleaf(format, table.hpa(), !format.ad_enabled);
        self.try_change(host, shared, entry, new)?;
        host.account_table(table, 1);
        Ok(())
    }

    /// Replaces the huge leaf by a table, prepared for this entry, that maps the
    /// same memory. No flush is needed: it makes no difference which of the two
    /// translations a CPU has.
    pub(super) fn split_leaf<H: Host>(
        &self,
        host: &H,
        shared: bool,
        entry: &mut Entry<'_>,
        table: TablePtr,
        role: Role,
    ) -> Result<(), Conflict> {
        let format = host.format();
        let huge = entry.spte;
        let nx = host.nx_huge_pages();
        let (gfn, level) = (entry.gfn, entry.level);
        // SAFETY: The table is linked only below.
        unsafe {
            table.fill(|i| huge.small_from_huge(format, role.level, role.access, i, nx));
        }
        let linked = self.link_table(host, shared, entry, table);
        if linked.is_ok() {
            host.account_leaf(role.level, ENTRIES as i64);
        }
        host.trace(Event::HugeSplit {
            gfn,
            spte: huge,
            level,
            outcome: match linked {
                Ok(()) => SplitOutcome::Done,
                Err(_) => SplitOutcome::Raced,
            },
        });
        linked
    }
}

/// Both lead somewhere, and not to the same place, is allowed only between a
/// table and memory.
#[inline]
fn may_replace<H: Host>(host: &H, level: Level, old: Spte, new: Spte) -> bool {
    if !old.is_present() || !new.is_present() {
        return !old.is_frozen();
    }
    let format = host.format();
    old.is_leaf(level) != new.is_leaf(level) || old.pfn(format) == new.pfn(format)
}

/// Replaces an entry under the write lock; returns what was replaced. Bits that
/// others set meanwhile are in the result.
#[inline]
fn take<H: Host>(host: &H, cell: &AtomicU64, old: Spte, level: Level, new: Spte) -> Spte {
    if old.is_leaf(level) && old.needs_atomic_update(host.format()) {
        return Spte(cell.swap(new.0, Ordering::AcqRel));
    }
    cell.store(new.0, Ordering::Release);
    old
}

/// Clears bits of a present leaf. Nobody else may be installing or removing.
#[inline]
pub(super) fn clear_bits<H: Host>(
    host: &H,
    entry: &mut Entry<'_>,
    bits: u64,
    _lock: &MmuWrite<'_>,
) {
    entry.spte = Spte(entry.cell.fetch_and(!bits, Ordering::AcqRel));
    entry.trace_change(host, entry.spte.without(bits));
}

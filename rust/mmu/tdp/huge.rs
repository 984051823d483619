// SPDX-License-Identifier: GPL-2.0

//! Splitting huge pages before the dirty log needs small ones, and putting them
//! together again when it is switched off. Both in place, under the read lock,
//! without a vCPU.

use super::{
    roots::{RootRef, Which},
    walk::{child_entries, walk, Cursor, Entry, Plan, Step},
    Tdp,
};
use crate::mmu::{
    host::{Event, Host, SplitOutcome},
    spte::Spte,
    sync::{Flush, MmuLocked, MmuRead, RcuRead},
    table::TablePtr,
    types::{Gfn, GfnRange, Level},
};

/// There was no memory for a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoMemory;

impl Tdp {
    /// Splits the huge leaves of the range until none is above `target`.
    ///
    /// What was split when memory runs out stays split. No flush is owed: the
    /// translations are the same.
    pub fn split_huge<H: Host, L: MmuLocked>(
        &self,
        host: &H,
        lock: &mut L,
        smm: bool,
        range: GfnRange,
        target: Level,
    ) -> Result<(), NoMemory> {
        let Some(min_level) = target.parent() else {
            return Ok(());
        };
        let roots = self.roots(host, Which::valid(smm));
        let mut spare = None;
        let mut result = Ok(());
        let mut next = roots.after(None);
        while let Some(root) = next {
            result = self.split_below(host, lock, &root, range, min_level, &mut spare);
            if result.is_err() {
                break;
            }
            next = roots.after(Some(root));
        }
        if let Some(table) = spare {
            host.free_table_now(table);
        }
        result
    }

    fn split_below<H: Host, L: MmuLocked>(
        &self,
        host: &H,
        lock: &mut L,
        root: &RootRef<'_, H>,
        range: GfnRange,
        min_level: Level,
        spare: &mut Option<TablePtr>,
    ) -> Result<(), NoMemory> {
        let root_role = root.role();
        let mut plan = Plan {
            range,
            min_level,
            may_yield: true,
            unlinks_tables: false,
        };
        loop {
            let mut stopped = None;
            let walked = walk(host, lock, root, plan, Flush::none(), |entry, _, _| {
                let (true, Some(level)) = (entry.is_leaf(), entry.level.child()) else {
                    return Step::Next;
                };
                // Without a table at hand: out of the locks, and allocate one.
                let Some(table) = spare.take() else {
                    stopped = Some((entry.gfn, entry.spte, entry.level));
                    return Step::Stop;
                };
                let role = root_role.with_level(level);
                // SAFETY: The table is ours until it is linked.
                unsafe { table.prepare(role, entry.gfn) };
                // SAFETY: As above.
                host.trace(Event::TableMade(unsafe { table.as_ref() }));
                match self.split_leaf(host, L::SHARED, entry, table, role) {
                    Ok(()) => Step::Next,
                    Err(conflict) => {
                        *spare = Some(table);
                        conflict.into()
                    }
                }
            });
            host.spend(walked.flush, lock);
            let Some(from) = walked.stopped_at else {
                return Ok(());
            };
            plan.range.start = from;
            *spare = lock.unlocked(host, || host.alloc_table());
            if spare.is_none() {
                if let Some((gfn, spte, level)) = stopped {
                    host.trace(Event::HugeSplit {
                        gfn,
                        spte,
                        level,
                        outcome: SplitOutcome::NoMemory,
                    });
                }
                return Err(NoMemory);
            }
        }
    }

    /// Replaces tables in the range by huge leaves where `max_level_of` the first
    /// frame allows it. The caller made sure that the slot does not log.
    ///
    /// CPUs may be walking a replaced table until they are flushed, so that is
    /// done here, before the RCU section ends.
    pub fn recover_huge<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuRead<'_>,
        smm: bool,
        range: GfnRange,
        max_level_of: impl Fn(Gfn) -> Level,
    ) {
        let plan = Plan {
            range,
            min_level: Level::L2M,
            may_yield: true,
            unlinks_tables: true,
        };
        let roots = self.roots(host, Which::valid(smm));
        let mut next = roots.after(None);
        while let Some(root) = next {
            let walked = walk(
                host,
                lock,
                &root,
                plan,
                Flush::none(),
                |entry, rcu, flush| {
                    // A frame outside must not be asked about: the entry covers more
                    // than the slot then, and can not be huge.
                    if entry.level > Level::MAX_HUGE
                        || !entry.is_nonleaf()
                        || !range.contains(entry.gfn)
                        || max_level_of(entry.gfn) < entry.level
                    {
                        return Step::Next;
                    }
                    let Some(huge) = huge_leaf(host, entry, rcu) else {
                        return Step::Next;
                    };
                    match self.try_change(host, true, entry, huge) {
                        Ok(()) => {
                            *flush = Flush::pending();
                            Step::Next
                        }
                        Err(conflict) => conflict.into(),
                    }
                },
            );
            host.spend(walked.flush, lock);
            next = roots.after(Some(root));
        }
    }
}

/// The huge leaf that maps what the first leaf below the entry says.
fn huge_leaf<H: Host, R: RcuRead>(host: &H, entry: &Entry<'_>, rcu: &R) -> Option<Spte> {
    let below = entry.level.child()?;
    let table = child_entries(host, entry.spte, rcu);
    let mut cursor = Cursor::below(host, rcu, table, below, entry.range(), Level::L4K);
    while let Some(small) = cursor.next() {
        if small.is_leaf() {
            let nx = host.nx_huge_pages();
            return Some(small.spte.huge_from_small(host.format(), entry.level, nx));
        }
    }
    None
}

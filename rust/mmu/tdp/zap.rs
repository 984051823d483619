// SPDX-License-Identifier: GPL-2.0

//! Unmapping.
//!
//! A notifier needs the memory gone, so it zaps leaves, also below invalid roots,
//! and leaves tables in place for what comes next. A root that is done with is
//! emptied as a whole, in bounded steps: first all that hangs below 4 KiB entries,
//! then 2 MiB ones, and so on, so that no step removes a large subtree at once.

use super::{
    roots::Which,
    walk::{walk, Plan, Step},
    Tdp,
};
use crate::mmu::{
    host::Host,
    spte::Spte,
    sync::{Flush, MmuLocked, MmuWrite},
    table::Table,
    types::{Gfn, GfnRange, Level},
};

impl Tdp {
    /// Zaps the leaves that overlap the range, below all roots of the address space
    /// `smm` or of both: memory is about to go away. Says whether a flush is owed, what
    /// `flush` owed included.
    pub fn unmap_range<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        smm: Option<bool>,
        range: GfnRange,
        can_yield: bool,
        flush: Flush,
    ) -> Flush {
        let which = Which { smm, invalid: true };
        self.zap_leafs_of(host, lock, which, range, can_yield, flush)
    }

    /// Zaps the leaves that overlap the range, below valid roots: something about
    /// the mapping changed, the memory stays.
    pub fn zap_leafs<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        range: GfnRange,
        flush: Flush,
    ) -> Flush {
        let which = Which {
            smm: None,
            invalid: false,
        };
        self.zap_leafs_of(host, lock, which, range, true, flush)
    }

    fn zap_leafs_of<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        which: Which,
        range: GfnRange,
        may_yield: bool,
        mut flush: Flush,
    ) -> Flush {
        let roots = self.roots(host, which);
        let plan = Plan {
            range,
            min_level: Level::L4K,
            may_yield,
            unlinks_tables: false,
        };
        let mut next = roots.after(None);
        while let Some(root) = next {
            // No CPU can be using an invalid root, hence there is nothing to flush.
            let owes = !root.is_invalid();
            flush = walk(host, lock, &root, plan, flush, |entry, _, flush| {
                if entry.is_leaf() {
                    self.clear_exclusive(host, entry);
                    if owes {
                        *flush = Flush::pending();
                    }
                }
                Step::Next
            })
            .flush;
            next = roots.after(Some(root));
        }
        flush
    }

    /// Empties all roots. Nothing runs the VM any more, so nothing is flushed.
    pub fn zap_all<H: Host>(&self, host: &H, lock: &mut MmuWrite<'_>) {
        let roots = self.roots(
            host,
            Which {
                smm: None,
                invalid: true,
            },
        );
        let mut next = roots.after(None);
        while let Some(root) = next {
            self.zap_root(host, lock, &root);
            next = roots.after(Some(root));
        }
    }

    /// Empties a root to which the caller holds a reference.
    ///
    /// From small to large, so that no step takes long. A kernel that is to prove its MMU begins with 1G, as in-tree KVM does
    /// there: whole tables go at once, as otherwise only for a huge fault.
    pub(super) fn zap_root<H: Host, L: MmuLocked>(&self, host: &H, lock: &mut L, root: &Table) {
        let left_out = if cfg!(CONFIG_KVM_PROVE_MMU) { 2 } else { 0 };
        let levels = [Level::L4K, Level::L2M, Level::L1G, root.level()];
        for level in levels.into_iter().skip(left_out) {
            let plan = Plan {
                range: GfnRange::new(Gfn(0), host.format().gfn_end()),
                min_level: level,
                may_yield: true,
                unlinks_tables: false,
            };
            let walked = walk(host, lock, root, plan, Flush::none(), |entry, _, _| {
                if !entry.spte.is_present() || entry.level > level {
                    return Step::Next;
                }
                if !L::SHARED {
                    self.clear_exclusive(host, entry);
                    return Step::Next;
                }
                match self.try_change(host, true, entry, Spte::NONPRESENT) {
                    Ok(()) => Step::Next,
                    Err(conflict) => conflict.into(),
                }
            });
            // Nothing is owed for a root that no CPU uses.
            host.spend(walked.flush, lock);
        }
    }
}

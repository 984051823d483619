// SPDX-License-Identifier: GPL-2.0

//! NX candidates: tables that exist only because a huge page must not be
//! executable.
//!
//! A doubly linked list, oldest first, under the pages lock. A table enters it
//! after it was linked, unless it was removed again already, which clears
//! `nx_disallowed` under the same lock. Recovery takes the oldest from the list
//! and zaps it, in the hope that the next access maps a huge page.

use super::{change::Conflict, roots::Which, walk::Cursor, Tdp};
use crate::mmu::{
    host::Host,
    spte::Spte,
    sync::{atomic::Ordering, Flush, MmuLocked, MmuRead, RcuRead},
    table::{Table, TablePtr},
    types::{Gfn, GfnRange},
};
use core::ptr;

impl Tdp {
    /// Puts a table that was linked in this RCU section into the list.
    pub(super) fn note_nx_candidate<H: Host>(&self, host: &H, table: TablePtr) {
        // SAFETY: The caller is in the RCU section in which it linked the table.
        let header = unsafe { table.as_ref() };
        host.with_pages_lock(|| {
            if !header.nx_disallowed.load(Ordering::Relaxed)
                || header.nx_listed.load(Ordering::Relaxed)
            {
                return;
            }
            let this = table.as_ptr().as_ptr();
            let last = self.nx_last.load(Ordering::Relaxed);
            header.nx_prev.store(last, Ordering::Relaxed);
            header.nx_next.store(ptr::null_mut(), Ordering::Relaxed);
            // SAFETY: A table in the list is not freed before it left it, which
            // takes the lock we hold.
            match unsafe { last.as_ref() } {
                Some(last) => last.nx_next.store(this, Ordering::Relaxed),
                None => self.nx_first.store(this, Ordering::Relaxed),
            }
            self.nx_last.store(this, Ordering::Relaxed);
            header.nx_listed.store(true, Ordering::Relaxed);
            self.nx_count.fetch_add(1, Ordering::Relaxed);
            host.account_nx_split(1);
        });
    }

    /// Takes a table that was removed out of the list.
    pub(super) fn forget_nx_candidate<H: Host>(&self, host: &H, table: &Table) {
        if table.nx_disallowed.load(Ordering::Relaxed) {
            host.with_pages_lock(|| self.unlist(host, table));
        }
    }

    /// Under the pages lock.
    fn unlist<H: Host>(&self, host: &H, table: &Table) {
        table.nx_disallowed.store(false, Ordering::Relaxed);
        if !table.nx_listed.swap(false, Ordering::Relaxed) {
            return;
        }
        let next = table.nx_next.load(Ordering::Relaxed);
        let prev = table.nx_prev.load(Ordering::Relaxed);
        // SAFETY: Neighbours are in the list, so they are alive, as above.
        match unsafe { prev.as_ref() } {
            Some(prev) => prev.nx_next.store(next, Ordering::Relaxed),
            None => self.nx_first.store(next, Ordering::Relaxed),
        }
        // SAFETY: As above.
        match unsafe { next.as_ref() } {
            Some(next) => next.nx_prev.store(prev, Ordering::Relaxed),
            None => self.nx_last.store(prev, Ordering::Relaxed),
        }
        self.nx_count.fetch_sub(1, Ordering::Relaxed);
        host.account_nx_split(-1);
    }

    /// Takes up to `budget` of the oldest candidates from the list, and zaps all
    /// of them but those for which `skip(gfn, smm)` says that their slot logs
    /// dirty pages: they would come back as they are. Returns how many it zapped.
    pub fn recover_nx<H: Host>(
        &self,
        host: &H,
        lock: &mut MmuRead<'_>,
        budget: u64,
        mut skip: impl FnMut(Gfn, bool) -> bool,
    ) -> u64 {
        let mut left = budget;
        let mut zapped: u64 = 0;
        while left > 0 {
            // Tables are unlinked here, so the flush is done before RCU ends.
            let rcu = host.rcu_read();
            let mut flush = Flush::none();
            while left > 0 {
                let Some(table) = self.pop_candidate(host, &rcu) else {
                    left = 0;
                    break;
                };
                left = left.wrapping_sub(1);
                if !skip(table.gfn(), table.is_smm()) && self.zap_table(host, table, &rcu) {
                    zapped = zapped.wrapping_add(1);
                    flush = Flush::pending();
                }
                if host.need_break() {
                    break;
                }
            }
            host.spend(flush, lock);
            drop(rcu);
            if left > 0 {
                lock.relax(host);
            }
        }
        zapped
    }

    fn pop_candidate<'r, H: Host, R: RcuRead>(&self, host: &H, _rcu: &'r R) -> Option<&'r Table> {
        host.with_pages_lock(|| {
            // SAFETY: A table in the list is linked or being removed by someone
            // who waits for the pages lock, so it is freed after a grace period
            // that has not begun.
            let table: &'r Table = unsafe { self.nx_first.load(Ordering::Relaxed).as_ref() }?;
            self.unlist(host, table);
            Some(table)
        })
    }

    /// Unlinks a table found in this RCU section, if it still is linked.
    fn zap_table<H: Host, R: RcuRead>(&self, host: &H, table: &Table, rcu: &R) -> bool {
        let Some(level) = table.level().parent() else {
            return false;
        };
        // By now anything may be in its place, and its parent may be gone, so that
        // it is looked for from the root.
        let which = Which {
            smm: Some(table.is_smm()),
            invalid: true,
        };
        self.any_root_rcu(which, rcu, |root| {
            let range = GfnRange::new(table.gfn(), table.gfn().add(1));
            let mut cursor = Cursor::new(host, rcu, root, range, level);
            while let Some(mut entry) = cursor.next() {
                if entry.level != level {
                    continue;
                }
                while entry.is_nonleaf() && entry.spte.hpa(host.format()) == table.hpa() {
                    match self.try_change(host, true, &mut entry, Spte::NONPRESENT) {
                        Ok(()) => return true,
                        Err(Conflict::Raced) => {}
                        Err(Conflict::Refused) => return false,
                    }
                }
            }
            false
        })
    }
}

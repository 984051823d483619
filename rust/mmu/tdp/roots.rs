// SPDX-License-Identifier: GPL-2.0

//! The roots of a VM: finding, sharing, invalidating, freeing.
//!
//! A singly linked list. Roots enter and leave it under the pages lock and are
//! found under RCU; a root that left keeps its `next_root`, for readers on it. A
//! walk of the list that may yield holds a reference to the root it is at, which
//! keeps that root in the list. So it can always go on from there.

use super::Tdp;
use crate::mmu::{
    host::{Event, Host, TableSource},
    role::Role,
    spte::Spte,
    sync::{
        atomic::{AtomicPtr, Ordering},
        MmuLocked, MmuRead, MmuWrite, RcuRead,
    },
    table::{Table, TablePtr},
    types::Gfn,
};
use core::{ops::Deref, ptr, ptr::NonNull};

/// Which roots a walk of the list is about.
#[derive(Clone, Copy)]
pub(super) struct Which {
    /// One address space only.
    pub(super) smm: Option<bool>,
    /// Invalid roots too.
    pub(super) invalid: bool,
}

impl Which {
    /// The valid roots of an address space.
    pub(super) const fn valid(smm: bool) -> Which {
        Which {
            smm: Some(smm),
            invalid: false,
        }
    }

    #[inline]
    fn matches(self, root: &Table) -> bool {
        self.smm.is_none_or(|smm| smm == root.is_smm()) && (self.invalid || !root.is_invalid())
    }
}

/// A reference to a root.
pub(super) struct RootRef<'t, H: Host> {
    tdp: &'t Tdp,
    host: &'t H,
    root: TablePtr,
}

impl<H: Host> Deref for RootRef<'_, H> {
    type Target = Table;

    #[inline]
    fn deref(&self) -> &Table {
        // SAFETY: The reference keeps the root alive.
        unsafe { self.root.as_ref() }
    }
}

impl<H: Host> Drop for RootRef<'_, H> {
    fn drop(&mut self) {
        self.tdp.put_root(self.host, self.root);
    }
}

/// A walk over roots that holds a reference to the one it is at.
pub(super) struct Roots<'t, H: Host> {
    tdp: &'t Tdp,
    host: &'t H,
    which: Which,
}

impl<'t, H: Host> Roots<'t, H> {
    /// The root after `previous`, or the first. `mmu_lock` is held.
    pub(super) fn after(&self, previous: Option<RootRef<'t, H>>) -> Option<RootRef<'t, H>> {
        let rcu = self.host.rcu_read();
        let mut root = match &previous {
            Some(root) => follow(&root.next_root, &rcu),
            None => follow(&self.tdp.roots, &rcu),
        };
        while let Some(table) = root {
            if self.which.matches(table) && get(table) {
                break;
            }
            root = follow(&table.next_root, &rcu);
        }
        let found = root.map(|table| RootRef {
            tdp: self.tdp,
            host: self.host,
            root: table_ptr(table),
        });
        drop(rcu);
        drop(previous);
        found
    }
}

/// The root a link of the list points to.
#[inline]
fn follow<'r, R: RcuRead>(link: &AtomicPtr<Table>, _rcu: &'r R) -> Option<&'r Table> {
    // SAFETY: Roots are freed a grace period after they left the list, and the
    // link was read in the RCU section `'r`, from the head or a root found in it.
    unsafe { link.load(Ordering::Acquire).as_ref() }
}

/// The pointer to a root or table that someone found.
#[inline]
pub(super) fn table_ptr(table: &Table) -> TablePtr {
    // SAFETY: All tables there are were adopted, and users of the result hold
    // what kept `table` alive: a reference or an RCU section.
    unsafe { TablePtr::from_raw(NonNull::from(table)) }
}

/// Takes a reference unless there is none left.
#[inline]
fn get(root: &Table) -> bool {
    root.refs
        .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |refs| {
            if refs == 0 {
                None
            } else {
                refs.checked_add(1)
            }
        })
        .is_ok()
}

impl Tdp {
    /// A walk over roots with references.
    #[inline]
    pub(super) fn roots<'t, H: Host>(&'t self, host: &'t H, which: Which) -> Roots<'t, H> {
        Roots {
            tdp: self,
            host,
            which,
        }
    }

    /// The first root of `which` in an RCU section that matches and for which
    /// `f` returns true, without taking references.
    pub(super) fn any_root_rcu<R: RcuRead>(
        &self,
        which: Which,
        rcu: &R,
        mut f: impl FnMut(&Table) -> bool,
    ) -> bool {
        let mut root = follow(&self.roots, rcu);
        let mut found = false;
        while let Some(table) = root {
            found |= which.matches(table) && f(table);
            root = follow(&table.next_root, rcu);
        }
        found
    }

    fn find_root<H: Host>(&self, host: &H, role: Role) -> Option<TablePtr> {
        let rcu = host.rcu_read();
        let mut root = follow(&self.roots, &rcu);
        while let Some(table) = root {
            if table.role().word == role.complete().word && !table.is_invalid() && get(table) {
                return Some(table_ptr(table));
            }
            root = follow(&table.next_root, &rcu);
        }
        None
    }

    /// A valid root for `role`, with a reference for the caller; a new one if
    /// there is none. Nothing if a new one is needed and `source` is empty.
    ///
    /// The role's level is that of the root.
    pub fn find_or_alloc_root<H: Host, S: TableSource>(
        &self,
        host: &H,
        _lock: &MmuRead<'_>,
        role: Role,
        source: &mut S,
    ) -> Option<TablePtr> {
        // vCPUs come up together: all but the first find a root without the lock.
        if let Some(root) = self.find_root(host, role) {
            return Some(root);
        }
        host.with_pages_lock(|| {
            if let Some(root) = self.find_root(host, role) {
                return Some(root);
            }
            let root = source.take()?;
            // SAFETY: The source gave the table to us alone.
            unsafe {
                if !S::PREFILLED {
                    root.fill(|_| Spte::NONPRESENT);
                }
                root.prepare(role, Gfn(0));
            }
            // SAFETY: We have the only pointer, and it is prepared.
            let table = unsafe { root.as_ref() };
            host.trace(Event::TableMade(table));
            // One reference is the caller's, one the MMU's own.
            table.refs.store(2, Ordering::Relaxed);
            table
                .next_root
                .store(self.roots.load(Ordering::Relaxed), Ordering::Relaxed);
            self.roots.store(root.as_ptr().as_ptr(), Ordering::Release);
            Some(root)
        })
    }

    /// Takes another reference to a root to which the caller holds one already,
    /// or that it found under `mmu_lock`. False if the root is on its way out.
    pub fn get_root(&self, root: TablePtr) -> bool {
        // SAFETY: The caller's reference, or the lock, keeps the root alive.
        get(unsafe { root.as_ref() })
    }

    /// Drops a reference the caller holds; the last one frees the root.
    pub fn put_root<H: Host>(&self, host: &H, root: TablePtr) {
        // SAFETY: The caller's reference keeps the root alive until it is dropped.
        let table = unsafe { root.as_ref() };
        if table.refs.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        // The MMU's own reference is dropped by a zap after the invalidation.
        if !table.is_invalid() {
            host.bug("rmmu: the last reference to a valid root was dropped");
        }
        host.with_pages_lock(|| self.unlink_root(host, table));
        host.free_table_rcu(root);
    }

    /// Removes a root from the list, under the pages lock.
    fn unlink_root<H: Host>(&self, host: &H, root: &Table) {
        let rcu = host.rcu_read();
        let gone = ptr::from_ref(root).cast_mut();
        let mut link = &self.roots;
        while let Some(table) = follow(link, &rcu) {
            if ptr::eq(table, gone) {
                link.store(table.next_root.load(Ordering::Relaxed), Ordering::Release);
                return;
            }
            link = &table.next_root;
        }
        host.bug("rmmu: a root is missing from the list of roots");
    }

    /// Makes all valid roots invalid: no vCPU will use them again once it looked.
    /// The caller makes vCPUs look before it drops the lock.
    pub fn invalidate_roots<H: Host>(&self, host: &H, _lock: &MmuWrite<'_>) {
        let rcu = host.rcu_read();
        let valid = Which {
            smm: None,
            invalid: false,
        };
        self.any_root_rcu(valid, &rcu, |root| {
            root.zap_scheduled.store(true, Ordering::Relaxed);
            root.invalidate();
            false
        });
    }

    /// Zaps the roots that were invalidated, and drops the MMU's reference to
    /// each. No flush: a vCPU flushes when it takes up a new root, and it can not
    /// be using an invalid one.
    pub fn zap_invalidated_roots<H: Host, L: MmuLocked>(&self, host: &H, lock: &mut L) {
        let roots = self.roots(
            host,
            Which {
                smm: None,
                invalid: true,
            },
        );
        let mut next = roots.after(None);
        while let Some(root) = next {
            if root.zap_scheduled.swap(false, Ordering::AcqRel) {
                if !root.is_invalid() {
                    host.bug("rmmu: a valid root was to be zapped as invalid");
                }
                // The root must be in the list for notifiers until it is empty,
                // hence the MMU's reference goes after the zap.
                self.zap_root(host, lock, &root);
                self.put_root(host, root.root);
            }
            next = roots.after(Some(root));
        }
    }

    /// Drops everything when the VM goes away. Tables are on their way to the
    /// host's RCU callbacks afterwards; wait for those.
    pub fn uninit<H: Host>(&self, host: &H, lock: &mut MmuWrite<'_>) {
        self.invalidate_roots(host, lock);
        self.zap_invalidated_roots(host, lock);
        if !self.is_empty() {
            host.bug("rmmu: a root has references although its VM is gone");
        }
    }

    /// Tells `f` about every root, the invalid ones too. The pointer is good for
    /// calls of this MMU made from `f`.
    pub fn visit_roots<H: Host, L: MmuLocked>(
        &self,
        host: &H,
        _lock: &L,
        mut f: impl FnMut(TablePtr, Role, bool),
    ) {
        let roots = self.roots(
            host,
            Which {
                smm: None,
                invalid: true,
            },
        );
        let mut next = roots.after(None);
        while let Some(root) = next {
            f(root.root, root.role(), root.is_invalid());
            next = roots.after(Some(root));
        }
    }
}

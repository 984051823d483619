// SPDX-License-Identifier: GPL-2.0

//! The TDP MMU: page tables that map guest frames directly, by EPT or NPT.
//!
//! # Who may do what
//!
//! Under `mmu_lock` for **read** many threads change the tables at once. An entry
//! is then changed by compare-exchange only: whoever loses looks again, or sends
//! its vCPU back to fault again. Under `mmu_lock` for **write** nobody else
//! installs or removes anything, but three still change bits of an entry without
//! any lock, so that entries that have such bits are swapped, never stored to:
//! hardware sets accessed and dirty bits, the fast fault path makes an entry
//! writable or accessible again, aging makes it old.
//!
//! # How a table dies
//!
//! The entry that points to it is replaced first; whoever did that owns the
//! subtree. It freezes every entry in it, under the shared lock by a swap, so that
//! a fault that is still on its way into the subtree finds
//! [`FROZEN`](crate::mmu::Spte::FROZEN) and gives up. Tables are freed after an RCU
//! grace period: walks hold RCU, and so does whoever still owes a TLB flush for
//! the removal, since hardware walks tables too. No walk leaves its RCU section
//! with such a flush outstanding.
//!
//! # Roots
//!
//! A root lives as long as it has references. The MMU itself holds one until the
//! root was invalidated and zapped; vCPUs hold one each, and so does every walk
//! that may yield. Invalidating needs the write lock, so under the read lock a
//! valid root stays valid. Notifiers must find all memory that is mapped, hence a
//! root is in the list until its last reference is gone. Whoever drops that frees
//! it.
//!
//! # Files
//!
//! - `walk`: the pre-order walk, yielding included
//! - `change`: the one place where entries change, and the accounting
//! - `roots`: the list of roots
//! - `fault`, `fast`: the two fault paths; aging is next to the second
//! - `around`: pages mapped ahead, next to one that faulted
//! - `zap`, `dirty`, `huge`, `nx`: what KVM asks for
//! - `inspect`: looking without touching
//! - `audit`: looking whether everything fits together

mod around;
mod audit;
mod change;
mod dirty;
mod fast;
mod fault;
mod huge;
mod inspect;
mod nx;
mod roots;
mod walk;
mod zap;

pub use around::{Around, Neighbour};
pub use fast::{fast_fix, FastFix, FastOutcome, FAST_TRIES};
pub use fault::{Fault, Outcome};
#[cfg(not(MODULE))]
pub use huge::NoMemory;

use crate::mmu::{
    sync::atomic::{AtomicPtr, AtomicU64, Ordering},
    table::Table,
};
use core::ptr;

/// The TDP MMU of a VM.
#[derive(Debug)]
pub struct Tdp {
    /// First root. Linked and unlinked under the pages lock, walked under RCU.
    roots: AtomicPtr<Table>,
    /// The list of NX candidates, oldest first; under the pages lock.
    nx_first: AtomicPtr<Table>,
    nx_last: AtomicPtr<Table>,
    nx_count: AtomicU64,
}

impl Tdp {
    /// An MMU without any root.
    pub fn new() -> Tdp {
        Tdp {
            roots: AtomicPtr::new(ptr::null_mut()),
            nx_first: AtomicPtr::new(ptr::null_mut()),
            nx_last: AtomicPtr::new(ptr::null_mut()),
            nx_count: AtomicU64::new(0),
        }
    }

    /// There is no root.
    pub fn is_empty(&self) -> bool {
        self.roots.load(Ordering::Acquire).is_null()
    }

    /// How many tables could be replaced by an NX huge page.
    pub fn nx_candidates(&self) -> u64 {
        self.nx_count.load(Ordering::Relaxed)
    }
}

impl Default for Tdp {
    fn default() -> Self {
        Tdp::new()
    }
}

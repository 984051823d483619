// SPDX-License-Identifier: GPL-2.0

//! Proofs of locks, and flushes that are still owed.
//!
//! A function that needs a lock takes a token of it. Tokens are made where the
//! lock is taken, in code that knows the lock, and can not outlive it. A function
//! that may yield takes the token by `&mut`, because while it yields nobody may
//! rely on the lock; what the caller knew before is stale afterwards.
//!
//! A [`Flush`] is a TLB flush that a change of entries made necessary and that
//! has not been done. It must be spent before the lock drops and before the RCU
//! section ends if a table was unlinked.

pub mod atomic;

use crate::mmu::host::Host;
use core::marker::PhantomData;

/// Cells of which locks are in charge. Loom's notice when two threads use one at a time.
pub mod cell {
    #[cfg(not(feature = "loom"))]
    pub use core::cell::Cell;
    #[cfg(feature = "loom")]
    pub use loom::cell::Cell;
}

/// Proof that `mmu_lock` is held for read by this thread.
#[derive(Debug)]
pub struct MmuRead<'a> {
    // Raw pointer: a lock is held by a thread, so the token stays on it.
    _lock: PhantomData<(&'a (), *mut ())>,
}

impl MmuRead<'_> {
    /// Makes the proof.
    ///
    /// # Safety
    ///
    /// This thread holds `mmu_lock` for read as long as the token lives.
    #[inline]
    pub unsafe fn assume_held() -> Self {
        MmuRead { _lock: PhantomData }
    }
}

/// Proof that `mmu_lock` is held for write by this thread.
#[derive(Debug)]
pub struct MmuWrite<'a> {
    _lock: PhantomData<(&'a (), *mut ())>,
}

impl MmuWrite<'_> {
    /// Makes the proof.
    ///
    /// # Safety
    ///
    /// This thread holds `mmu_lock` for write as long as the token lives, or
    /// nobody else can reach the MMU any more.
    #[inline]
    pub unsafe fn assume_held() -> Self {
        MmuWrite { _lock: PhantomData }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::MmuRead<'_> {}
    impl Sealed for super::MmuWrite<'_> {}
}

/// `mmu_lock` is held, one way or the other.
pub trait MmuLocked: sealed::Sealed {
    /// Others may change entries at the same time.
    const SHARED: bool;

    /// Drops the lock for whoever waits for it and takes it again.
    fn relax<H: Host>(&mut self, host: &H);

    /// Runs `f` without the lock.
    fn unlocked<H: Host, R>(&mut self, host: &H, f: impl FnOnce() -> R) -> R;
}

impl MmuLocked for MmuRead<'_> {
    const SHARED: bool = true;

    #[inline]
    fn relax<H: Host>(&mut self, host: &H) {
        host.relax_read(self);
    }

    #[inline]
    fn unlocked<H: Host, R>(&mut self, host: &H, f: impl FnOnce() -> R) -> R {
        host.unlock_relock_read(self, f)
    }
}

impl MmuLocked for MmuWrite<'_> {
    const SHARED: bool = false;

    #[inline]
    fn relax<H: Host>(&mut self, host: &H) {
        host.relax_write(self);
    }

    #[inline]
    fn unlocked<H: Host, R>(&mut self, host: &H, f: impl FnOnce() -> R) -> R {
        host.unlock_relock_write(self, f)
    }
}

/// A guard of an RCU read-side critical section.
///
/// # Safety
///
/// As long as a value of the type lives, a table that was handed to
/// [`Host::free_table_rcu`] after the value was made is not freed.
pub unsafe trait RcuRead {}

/// A TLB flush that is perhaps owed.
#[must_use = "a pending TLB flush must be spent before the lock drops"]
#[derive(Debug)]
pub struct Flush {
    pending: bool,
}

impl Flush {
    /// Nothing is owed.
    #[inline]
    pub const fn none() -> Flush {
        Flush { pending: false }
    }

    /// A flush is owed.
    #[inline]
    pub const fn pending() -> Flush {
        Flush { pending: true }
    }

    /// A flush is owed if `pending`.
    #[inline]
    pub const fn when(pending: bool) -> Flush {
        Flush { pending }
    }

    /// What is owed when both are.
    #[inline]
    pub fn merge(self, other: Flush) -> Flush {
        Flush {
            pending: self.pending | other.pending,
        }
    }

    /// Whether a flush is owed.
    #[inline]
    pub const fn needed(&self) -> bool {
        self.pending
    }
}

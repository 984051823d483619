// SPDX-License-Identifier: GPL-2.0

//! `mmu_lock` and RCU as guards; each carries the engine's token of the lock.

use crate::{
    kvm::{bindings, vm::Kvm},
    mmu::sync::{MmuRead, MmuWrite, RcuRead},
};

/// `mmu_lock` held for read.
pub struct ReadGuard<'a> {
    kvm: &'a Kvm,
    token: MmuRead<'a>,
}

impl<'a> ReadGuard<'a> {
    pub(super) fn new(kvm: &'a Kvm) -> Self {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_read_lock(kvm.as_ptr()) };
        // SAFETY: the lock was just taken, and is dropped with the guard that holds the token.
        let token = unsafe { MmuRead::assume_held() };
        ReadGuard { kvm, token }
    }

    /// The engine's proof of the lock.
    pub fn token(&mut self) -> &mut MmuRead<'a> {
        &mut self.token
    }

    /// The same for those who do not let go of it.
    pub fn held(&self) -> &MmuRead<'a> {
        &self.token
    }
}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: taken in `new`.
        unsafe { bindings::rmmu_read_unlock(self.kvm.as_ptr()) }
    }
}

/// `mmu_lock` held for write.
pub struct WriteGuard<'a> {
    kvm: &'a Kvm,
    token: MmuWrite<'a>,
}

impl<'a> WriteGuard<'a> {
    pub(super) fn new(kvm: &'a Kvm) -> Self {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_write_lock(kvm.as_ptr()) };
        // SAFETY: the lock was just taken, and is dropped with the guard that holds the token.
        let token = unsafe { MmuWrite::assume_held() };
        WriteGuard { kvm, token }
    }

    /// The engine's proof of the lock.
    pub fn token(&mut self) -> &mut MmuWrite<'a> {
        &mut self.token
    }

    /// The same for those who do not let go of it.
    pub fn held(&self) -> &MmuWrite<'a> {
        &self.token
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: taken in `new`.
        unsafe { bindings::rmmu_write_unlock(self.kvm.as_ptr()) }
    }
}

/// A guard of `mmu_lock`, held one way or the other.
pub trait HeldLock {}
impl HeldLock for ReadGuard<'_> {}
impl HeldLock for WriteGuard<'_> {}

/// Proof of a lock that KVM took before it called us.
///
/// # Safety
///
/// KVM holds the VM's `mmu_lock` for write until the token is dropped.
pub(crate) unsafe fn held_for_write<'a>(kvm: &'a Kvm) -> MmuWrite<'a> {
    kvm.assert_mmu_locked_for_write();
    // SAFETY: the caller's promise.
    unsafe { MmuWrite::assume_held() }
}

/// An RCU read-side critical section.
pub struct RcuGuard(());

impl RcuGuard {
    /// Enters the section.
    pub fn new() -> Self {
        // SAFETY: no precondition; left in `drop`.
        unsafe { bindings::rmmu_rcu_read_lock() };
        RcuGuard(())
    }
}

impl Drop for RcuGuard {
    fn drop(&mut self) {
        // SAFETY: entered in `new`.
        unsafe { bindings::rmmu_rcu_read_unlock() }
    }
}

// SAFETY: tables are freed by call_rcu(), which waits for every section that was entered before.
unsafe impl RcuRead for RcuGuard {}

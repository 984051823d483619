// SPDX-License-Identifier: GPL-2.0

//! Dirty logging, and the huge pages it splits and gives back.
//!
//! Without a hardware log, a page is clean when its 4K entry is write-protected: the first write faults and is logged.
//! With one (PML), clean means that the dirty bit is clear. Flushes are KVM's: it flushes the slot after it has
//! write-protected it or collected its log.

use super::Vm;
use crate::{
    kvm::{param, Kvm, Slot},
    mmu::{
        sync::{MmuLocked, MmuWrite},
        types::{Gfn, GfnRange, Level},
    },
};

impl Vm {
    /// Write-protects leaves of a slot from `level` up; `kvm_mmu_slot_remove_write_access()`. KVM flushes.
    pub fn write_protect_slot(&self, kvm: &Kvm, slot: &Slot, level: Level) {
        let host = self.host();
        let mut lock = kvm.read_lock();
        let flush =
            self.tdp
                .write_protect_slot(&host, lock.token(), slot.smm(), slot.range(), level);
        // The caller flushes the slot unconditionally, after it has dropped mmu_lock: no vCPU relies on the log before.
        drop(flush);
    }

    /// Write-protects a frame for good; `kvm_mmu_slot_gfn_write_protect()`. Returns whether the caller must flush.
    pub fn write_protect_gfn(
        &self,
        _kvm: &Kvm,
        lock: &MmuWrite<'_>,
        slot: &Slot,
        gfn: Gfn,
        level: Level,
    ) -> bool {
        let flush = self
            .tdp
            .write_protect_gfn(&self.host(), lock, slot.smm(), gfn, level);
        flush.needed()
    }

    /// Makes the frames of `mask` clean; `kvm_arch_mmu_enable_log_dirty_pt_masked()`. KVM flushes.
    pub fn log_dirty_masked(
        &self,
        kvm: &Kvm,
        lock: &mut MmuWrite<'_>,
        slot: &Slot,
        offset: u64,
        mask: u64,
    ) {
        if mask == 0 {
            return;
        }
        let base = slot.range().start.add(offset);
        if kvm.dirty_log_initially_set() {
            // Huge pages were left writable when logging began; the ones under the mask are split or protected now.
            let first = base.add(mask.trailing_zeros().into());
            let last = base.add(63u64.wrapping_sub(mask.leading_zeros().into()));
            if param::eager_page_split() {
                self.split_locked(
                    kvm,
                    lock,
                    slot,
                    GfnRange::new(first, last.add(1)),
                    Level::L4K,
                );
            }
            let host = self.host();
            let mut flush = self
                .tdp
                .write_protect_gfn(&host, lock, slot.smm(), first, Level::L2M);
            if first.round_down(Level::L2M) != last.round_down(Level::L2M) {
                flush = flush.merge(self.tdp.write_protect_gfn(
                    &host,
                    lock,
                    slot.smm(),
                    last,
                    Level::L2M,
                ));
            }
            drop(flush);
        }
        let by_protection = !self.format.pml;
        self.tdp
            .clear_dirty_masked(&self.host(), lock, slot.smm(), base, mask, by_protection);
    }

    /// Clears the dirty bits of a slot; `kvm_mmu_slot_leaf_clear_dirty()`. KVM flushes.
    pub fn clear_dirty_slot(&self, kvm: &Kvm, slot: &Slot) {
        let mut lock = kvm.read_lock();
        self.tdp
            .clear_dirty_range(&self.host(), lock.token(), slot.smm(), slot.range());
    }

    /// Splits huge pages of a range; `kvm_mmu_try_split_huge_pages()`.
    ///
    /// Out of memory ends it early: what stays huge is split by the fault that writes to it.
    pub fn split_locked<L: MmuLocked>(
        &self,
        _kvm: &Kvm,
        lock: &mut L,
        slot: &Slot,
        range: GfnRange,
        level: Level,
    ) {
        let _ = self
            .tdp
            .split_huge(&self.host(), lock, slot.smm(), range, level);
    }

    /// The same for a whole slot; `kvm_mmu_slot_try_split_huge_pages()`.
    pub fn split_slot(&self, kvm: &Kvm, slot: &Slot, level: Level) {
        let mut lock = kvm.read_lock();
        self.split_locked(kvm, lock.token(), slot, slot.range(), level);
    }

    /// One turn of the VM's NX recovery task; `kvm_nx_huge_page_recovery_worker()`. Returns whether there was work.
    ///
    /// A table that is there only because its huge page must not be executable is zapped after a while: if the guest does
    /// not execute there any more, the page comes back huge.
    pub fn nx_recovery_turn(&self, kvm: &Kvm) -> bool {
        let Some(recovery) = param::nx_recovery() else {
            return false;
        };
        if kvm.nx_wait(recovery.period_ms) {
            return true;
        }
        let candidates = self.tdp.nx_candidates();
        let budget = candidates
            .wrapping_add(u64::from(recovery.ratio).wrapping_sub(1))
            .checked_div(recovery.ratio.into())
            .unwrap_or(0);
        kvm.with_srcu(|| {
            let mut lock = kvm.read_lock();
            self.tdp
                .recover_nx(&self.host(), lock.token(), budget, |gfn, smm| {
                    kvm.gfn_dirty_tracked(smm, gfn.0)
                });
        });
        kvm.nx_done();
        true
    }

    /// Maps huge pages again where slot and host allow it; `kvm_mmu_recover_huge_pages()`.
    pub fn recover_huge(&self, kvm: &Kvm, slot: &Slot) {
        let host = self.host();
        let limit = param::max_huge_level();
        let mut lock = kvm.read_lock();
        self.tdp
            .recover_huge(&host, lock.token(), slot.smm(), slot.range(), |gfn| {
                slot.max_mapping_level(kvm, gfn, limit)
            });
    }
}

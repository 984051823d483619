// SPDX-License-Identifier: GPL-2.0

//! Dirty logging, and the huge pages it splits and gives back.
//!
//! Without a hardware log, a page is clean when its 4K entry is write-protected: the first write faults and is logged.
//! With one (PML), clean means that the dirty bit is clear. Flushes are KVM's: it flushes the slot after it has
//! write-protected it or collected its log.

use super::Vm;
use crate::{
    kvm::{param, shadow::SplitCache, Kvm, Slot},
    mmu::{
        sync::{Flush, MmuWrite},
        types::{Gfn, GfnRange, Level},
    },
};

impl Vm {
    /// Write-protects leaves of a slot from `level` up; `kvm_mmu_slot_remove_write_access()`. KVM flushes.
    pub fn write_protect_slot(&self, kvm: &Kvm, slot: &Slot, level: Level) {
        let host = self.host();
        // The caller flushes the slot unconditionally, after it has dropped mmu_lock: no vCPU relies on the log before.
        if self.has_shadow_roots() {
            let mut lock = kvm.write_lock();
            drop(
                self.shadow
                    .write_protect_slot(&host, lock.token(), slot, level),
            );
        }
        let mut lock = kvm.read_lock();
        let flush =
            self.tdp
                .write_protect_slot(&host, lock.token(), slot.smm(), slot.range(), level);
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
        self.protect_gfn(lock, slot, gfn, level).needed()
    }

    fn protect_gfn(&self, lock: &MmuWrite<'_>, slot: &Slot, gfn: Gfn, level: Level) -> Flush {
        let host = self.host();
        let flush = self
            .tdp
            .write_protect_gfn(&host, lock, slot.smm(), gfn, level);
        if !self.has_shadow_roots() {
            return flush;
        }
        flush.merge(self.shadow.write_protect_gfn(&host, lock, slot, gfn, level))
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
            let mut flush = self.protect_gfn(lock, slot, first, Level::L2M);
            if first.round_down(Level::L2M) != last.round_down(Level::L2M) {
                flush = flush.merge(self.protect_gfn(lock, slot, last, Level::L2M));
            }
            drop(flush);
        }
        let by_protection = self.kvm.cpu_dirty_log_size() == 0;
        let host = self.host();
        self.tdp
            .clear_dirty_masked(&host, lock, slot.smm(), base, mask, by_protection);
        if self.has_shadow_roots() {
            self.shadow
                .clear_dirty_masked(&host, lock, slot, base, mask, by_protection);
        }
    }

    /// Clears the dirty bits of a slot; `kvm_mmu_slot_leaf_clear_dirty()`. KVM flushes.
    pub fn clear_dirty_slot(&self, kvm: &Kvm, slot: &Slot) {
        let host = self.host();
        if self.has_shadow_roots() {
            let mut lock = kvm.write_lock();
            drop(self.shadow.clear_dirty_slot(&host, lock.token(), slot));
        }
        let mut lock = kvm.read_lock();
        self.tdp
            .clear_dirty_range(&host, lock.token(), slot.smm(), slot.range());
    }

    /// Splits huge pages of a range; `kvm_mmu_try_split_huge_pages()`. KVM holds slots_lock.
    ///
    /// Out of memory ends it early: what stays huge is split by the fault that writes to it.
    pub fn split_locked(
        &self,
        kvm: &Kvm,
        lock: &mut MmuWrite<'_>,
        slot: &Slot,
        range: GfnRange,
        level: Level,
    ) {
        if !param::tdp_mmu() {
            return;
        }
        self.split_nested(kvm, lock, slot, range, level);
        let _ = self
            .tdp
            .split_huge(&self.host(), lock, slot.smm(), range, level);
    }

    /// The same for what maps memory of nested guests. Direct pages of the shadow MMU are split by faults, as in-tree does.
    fn split_nested(
        &self,
        kvm: &Kvm,
        lock: &mut MmuWrite<'_>,
        slot: &Slot,
        range: GfnRange,
        level: Level,
    ) {
        if self.has_shadow_roots() {
            let mut caches = SplitCache(kvm);
            let _ = self
                .shadow
                .split_huge(&self.host(), lock, &mut caches, slot, range, level);
        }
    }

    /// The same for a whole slot; `kvm_mmu_slot_try_split_huge_pages()`. KVM holds slots_lock.
    pub fn split_slot(&self, kvm: &Kvm, slot: &Slot, level: Level) {
        if !param::tdp_mmu() {
            return;
        }
        let range = slot.range();
        if self.has_shadow_roots() {
            let mut lock = kvm.write_lock();
            self.split_nested(kvm, lock.token(), slot, range, level);
        }
        let mut lock = kvm.read_lock();
        let _ = self
            .tdp
            .split_huge(&self.host(), lock.token(), slot.smm(), range, level);
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
        let budget = |candidates: u64| {
            candidates
                .wrapping_add(u64::from(recovery.ratio).wrapping_sub(1))
                .checked_div(recovery.ratio.into())
                .unwrap_or(0)
        };
        let skip = |gfn: Gfn, smm| kvm.gfn_dirty_tracked(smm, gfn.0);
        kvm.with_srcu(|| {
            let of_shadow = budget(self.shadow.nx_candidates());
            if of_shadow != 0 {
                let mut lock = kvm.write_lock();
                self.shadow
                    .recover_nx(&self.host(), lock.token(), of_shadow, skip);
            }
            let of_tdp = budget(self.tdp.nx_candidates());
            let mut lock = kvm.read_lock();
            self.tdp
                .recover_nx(&self.host(), lock.token(), of_tdp, skip);
        });
        kvm.nx_done();
        true
    }

    /// Maps huge pages again where slot and host allow it; `kvm_mmu_recover_huge_pages()`.
    pub fn recover_huge(&self, kvm: &Kvm, slot: &Slot) {
        let host = self.host();
        let limit = param::max_huge_level();
        let level_of = |gfn| slot.max_mapping_level(kvm, gfn, limit);
        if self.has_shadow_roots() {
            let mut lock = kvm.write_lock();
            self.shadow
                .recover_huge(&host, lock.token(), slot, level_of);
        }
        let mut lock = kvm.read_lock();
        self.tdp
            .recover_huge(&host, lock.token(), slot.smm(), slot.range(), level_of);
    }
}

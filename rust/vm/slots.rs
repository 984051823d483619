// SPDX-License-Identifier: GPL-2.0

//! Memory slots, the mmu notifier, and zapping.

use super::Vm;
use crate::{
    kvm::{Kvm, Slot},
    mmu::{
        host::Host,
        spte::Spte,
        sync::{Flush, MmuWrite},
        types::GfnRange,
    },
};

impl Vm {
    /// The host unmaps pages; `kvm_unmap_gfn_range()`. Returns whether the caller must flush.
    pub fn unmap(
        &self,
        kvm: &Kvm,
        lock: &mut MmuWrite<'_>,
        range: GfnRange,
        slot: &Slot,
        may_block: bool,
    ) -> bool {
        let flush = self.tdp.unmap_range_in(
            &self.host(),
            lock,
            slot.smm(),
            range,
            may_block,
            Flush::none(),
        );
        if slot.is_apic_access_page() {
            kvm.request_apic_page_reload();
        }
        // KVM flushes, once for all ranges of the event.
        flush.needed()
    }

    /// Whether pages of the range were used; `kvm_age_gfn()`, `kvm_test_age_gfn()`. No lock is held.
    pub fn age(&self, _kvm: &Kvm, range: GfnRange, slot: &Slot, test_only: bool) -> bool {
        self.tdp.age_in(&self.host(), slot.smm(), range, test_only)
    }

    /// Drops every mapping; `kvm_arch_flush_shadow_all()`. No vCPU will run again.
    pub fn zap_all(&self, kvm: &Kvm) {
        let mut lock = kvm.write_lock();
        self.tdp.zap_all(&self.host(), lock.token());
    }

    /// A slot is deleted or moved; `kvm_arch_flush_shadow_memslot()`.
    pub fn flush_slot(&self, kvm: &Kvm, slot: &Slot) {
        if kvm.slot_zap_all() {
            return self.zap_all_fast(kvm);
        }
        let mut lock = kvm.write_lock();
        if self.unmap(kvm, lock.token(), slot.range(), slot, true) {
            kvm.flush_remote_tlbs();
        }
    }

    /// Zaps a range in both address spaces; `kvm_zap_gfn_range()`. Faults that race with it retry.
    pub fn zap_range(&self, kvm: &Kvm, range: GfnRange) {
        if range.is_empty() {
            return;
        }
        let mut lock = kvm.write_lock();
        kvm.invalidating(&mut lock, range.start.0, range.end.0, |lock| {
            let host = self.host();
            let flush = self
                .tdp
                .zap_leafs(&host, lock.token(), range, Flush::none());
            host.spend_range(flush, range, lock.token());
        });
    }

    /// The slots' generation moves on; `kvm_mmu_invalidate_mmio_sptes()`.
    ///
    /// An MMIO entry carries the low bits of the generation it was made in, and is stale in any other. When those bits
    /// wrap, entries of an old generation would look current, so everything goes. The lowest bits tell address spaces
    /// apart.
    pub fn new_generation(&self, kvm: &Kvm, generation: u64) {
        if !self.format.mmio_caching {
            return;
        }
        let spaces = u64::from(kvm.address_spaces());
        if generation & Spte::MMIO_GEN_MASK & !spaces.wrapping_sub(1) == 0 {
            self.zap_all_fast(kvm);
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Memory slots, the mmu notifier, and zapping.

use super::Vm;
use crate::{
    kvm::{param, Kvm, Slot},
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
        let host = self.host();
        let mut flush = Flush::none();
        if self.has_shadow_roots() {
            flush = self
                .shadow
                .unmap_range(&host, lock, slot, range, may_block, flush);
        }
        let flush = self
            .tdp
            .unmap_range(&host, lock, Some(slot.smm()), range, may_block, flush);
        if slot.is_apic_access_page() {
            kvm.request_apic_page_reload();
        }
        // KVM flushes, once for all ranges of the event.
        flush.needed()
    }

    /// Whether pages of the range were used; `kvm_age_gfn()`, `kvm_test_age_gfn()`. No lock is held.
    pub fn age(&self, kvm: &Kvm, range: GfnRange, slot: &Slot, test_only: bool) -> bool {
        let host = self.host();
        let young = self.tdp.age(&host, Some(slot.smm()), range, test_only);
        // With the TDP MMU in use, only tables of nested hypervisors have shadow pages that map anything.
        let may_have = host.tdp.is_none() || self.shadow.indirect_pages() != 0;
        if (young && test_only) || !may_have || !self.has_shadow_roots() {
            return young;
        }
        let mut lock = kvm.write_lock();
        young | self.shadow.age(&host, lock.token(), slot, range, test_only)
    }

    /// There is, or was, a shadow root, so that slots have reverse maps.
    pub(super) fn has_shadow_roots(&self) -> bool {
        self.kvm.has_slot_metadata()
    }

    /// Drops every mapping; `kvm_arch_flush_shadow_all()`. No vCPU will run again.
    pub fn zap_all(&self, kvm: &Kvm) {
        if param::audit_at_end() {
            self.audit();
        }
        let mut lock = kvm.write_lock();
        let host = self.host();
        self.shadow.zap_all(&host, lock.token());
        self.tdp.zap_all(&host, lock.token());
    }

    /// A slot is deleted or moved; `kvm_arch_flush_shadow_memslot()`.
    pub fn flush_slot(&self, kvm: &Kvm, slot: &Slot) {
        if kvm.slot_zap_all() {
            return self.zap_all_fast(kvm);
        }
        let mut lock = kvm.write_lock();
        let flush = self.unmap(kvm, lock.token(), slot.range(), slot, true);
        // Counts of shadow pages are in the slot, so that the pages must go before it does.
        self.shadow
            .zap_slot_pages(&self.host(), lock.token(), slot, Flush::when(flush));
    }

    /// Zaps a range in both address spaces; `kvm_zap_gfn_range()`. Faults that race with it retry.
    pub fn zap_range(&self, kvm: &Kvm, range: GfnRange) {
        if range.is_empty() {
            return;
        }
        // Some callers hold neither slots_lock nor SRCU, and slots are looked at below.
        kvm.with_srcu(|| self.zap_range_of_slots(kvm, range));
    }

    fn zap_range_of_slots(&self, kvm: &Kvm, range: GfnRange) {
        let mut lock = kvm.write_lock();
        kvm.invalidating(&mut lock, range.start.0, range.end.0, |lock| {
            let host = self.host();
            let mut flush = Flush::none();
            if self.has_shadow_roots() {
                kvm.for_each_slot(range, |slot| {
                    let owed = core::mem::replace(&mut flush, Flush::none());
                    let part = range.intersect(slot.range());
                    flush = self
                        .shadow
                        .unmap_range(&host, lock.token(), slot, part, true, owed);
                });
            }
            let flush = self.tdp.zap_leafs(&host, lock.token(), range, flush);
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

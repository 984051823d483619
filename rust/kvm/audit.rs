// SPDX-License-Identifier: GPL-2.0

//! KVM as the audit's [`AuditHost`].

use crate::{
    kvm::{bindings, host::KvmHost, slot::Slot, table},
    mmu::{
        shadow::AuditHost,
        table::offset,
        types::{Gfn, Hpa, Level},
    },
};

impl AuditHost for KvmHost<'_> {
    fn claimed_header(&self, entries: u64) -> Option<(u64, Gfn)> {
        let mut gfn = 0u64;
        // SAFETY: any address will do, and `gfn` is a word to write to.
        let header =
            unsafe { bindings::rmmu_claimed_header(entries as usize, offset::GFN, &mut gfn) };
        (!header.is_null()).then(|| (header.addr() as u64, Gfn(gfn)))
    }

    fn address_of(&self, hpa: Hpa) -> u64 {
        table::entries_at(hpa).addr().get() as u64
    }

    fn lpage_count(&self, slot: &Slot, gfn: Gfn, level: Level) -> Option<(i64, i64)> {
        // The memory of a guest_memfd is aligned by its offset in the file, not by an address.
        (!slot.gmem_only()).then(|| {
            let at_first = slot.lpage_count_at_first(gfn, level);
            (slot.lpage_count(gfn, level).into(), at_first.into())
        })
    }

    fn write_track_count(&self, slot: &Slot, gfn: Gfn) -> Option<i64> {
        slot.write_track_count(gfn).map(i64::from)
    }

    fn others_track_writes(&self) -> bool {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_others_track_writes(self.kvm.as_ptr()) }
    }

    fn is_smm_slot(&self, slot: &Slot) -> bool {
        slot.smm()
    }
}

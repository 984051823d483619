// SPDX-License-Identifier: GPL-2.0

//! What backs a frame of the guest: a page of the host's, looked up before any lock, or nothing; and how high it may be mapped.

use super::{
    fault::{Access, Handled},
    Vm,
};
use crate::{
    kvm::{
        page::{self, HostPage, HostWindow, Lookup, MappedPage, NoPage, WindowPlace},
        param, trace,
        vcpu::Vcpu,
        Slot,
    },
    mmu::{
        sync::MmuLocked,
        tdp::Fault,
        types::{Gfn, GfnRange, Level, Pfn},
    },
};
use kernel::prelude::*;

/// What backs a frame.
pub(super) enum Backing<'s> {
    /// The host's page, which was looked up after the count of invalidations.
    Page {
        slot: &'s Slot,
        page: HostPage,
        seq: usize,
    },
    /// Nothing: an MMIO entry is to be installed.
    Mmio,
}

impl Vm {
    /// What backs the frame; or how the fault ends without that. Sleeps.
    ///
    /// An access to no memory is remembered, with the guest virtual address (0 if the fault has none) and what the guest's
    /// tables allow.
    #[inline(always)]
    pub(super) fn back<'s>(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: Option<&'s Slot>,
        gva: u64,
        allowed: u8,
    ) -> Result<Backing<'s>, Result<Handled>> {
        let seq = self.kvm.invalidate_seq();
        let mmio = || {
            let allowed = u64::from(allowed) & self.format.mmio_access_mask;
            vcpu.mmio_cache(gva, access.gfn, allowed);
            // Entries for addresses the host does not have are impossible.
            if !self.format.mmio_caching || access.gfn > self.format.max_gfn {
                return Err(Ok(Handled::Mmio));
            }
            Ok(Backing::Mmio)
        };
        let Some(slot) = slot else {
            return mmio();
        };
        if slot.invalid() {
            // On its way out; the slots that follow are not there yet.
            return Err(if access.prefetch {
                Err(EAGAIN)
            } else {
                Ok(Handled::Retry)
            });
        }
        if slot.is_apic_access_page() {
            // A nested guest has no APIC page of its own, and without APICv the page is a device.
            if vcpu.guest_mode() {
                return mmio();
            }
            if !self.kvm.apicv_activated() {
                return Err(Ok(Handled::Mmio));
            }
        }
        if self.kvm.invalidate_retry_hint(seq, access.gfn.0) {
            return Err(Ok(Handled::Retry));
        }
        let page = self.fault_in(vcpu, access, slot)?;
        if self.kvm.invalidate_retry_hint(seq, access.gfn.0) {
            page.release_unused();
            return Err(Ok(Handled::Retry));
        }
        Ok(Backing::Page { slot, page, seq })
    }

    /// The page in the host's own page table, if it is there in a way that is for us to judge: the level at which the host
    /// maps it, the page, and what of `range` is around it.
    #[inline(always)]
    pub(super) fn look<'l, L: MmuLocked>(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &Slot,
        range: GfnRange,
        lock: &'l L,
        place: &'l mut WindowPlace,
    ) -> Option<(Level, MappedPage, HostWindow<'l>)> {
        let (gfn, write) = (access.gfn, access.write);
        let window = HostWindow::look(self.kvm, slot, gfn, range, write, lock, place)?;
        self.looked(vcpu, window.level.is_some());
        Some((window.level?, window.page(gfn)?, window))
    }

    /// The host's page; or how the fault ends without one.
    fn fault_in(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &Slot,
    ) -> Result<HostPage, Result<Handled>> {
        if slot.gmem_only() {
            return HostPage::fault_in_gmem(self.kvm, slot, access.gfn).map_err(|no_page| {
                vcpu.memory_fault_exit(access.gfn, access.write, access.exec);
                Err(match no_page {
                    NoPage::Error(errno) => Error::from_errno(errno),
                    _ => EFAULT,
                })
            });
        }
        let lookup = |nowait| {
            HostPage::fault_in(
                slot,
                access.gfn,
                Lookup {
                    write: access.write,
                    nowait,
                },
            )
        };
        let mut page = lookup(true);
        if matches!(page, Err(NoPage::NeedsIo)) {
            if !access.prefetch && vcpu.can_do_async_pf() {
                trace::try_async_get_page(access.address, access.gfn);
                if vcpu.async_pf_pending(access.gfn) {
                    trace::async_pf_repeated_fault(access.address, access.gfn);
                    vcpu.request_apf_halt();
                    return Err(Ok(Handled::Retry));
                }
                let root = (!vcpu.mmu().direct()).then(|| vcpu.guest_root());
                if vcpu.setup_async_pf(access.address, access.gfn, access.error_code, root) {
                    return Err(Ok(Handled::Retry));
                }
            }
            page = lookup(false);
        }
        page.map_err(|no_page| match no_page {
            NoPage::Signal => {
                vcpu.signal_exit();
                Err(EINTR)
            }
            // A write to read-only memory of the host is emulated, which ends in KVM_EXIT_MMIO.
            NoPage::ReadOnly => Ok(Handled::Emulate),
            NoPage::Poisoned => {
                page::signal_poison(slot, access.gfn);
                Ok(Handled::Retry)
            }
            NoPage::NeedsIo => Err(EFAULT),
            NoPage::Error(errno) => Err(Error::from_errno(errno)),
        })
    }

    /// The slot, if the host's page table may be looked at for its pages.
    ///
    /// That is done under the lock, when nothing in the table can be taken away. It saves what it takes to rely on a page
    /// that was looked up earlier: a reference, the count of invalidations and its barriers, and marking the page. A page is
    /// dirty in the host's table already if it is mapped writable here. It need not be marked as accessed either: reclaim
    /// asks the notifier, which finds the accessed bit of the entry; hence this is for formats that have one.
    #[inline]
    pub(super) fn may_be_resident<'s>(&self, slot: Option<&'s Slot>) -> Option<&'s Slot> {
        let slot = slot.filter(|_| self.format.ad_enabled)?;
        (!slot.invalid() && !slot.is_apic_access_page() && !slot.gmem_only()).then_some(slot)
    }

    /// A fault of which nothing is known yet; it may end as an MMIO entry.
    pub(super) fn fault_for<'s>(&self, vcpu: &Vcpu, access: &Access) -> Fault<'s, Slot> {
        Fault {
            mmio_generation: vcpu.memslots_generation(),
            ..self.fault_of(access)
        }
    }

    /// The same for memory.
    #[inline]
    fn fault_of<'s>(&self, access: &Access) -> Fault<'s, Slot> {
        Fault {
            gfn: access.gfn,
            write: access.write,
            exec: access.exec,
            prefetch: access.prefetch,
            req_level: Level::L4K,
            goal_level: Level::L4K,
            max_level: Level::MAX_HUGE,
            huge_page_disallowed: false,
            nx_workaround: param::nx_huge_pages() && !self.kvm.nx_huge_pages_disabled(),
            pfn: Pfn(0),
            slot: None,
            map_writable: false,
            write_tracked: false,
            dirty_track: false,
            mmio_generation: 0,
            memtype: 0,
            is_host_mmio: false,
        }
    }

    /// A fault at a page that was looked up.
    #[inline(always)]
    pub(super) fn fault_of_page<'s>(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &'s Slot,
        page: &HostPage,
    ) -> Fault<'s, Slot> {
        let (pfn, writable) = (page.pfn, page.writable);
        let fault = self.fault_of_frame(vcpu, access, slot, page.max_level, pfn, writable);
        if !self.host_mmio_matters || !page::is_host_mmio(pfn) {
            return fault;
        }
        Fault {
            memtype: page::memtype(vcpu, access.gfn, true),
            is_host_mmio: true,
            ..fault
        }
    }

    /// A fault at memory: a frame of the host's, which maps it at a level.
    #[inline(always)]
    pub(super) fn fault_of_frame<'s>(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &'s Slot,
        host_level: Level,
        pfn: Pfn,
        writable: bool,
    ) -> Fault<'s, Slot> {
        Fault {
            slot: Some(slot),
            pfn,
            map_writable: writable,
            max_level: host_level.min(param::max_huge_level()),
            dirty_track: slot.dirty_tracked(),
            memtype: if self.host_mmio_matters {
                page::memtype(vcpu, access.gfn, false)
            } else {
                0
            },
            ..self.fault_of(access)
        }
    }

    /// The level to map at: as high as slot, host and the NX mitigation allow.
    pub(super) fn choose_level(&self, slot: &Slot, fault: &mut Fault<'_, Slot>) {
        self.choose_level_by(fault, |gfn, limit| {
            slot.max_mapping_level(self.kvm, gfn, limit)
        });
    }

    #[inline]
    pub(super) fn choose_level_by(
        &self,
        fault: &mut Fault<'_, Slot>,
        allowed: impl FnOnce(Gfn, Level) -> Level,
    ) {
        fault.huge_page_disallowed = fault.exec && fault.nx_workaround;
        if fault.max_level == Level::L4K || fault.dirty_track {
            return;
        }
        fault.req_level = allowed(fault.gfn, fault.max_level);
        if fault.req_level == Level::L4K || fault.huge_page_disallowed {
            return;
        }
        fault.goal_level = fault.req_level;
        fault.pfn.0 &= !fault.goal_level.gfn_mask();
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Faults that the TDP MMU serves: the guest's page tables are the CPU's business, and many vCPUs fault at once.
//!
//! The way of an ordinary one:
//!
//! 1. `fast`: an entry that is there and only lacks write access (or an accessed bit) is fixed without a lock;
//! 2. `map_resident`: a page that the host has mapped is mapped here, too, with one look into the host's page table under
//!    `mmu_lock` held for read, and with it the pages around it;
//! 3. `back`: or else the host's page is looked up before any lock, with the count of invalidations noted first;
//! 4. `map_page`: under the lock, if an invalidation has ended since, or touches the frame now, the guest faults again; else
//!    the engine installs the entry.

use super::{
    backing::Backing,
    fault::{pferr, trace_fast, Access, Handled},
    Vm,
};
use crate::{
    kvm::{
        lock::ReadGuard,
        page::{self, HostPage, HostWindow},
        root::RootHpa,
        table, trace,
        vcpu::{FaultStat, Vcpu},
        Slot,
    },
    mmu::{
        table::TablePtr,
        tdp::{FastOutcome, Fault, Outcome},
        types::{GfnRange, Level, ACC_ALL},
    },
};
use kernel::prelude::*;

/// How a fault ended that the TDP MMU has served.
fn finish(outcome: Outcome) -> Result<Handled> {
    match outcome {
        Outcome::Fixed => Ok(Handled::Fixed),
        Outcome::Spurious => Ok(Handled::Spurious),
        Outcome::Retry => Ok(Handled::Retry),
        Outcome::Emulate => Ok(Handled::Emulate),
        Outcome::WriteProtected => Ok(Handled::WriteProtected { own_table: false }),
        Outcome::OutOfMemory => Err(ENOMEM),
    }
}

impl Vm {
    /// Handles a fault; `level` is where the frame is mapped in the end.
    pub(super) fn tdp_fault(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: Option<&Slot>,
        level: &mut Level,
    ) -> Result<Handled> {
        if let Some(handled) = self.fast(vcpu, access, slot) {
            return Ok(handled);
        }
        vcpu.topup_table_caches()?;
        let plain = self.may_be_resident(slot);
        let resident =
            |level: &mut Level| plain.and_then(|slot| self.map_resident(vcpu, access, slot, level));
        if self.worth_a_look(vcpu) {
            if let Some(handled) = resident(level) {
                return handled;
            }
        }
        match self.back(vcpu, access, slot, 0, ACC_ALL) {
            Ok(Backing::Page { slot, page, seq }) => {
                self.map_page(vcpu, access, slot, page, seq, level)
            }
            Ok(Backing::Mmio) => self.map_mmio(vcpu, access),
            // Most often by our own doing: the host broke a copy-on-write. Then it has the page mapped now.
            Err(Ok(Handled::Retry)) => resident(level).unwrap_or(Ok(Handled::Retry)),
            Err(handled) => handled,
        }
    }

    /// Installs a page that the host has mapped; `None` if it has not, or has it in a way that is not for us to judge.
    #[inline]
    fn map_resident(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &Slot,
        level: &mut Level,
    ) -> Option<Result<Handled>> {
        // An invalidation needs the lock for write: keep off it.
        if self.kvm.invalidating_hint(access.gfn) {
            return Some(Ok(Handled::Retry));
        }
        let lock = self.kvm.read_lock();
        let Some(root) = self.current_root(vcpu) else {
            return Some(Ok(Handled::Retry));
        };
        let alone = GfnRange::new(access.gfn, access.gfn.add(1));
        if self.kvm.invalidates(&lock, alone) {
            return Some(Ok(Handled::Retry));
        }
        let range = self.range_around(vcpu, access, slot, root, &lock);
        let mut place = HostWindow::PLACE;
        let (host_level, page, host) =
            self.look(vcpu, access, slot, range, lock.held(), &mut place)?;
        let mut fault =
            self.fault_of_frame(vcpu, access, slot, host_level, page.pfn, page.writable);
        self.choose_level_by(&mut fault, |gfn, limit| slot.max_level(gfn, limit));
        let outcome = self.install(vcpu, access, &lock, root, &mut fault, slot, Some(&host));
        *level = fault.goal_level;
        Some(finish(outcome))
    }

    /// Installs the host's page.
    fn map_page(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &Slot,
        page: HostPage,
        seq: usize,
        level: &mut Level,
    ) -> Result<Handled> {
        let mut fault = self.fault_of_page(vcpu, access, slot, &page);
        let lock = self.kvm.read_lock();
        // Under the lock an invalidation can neither begin nor end: what was looked up is still true, or is thrown away.
        let root = match self.current_root(vcpu) {
            Some(root) if !self.kvm.invalidate_retry(&lock, seq, access.gfn.0) => root,
            _ => {
                page.release_unused();
                return Ok(Handled::Retry);
            }
        };
        self.choose_level(slot, &mut fault);
        let range = self.range_around(vcpu, access, slot, root, &lock);
        // The page's neighbours may have come with it, from the host's own fault-around or from whoever fills the memory.
        let mut place = HostWindow::PLACE;
        let host = if range.pages() > 1 && !fault.is_host_mmio && !slot.gmem_only() {
            HostWindow::look(
                self.kvm,
                slot,
                access.gfn,
                range,
                false,
                lock.held(),
                &mut place,
            )
        } else {
            None
        };
        let outcome = self.install(vcpu, access, &lock, root, &mut fault, slot, host.as_ref());
        *level = fault.goal_level;
        if matches!(outcome, Outcome::Retry | Outcome::OutOfMemory) {
            page.release_unused();
        } else {
            page.release_mapped();
        }
        finish(outcome)
    }

    /// The frames that may be mapped along with the one that faulted, that one among them.
    #[inline]
    fn range_around(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &Slot,
        root: TablePtr,
        lock: &ReadGuard<'_>,
    ) -> GfnRange {
        let alone = GfnRange::new(access.gfn, access.gfn.add(1));
        // Where an entry is present already, its window was mapped when that was made.
        if access.prefetch || access.has(pferr::PRESENT) || slot.dirty_tracked() {
            return alone;
        }
        let range = self.window(vcpu, root, slot, access.gfn);
        if self.kvm.invalidates(lock, range) {
            return alone;
        }
        range
    }

    /// Lets the engine map the page, and what is around it.
    #[inline]
    #[allow(clippy::too_many_arguments)]
    fn install<'s>(
        &'s self,
        vcpu: &Vcpu,
        access: &Access,
        lock: &'s ReadGuard<'s>,
        root: TablePtr,
        fault: &mut Fault<'_, Slot>,
        slot: &'s Slot,
        around: Option<&'s HostWindow<'s>>,
    ) -> Outcome {
        let (host, lock) = (self.host(), lock.held());
        trace::spte_requested(
            fault.gfn,
            fault.pfn,
            fault.goal_level,
            table::role(root).access,
        );
        // A frame that is a table of a nested hypervisor's: its shadow must know that it may be written to from now on.
        fault.write_tracked = fault.map_writable
            && self
                .shadow
                .try_unsync(&host, lock, slot, access.gfn, access.prefetch)
                .is_err();
        let mut cache = table::VcpuCache(vcpu);
        match around {
            Some(window) if window.range().pages() > 1 => {
                let mut around = self.around_of(vcpu, slot, window, lock);
                self.tdp
                    .map_around(&host, lock, root, fault, &mut cache, &mut around)
            }
            _ => {
                if around.is_some_and(HostWindow::is_alone) {
                    self.found_alone(vcpu);
                }
                self.tdp.map(&host, lock, root, fault, &mut cache)
            }
        }
    }

    /// An access to no memory: remember that in an MMIO entry, and emulate.
    fn map_mmio(&self, vcpu: &Vcpu, access: &Access) -> Result<Handled> {
        let mut fault = self.fault_for(vcpu, access);
        let mut lock = self.kvm.read_lock();
        let Some(root) = self.current_root(vcpu) else {
            return Ok(Handled::Retry);
        };
        let access_of_root = table::role(root).access;
        trace::spte_requested(access.gfn, page::NO_SLOT, fault.goal_level, access_of_root);
        match self.tdp.map(
            &self.host(),
            lock.token(),
            root,
            &mut fault,
            &mut table::VcpuCache(vcpu),
        ) {
            Outcome::Emulate => {
                vcpu.count(FaultStat::MmioInstalled);
                Ok(Handled::Mmio)
            }
            Outcome::Spurious | Outcome::Fixed | Outcome::WriteProtected => Ok(Handled::Mmio),
            Outcome::Retry => Ok(Handled::Retry),
            Outcome::OutOfMemory => Err(ENOMEM),
        }
    }

    /// The fault may be one of a present entry that a change of bits fixes.
    pub(super) fn can_be_fast(&self, access: &Access) -> bool {
        let possible = if access.has(pferr::PRESENT) {
            access.write
        } else {
            // Without A/D bits, an entry that is there can be marked non-present to see whether it is used.
            !self.format.ad_enabled
        };
        possible && !access.has(pferr::RSVD)
    }

    /// Fixes a present entry without a lock, if that is all it takes.
    fn fast(&self, vcpu: &Vcpu, access: &Access, slot: Option<&Slot>) -> Option<Handled> {
        if !self.can_be_fast(access) {
            return None;
        }
        let root = vcpu.mmu().root().and_then(RootHpa::table)?;
        let dirty_track = slot.is_some_and(Slot::dirty_tracked);
        let outcome = self.tdp.fast_fault(
            &self.host(),
            root,
            access.gfn,
            access.write,
            access.exec,
            slot,
            dirty_track,
            |cell, old, outcome| trace_fast(vcpu, access, cell, old, outcome),
        );
        let handled = match outcome {
            FastOutcome::Invalid => return None,
            FastOutcome::Fixed => Handled::Fast,
            FastOutcome::Spurious => Handled::Spurious,
        };
        vcpu.count(FaultStat::Fast);
        Some(handled)
    }

    /// The vCPU's root, unless it was invalidated meanwhile. `mmu_lock` is held, so it stays so.
    #[inline]
    fn current_root(&self, vcpu: &Vcpu) -> Option<TablePtr> {
        let root = vcpu.mmu().root().and_then(RootHpa::table)?;
        (!table::invalid(root)).then_some(root)
    }
}

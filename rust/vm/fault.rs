// SPDX-License-Identifier: GPL-2.0

//! Stage-2 faults, from the exit to the entry that resolves them.
//!
//! [`Vm::page_fault`] is where a fault comes in. The way of an ordinary one:
//!
//! 1. `fast`: an entry that is there and only lacks write access (or an accessed bit) is fixed without a lock;
//! 2. `fault_in`: the host's page, looked up before any lock, with the count of invalidations noted first;
//! 3. under `mmu_lock` held for read: if an invalidation has ended since, or touches the frame now, the guest faults
//!    again; else the engine installs the entry.
//!
//! A write to a page the host or the slot does not let the guest write, and an access to no slot at all, is emulated.

use super::Vm;
use crate::{
    kvm::{
        page::{self, HostPage, Lookup, NoPage},
        param, table, trace,
        vcpu::{self, FaultStat, Vcpu},
        Slot,
    },
    mmu::{
        spte::Spte,
        tdp::{FastOutcome, Fault, Outcome},
        types::{Gfn, Level, ACC_ALL, PAGE_SHIFT},
    },
};
use core::{
    ffi::c_void,
    sync::atomic::{AtomicU64, Ordering},
};
use kernel::prelude::*;

/// What KVM's callers understand: RET_PF_RETRY (enter the guest again), RET_PF_EMULATE, ….
mod ret {
    use crate::kvm::bindings::*;

    pub(super) const RETRY: i32 = RET_PF_RETRY as i32;
    pub(super) const INVALID: i32 = RET_PF_INVALID as i32;
    pub(super) const FIXED: i32 = RET_PF_FIXED as i32;
    pub(super) const SPURIOUS: i32 = RET_PF_SPURIOUS as i32;
}

/// Error codes of stage-2 faults (AMD APM volume 2, 15.25.6; KVM translates those of EPT into them).
mod pferr {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const RSVD: u64 = 1 << 3;
    pub(super) const FETCH: u64 = 1 << 4;
    pub(super) const GUEST_FINAL: u64 = 1 << 32;
}

/// A fault, decoded.
#[derive(Clone, Copy)]
struct Access {
    gpa: u64,
    gfn: Gfn,
    error_code: u64,
    write: bool,
    exec: bool,
    prefetch: bool,
}

impl Access {
    fn new(gpa: u64, error_code: u64, prefetch: bool) -> Access {
        Access {
            gpa,
            gfn: Gfn(gpa >> PAGE_SHIFT),
            error_code,
            write: error_code & pferr::WRITE != 0,
            exec: error_code & pferr::FETCH != 0,
            prefetch,
        }
    }

    fn has(&self, bit: u64) -> bool {
        self.error_code & bit != 0
    }
}

/// How a fault ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Handled {
    Fixed,
    Fast,
    Spurious,
    Retry,
    /// There is no memory: the access is a device's.
    Mmio,
    /// The guest may not write, and the write is emulated.
    Emulate,
}

fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Vm {
    /// A stage-2 fault of the guest; `kvm_mmu_page_fault()`.
    pub fn page_fault(
        &self,
        vcpu: &Vcpu,
        gpa: u64,
        error_code: u64,
        insn: *mut c_void,
        len: i32,
    ) -> i32 {
        let Some(_) = vcpu.mmu().root() else {
            self.kvm.bug(c"a fault of a vCPU without a root");
            return EIO.to_errno();
        };
        let access = Access::new(gpa, error_code, false);
        if access.has(pferr::RSVD) {
            match self.mmio_fault(vcpu, &access) {
                Some(Handled::Retry) => {
                    bump(&self.faults.retry);
                    return ret::RETRY;
                }
                // KVM does not count a known MMIO access as an emulated fault.
                Some(_) => {
                    bump(&self.faults.mmio);
                    return self.emulate(vcpu, &access, insn, len);
                }
                None => {}
            }
        }
        vcpu.count(FaultStat::Taken);
        let handled = match self.handle(vcpu, &access, &mut Level::L4K.clone()) {
            Ok(handled) => handled,
            Err(error) => {
                bump(&self.faults.error);
                return error.to_errno();
            }
        };
        match handled {
            Handled::Fixed => {
                vcpu.count(FaultStat::Fixed);
                bump(&self.faults.fixed);
                ret::FIXED
            }
            // Counted as fast when it was fixed; KVM counts it as fixed, too.
            Handled::Fast => {
                vcpu.count(FaultStat::Fixed);
                bump(&self.faults.fast);
                ret::FIXED
            }
            Handled::Spurious => {
                vcpu.count(FaultStat::Spurious);
                bump(&self.faults.spurious);
                ret::SPURIOUS
            }
            Handled::Retry => {
                bump(&self.faults.retry);
                ret::RETRY
            }
            Handled::Mmio | Handled::Emulate => {
                vcpu.count(FaultStat::Emulate);
                bump(if handled == Handled::Mmio {
                    &self.faults.mmio
                } else {
                    &self.faults.emulate
                });
                self.emulate(vcpu, &access, insn, len)
            }
        }
    }

    fn emulate(&self, vcpu: &Vcpu, access: &Access, insn: *mut c_void, len: i32) -> i32 {
        vcpu.emulate(
            access.gpa,
            crate::kvm::bindings::EMULTYPE_PF as i32,
            insn,
            len,
        )
    }

    /// A page that was on its way in is there: map it before the guest asks again; `kvm_arch_async_page_ready()`.
    pub fn async_page_ready(&self, vcpu: &Vcpu, gpa: u64, error_code: u64) {
        if !vcpu.mmu().direct() || self.reload(vcpu).is_err() {
            return;
        }
        let access = Access::new(gpa, error_code, true);
        if let Ok(Handled::Fixed) = self.handle(vcpu, &access, &mut Level::L4K.clone()) {
            vcpu.count(FaultStat::Fixed);
        }
    }

    /// Maps memory for userspace; `kvm_arch_vcpu_pre_fault_memory()`. Returns bytes done, at most `size`, or an errno.
    pub fn pre_fault(&self, vcpu: &Vcpu, gpa: u64, size: u64) -> i64 {
        match self.try_pre_fault(vcpu, gpa) {
            Ok(level) => {
                let bytes = level.pages() << PAGE_SHIFT;
                let done = bytes.wrapping_sub(gpa & bytes.wrapping_sub(1));
                done.min(size) as i64
            }
            Err(error) => error.to_errno().into(),
        }
    }

    fn try_pre_fault(&self, vcpu: &Vcpu, gpa: u64) -> Result<Level> {
        if !self.kvm.pre_fault_allowed() || !vcpu.mmu().direct() {
            return Err(crate::kvm::not_supported());
        }
        self.reload(vcpu)?;
        let access = Access::new(gpa, pferr::GUEST_FINAL, true);
        loop {
            if vcpu::signal_pending() {
                return Err(EINTR);
            }
            if vcpu.take_vm_dead() {
                return Err(EIO);
            }
            vcpu::cond_resched();
            let mut level = Level::L4K;
            match self.handle(vcpu, &access, &mut level)? {
                Handled::Retry => self.reload(vcpu)?,
                Handled::Fixed | Handled::Fast | Handled::Spurious => return Ok(level),
                Handled::Mmio | Handled::Emulate => return Err(ENOENT),
            }
        }
    }

    /// Makes sure that the vCPU has a root that is not obsolete.
    fn reload(&self, vcpu: &Vcpu) -> Result {
        if vcpu.take_free_obsolete_roots() {
            self.free_obsolete_roots(vcpu);
        }
        if vcpu.mmu().root().is_some() {
            return Ok(());
        }
        self.try_load(vcpu)
    }

    /// A fault with reserved bits: an MMIO entry. `None` if the entry is stale and the fault is an ordinary one.
    fn mmio_fault(&self, vcpu: &Vcpu, access: &Access) -> Option<Handled> {
        if !vcpu.mmu_is_nested() && vcpu.mmio_cached(access.gpa) {
            return Some(Handled::Mmio);
        }
        let root = vcpu.mmu().root().and_then(|hpa| self.root_table(hpa))?;
        let mut path = [Spte::NONPRESENT; 6];
        let (level, _) = self.tdp.walk(&self.host(), root, access.gfn, &mut path)?;
        let spte = path
            .get(usize::from(level.get()))
            .copied()
            .unwrap_or(Spte::NONPRESENT);
        if !spte.is_mmio(&self.format) {
            // Zapped or replaced since.
            return Some(Handled::Retry);
        }
        let generation = vcpu.memslots_generation() & Spte::MMIO_GEN_MASK;
        trace::check_mmio_spte(spte, generation);
        if spte.mmio_generation() != generation {
            return None;
        }
        let (gfn, granted) = (spte.mmio_gfn(&self.format), spte.mmio_access(&self.format));
        trace::handle_mmio_page_fault(gfn, granted);
        vcpu.mmio_cache(gfn, granted);
        Some(Handled::Mmio)
    }

    /// Handles a fault; `level` is where the frame is mapped in the end.
    fn handle(&self, vcpu: &Vcpu, access: &Access, level: &mut Level) -> Result<Handled> {
        if !param::tdp_mmu() {
            // The key is fixed while VMs of ours exist, and none is taken without it: the legacy MMU's place.
            return Err(crate::kvm::not_supported());
        }
        let slot = vcpu.slot(access.gfn);
        if let Some(slot) = slot {
            let tracked = access.write && access.has(pferr::PRESENT) && !access.has(pferr::RSVD);
            if tracked && slot.write_tracked(self.kvm, access.gfn) {
                return Ok(Handled::Emulate);
            }
        }
        if let Some(handled) = self.fast(vcpu, access, slot) {
            return Ok(handled);
        }
        vcpu.topup_table_caches()?;
        let seq = self.kvm.invalidate_seq();
        let Some(slot) = slot else {
            return self.map_mmio(vcpu, access);
        };
        if slot.invalid() {
            // On its way out; the slots that follow are not there yet.
            return if access.prefetch {
                Err(EAGAIN)
            } else {
                Ok(Handled::Retry)
            };
        }
        if slot.is_apic_access_page() {
            // A nested guest has no APIC page of its own, and without APICv the page is a device.
            if vcpu.guest_mode() {
                return self.map_mmio(vcpu, access);
            }
            if !self.kvm.apicv_activated() {
                return Ok(Handled::Mmio);
            }
        }
        if self.kvm.invalidate_retry_hint(seq, access.gfn.0) {
            return Ok(Handled::Retry);
        }
        let page = match self.fault_in(vcpu, access, slot) {
            Ok(page) => page,
            Err(handled) => return handled,
        };
        if self.kvm.invalidate_retry_hint(seq, access.gfn.0) {
            page.release_unused();
            return Ok(Handled::Retry);
        }
        self.map_page(vcpu, access, slot, page, seq, level)
    }

    /// Fixes a present entry without a lock, if that is all it takes.
    fn fast(&self, vcpu: &Vcpu, access: &Access, slot: Option<&Slot>) -> Option<Handled> {
        let possible = if access.has(pferr::PRESENT) {
            access.write
        } else {
            // Without A/D bits, an entry that is there can be marked non-present to see whether it is used.
            !self.format.ad_enabled
        };
        if !possible || access.has(pferr::RSVD) {
            return None;
        }
        let root = vcpu.mmu().root().and_then(|hpa| self.root_table(hpa))?;
        let dirty_track = slot.is_some_and(Slot::dirty_tracked);
        let outcome = self.tdp.fast_fault(
            &self.host(),
            root,
            access.gfn,
            access.write,
            access.exec,
            slot,
            dirty_track,
            |cell, old, outcome| {
                let ret = match outcome {
                    FastOutcome::Invalid => ret::INVALID,
                    FastOutcome::Fixed => ret::FIXED,
                    FastOutcome::Spurious => ret::SPURIOUS,
                };
                trace::fast_page_fault(vcpu, access.gpa, access.error_code, cell, old, ret);
            },
        );
        let handled = match outcome {
            FastOutcome::Invalid => return None,
            FastOutcome::Fixed => Handled::Fast,
            FastOutcome::Spurious => Handled::Spurious,
        };
        vcpu.count(FaultStat::Fast);
        Some(handled)
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
                trace::try_async_get_page(access.gpa, access.gfn);
                if vcpu.async_pf_pending(access.gfn) {
                    trace::async_pf_repeated_fault(access.gpa, access.gfn);
                    vcpu.request_apf_halt();
                    return Err(Ok(Handled::Retry));
                }
                if vcpu.setup_async_pf(access.gpa, access.gfn, access.error_code) {
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

    /// An access to no memory: remember that in an MMIO entry, if the hardware can, and emulate.
    fn map_mmio(&self, vcpu: &Vcpu, access: &Access) -> Result<Handled> {
        vcpu.mmio_cache(
            access.gfn,
            u64::from(ACC_ALL) & self.format.mmio_access_mask,
        );
        // Entries for addresses the host does not have are impossible.
        if !self.format.mmio_caching || access.gfn > self.format.max_gfn {
            return Ok(Handled::Mmio);
        }
        let mut fault = Fault {
            slot: None,
            pfn: crate::mmu::types::Pfn(0),
            ..self.fault_for(vcpu, access)
        };
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

    fn fault_for<'s>(&self, vcpu: &Vcpu, access: &Access) -> Fault<'s, Slot> {
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
            pfn: crate::mmu::types::Pfn(0),
            slot: None,
            map_writable: false,
            write_tracked: false,
            dirty_track: false,
            mmio_generation: vcpu.memslots_generation(),
            memtype: 0,
            is_host_mmio: false,
        }
    }

    /// The vCPU's root, unless it was invalidated meanwhile. `mmu_lock` is held, so it stays so.
    fn current_root(&self, vcpu: &Vcpu) -> Option<crate::mmu::table::TablePtr> {
        let root = vcpu.mmu().root().and_then(|hpa| self.root_table(hpa))?;
        (!table::invalid(root)).then_some(root)
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
        let host_mmio = self.host_mmio_matters && page::is_host_mmio(page.pfn);
        let mut fault = Fault {
            slot: Some(slot),
            pfn: page.pfn,
            map_writable: page.writable,
            max_level: page.max_level.min(param::max_huge_level()),
            dirty_track: slot.dirty_tracked(),
            memtype: if self.host_mmio_matters {
                page::memtype(vcpu, access.gfn, host_mmio)
            } else {
                0
            },
            is_host_mmio: host_mmio,
            ..self.fault_for(vcpu, access)
        };
        let mut lock = self.kvm.read_lock();
        // Under the lock an invalidation can neither begin nor end: what was looked up is still true, or is thrown away.
        let root = match self.current_root(vcpu) {
            Some(root) if !self.kvm.invalidate_retry(&lock, seq, access.gfn.0) => root,
            _ => {
                page.release_unused();
                return Ok(Handled::Retry);
            }
        };
        fault.write_tracked = slot.write_tracked(self.kvm, access.gfn);
        self.choose_level(slot, &mut fault);
        trace::spte_requested(
            fault.gfn,
            fault.pfn,
            fault.goal_level,
            table::role(root).access,
        );
        let outcome = self.tdp.map(
            &self.host(),
            lock.token(),
            root,
            &mut fault,
            &mut table::VcpuCache(vcpu),
        );
        *level = fault.goal_level;
        if matches!(outcome, Outcome::Retry | Outcome::OutOfMemory) {
            page.release_unused();
        } else {
            page.release_mapped();
        }
        match outcome {
            Outcome::Fixed => Ok(Handled::Fixed),
            Outcome::Spurious => Ok(Handled::Spurious),
            Outcome::Retry => Ok(Handled::Retry),
            Outcome::Emulate | Outcome::WriteProtected => Ok(Handled::Emulate),
            Outcome::OutOfMemory => Err(ENOMEM),
        }
    }

    /// The level to map at: as high as slot, host and the NX mitigation allow.
    fn choose_level(&self, slot: &Slot, fault: &mut Fault<'_, Slot>) {
        fault.huge_page_disallowed = fault.exec && fault.nx_workaround;
        if fault.max_level == Level::L4K || fault.dirty_track {
            return;
        }
        fault.req_level = slot.max_mapping_level(self.kvm, fault.gfn, fault.max_level);
        if fault.req_level == Level::L4K || fault.huge_page_disallowed {
            return;
        }
        fault.goal_level = fault.req_level;
        fault.pfn.0 &= !fault.goal_level.gfn_mask();
    }

    /// Prints the entries on the way to `gpa`; `kvm_mmu_print_sptes()`.
    pub fn print_sptes(&self, vcpu: &Vcpu, gpa: u64) {
        let Some(root) = vcpu.mmu().root().and_then(|hpa| self.root_table(hpa)) else {
            return;
        };
        let mut path = [Spte::NONPRESENT; 6];
        let Some((lowest, top)) =
            self.tdp
                .walk(&self.host(), root, Gfn(gpa >> PAGE_SHIFT), &mut path)
        else {
            return;
        };
        pr_err!("entries on the way to gpa {:#x}:\n", gpa);
        for level in (lowest.get()..=top.get()).rev() {
            if let Some(spte) = path.get(usize::from(level)) {
                pr_err!("  level {}: {:#018x}\n", level, spte.raw());
            }
        }
    }
}

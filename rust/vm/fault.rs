// SPDX-License-Identifier: GPL-2.0

//! Page faults, from the exit to the entry that resolves them.
//!
//! [`Vm::page_fault`] is where a fault comes in. The way of an ordinary one, which the TDP MMU serves:
//!
//! 1. `fast`: an entry that is there and only lacks write access (or an accessed bit) is fixed without a lock;
//! 2. `fault_in`: the host's page, looked up before any lock, with the count of invalidations noted first;
//! 3. under `mmu_lock` held for read: if an invalidation has ended since, or touches the frame now, the guest faults
//!    again; else the engine installs the entry.
//!
//! A write to a page the host or the slot does not let the guest write, and an access to no slot at all, is emulated.
//!
//! Faults that the shadow MMU serves are in [`shadow`](super::shadow), and come by here for all that is the same.

use super::{shadow::AfterProtection, Vm};
use crate::kvm::bindings::{EMULTYPE_ALLOW_RETRY_PF, EMULTYPE_PF, EMULTYPE_WRITE_PF_TO_SP};
use crate::{
    kvm::{
        lock::ReadGuard,
        page::{self, HostPage, HostWindow, Lookup, NoPage},
        param,
        shadow::{root_kind, RootKind},
        table, trace,
        vcpu::{self, FaultStat, Vcpu},
        Slot,
    },
    mmu::{
        spte::Spte,
        table::TablePtr,
        tdp::{FastOutcome, Fault, Outcome},
        types::{Gfn, GfnRange, Level, Pfn, ACC_ALL, PAGE_SHIFT},
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

/// The generation of the slots is about to change (`KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS`).
const UPDATE_IN_PROGRESS: u64 = 1 << 63;

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
pub(super) struct Access {
    /// What the CPU says: a guest physical address, or, if the guest's tables are shadowed, the one these translate.
    pub(super) address: u64,
    /// The frame; if the guest's tables are shadowed, of what they translate to.
    pub(super) gfn: Gfn,
    pub(super) error_code: u64,
    pub(super) write: bool,
    pub(super) exec: bool,
    pub(super) prefetch: bool,
}

impl Access {
    pub(super) fn new(address: u64, error_code: u64, prefetch: bool) -> Access {
        Access {
            address,
            gfn: Gfn(address >> PAGE_SHIFT),
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
pub(super) enum Handled {
    Fixed,
    Fast,
    Spurious,
    Retry,
    /// The guest's own tables forbid the access, and the guest has been told.
    Injected,
    /// There is no memory: the access is a device's.
    Mmio,
    /// The guest may not write, and the write is emulated.
    Emulate,
    /// Writes to the frame must be seen. The write may have hit a table that this write itself used.
    WriteProtected {
        own_table: bool,
    },
}

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

/// Tells observers how a fault ended that might have needed no lock.
pub(super) fn trace_fast(
    vcpu: &Vcpu,
    access: &Access,
    cell: &AtomicU64,
    old: Spte,
    outcome: FastOutcome,
) {
    let ret = match outcome {
        FastOutcome::Invalid => ret::INVALID,
        FastOutcome::Fixed => ret::FIXED,
        FastOutcome::Spurious => ret::SPURIOUS,
    };
    trace::fast_page_fault(vcpu, access.address, access.error_code, cell, old, ret);
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
        if vcpu.mmu().root().is_none() {
            return self.no_root();
        }
        if error_code & pferr::RSVD != 0 {
            return Self::reserved_fault(vcpu, gpa, error_code, insn, len, self);
        }
        Self::memory_fault(vcpu, gpa, error_code, insn, len, self)
    }

    #[cold]
    fn no_root(&self) -> i32 {
        self.kvm.bug(c"a fault of a vCPU without a root");
        EIO.to_errno()
    }

    /// A fault with reserved bits: an access to a device, most often where the last one was.
    ///
    /// This and [`memory_fault`](Self::memory_fault) are functions of their own, and take the VM last, so that neither
    /// saves what only the other needs, and all other arguments stay in the registers in which KVM passed them.
    #[inline(never)]
    fn reserved_fault(
        vcpu: &Vcpu,
        gpa: u64,
        error_code: u64,
        insn: *mut c_void,
        len: i32,
        vm: &Vm,
    ) -> i32 {
        if vcpu.mmio_cached(gpa, vcpu.mmu().direct()) {
            // KVM does not count a known MMIO access as an emulated fault.
            bump(&vm.faults.mmio);
            return vcpu.emulate(gpa, EMULTYPE_PF as i32, insn, len);
        }
        match vm.mmio_fault(vcpu, gpa) {
            Some(Handled::Retry) => {
                bump(&vm.faults.retry);
                ret::RETRY
            }
            Some(_) => {
                bump(&vm.faults.mmio);
                vcpu.emulate(gpa, EMULTYPE_PF as i32, insn, len)
            }
            None => Self::memory_fault(vcpu, gpa, error_code, insn, len, vm),
        }
    }

    /// A fault that is not a known MMIO access.
    #[inline(never)]
    fn memory_fault(
        vcpu: &Vcpu,
        gpa: u64,
        error_code: u64,
        insn: *mut c_void,
        len: i32,
        vm: &Vm,
    ) -> i32 {
        let access = &Access::new(gpa, error_code, false);
        let emulate = |kind: u32| vcpu.emulate(access.address, kind as i32, insn, len);
        vcpu.count(FaultStat::Taken);
        let mut handled = match vm.handle(vcpu, access, &mut Level::L4K.clone()) {
            Ok(handled) => handled,
            Err(error) => {
                bump(&vm.faults.error);
                return error.to_errno();
            }
        };
        let mut emulation = EMULTYPE_PF;
        if let Handled::WriteProtected { own_table } = handled {
            if own_table {
                emulation |= EMULTYPE_WRITE_PF_TO_SP;
            }
            handled = match vm.write_protected(vcpu, access) {
                AfterProtection::Retry => Handled::Retry,
                AfterProtection::Emulate { may_retry } => {
                    if may_retry {
                        emulation |= EMULTYPE_ALLOW_RETRY_PF;
                    }
                    Handled::Emulate
                }
            };
        }
        match handled {
            Handled::Fixed => {
                vcpu.count(FaultStat::Fixed);
                bump(&vm.faults.fixed);
                ret::FIXED
            }
            // Counted as fast when it was fixed; KVM counts it as fixed, too.
            Handled::Fast => {
                vcpu.count(FaultStat::Fixed);
                bump(&vm.faults.fast);
                ret::FIXED
            }
            Handled::Spurious => {
                vcpu.count(FaultStat::Spurious);
                bump(&vm.faults.spurious);
                ret::SPURIOUS
            }
            Handled::Retry => {
                bump(&vm.faults.retry);
                ret::RETRY
            }
            Handled::Injected => {
                bump(&vm.faults.guest);
                ret::RETRY
            }
            Handled::Mmio => {
                vcpu.count(FaultStat::Emulate);
                bump(&vm.faults.mmio);
                emulate(emulation)
            }
            Handled::Emulate | Handled::WriteProtected { .. } => {
                vcpu.count(FaultStat::Emulate);
                bump(&vm.faults.emulate);
                emulate(emulation)
            }
        }
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
        let direct = self.tdp_enabled && vcpu.mmu().direct();
        if !self.kvm.pre_fault_allowed() || !direct {
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
                Handled::Retry | Handled::Injected => self.reload(vcpu)?,
                Handled::Fixed
                | Handled::Fast
                | Handled::Spurious
                | Handled::WriteProtected { .. } => return Ok(level),
                Handled::Mmio | Handled::Emulate => return Err(ENOENT),
            }
        }
    }

    /// Makes sure that the vCPU has a root that is not obsolete.
    pub(super) fn reload(&self, vcpu: &Vcpu) -> Result {
        if vcpu.take_free_obsolete_roots() {
            self.free_obsolete_roots(vcpu);
        }
        if vcpu.mmu().root().is_some() {
            return Ok(());
        }
        self.try_load(vcpu)
    }

    /// A fault with reserved bits, not where the last one was: an MMIO entry. `None` if the entry is stale and the fault
    /// is an ordinary one.
    #[inline(never)]
    fn mmio_fault(&self, vcpu: &Vcpu, address: u64) -> Option<Handled> {
        let direct = vcpu.mmu().direct();
        let spte = self.lowest_entry(vcpu, address)?;
        if !spte.is_mmio(&self.format) {
            // Zapped or replaced since.
            return Some(Handled::Retry);
        }
        let generation = vcpu.memslots_generation();
        trace::check_mmio_spte(spte, generation & Spte::MMIO_GEN_MASK);
        if generation & UPDATE_IN_PROGRESS != 0
            || spte.mmio_generation() != generation & Spte::MMIO_GEN_MASK
        {
            return None;
        }
        let gva = if direct { 0 } else { address };
        let (gfn, granted) = (spte.mmio_gfn(&self.format), spte.mmio_access(&self.format));
        trace::handle_mmio_page_fault(gva, gfn, granted);
        vcpu.mmio_cache(gva, gfn, granted);
        Some(Handled::Mmio)
    }

    /// The entries on the way to `address` below the vCPU's root: lowest level and highest.
    fn walk_root(&self, vcpu: &Vcpu, address: u64, path: &mut [Spte; 6]) -> Option<(Level, Level)> {
        let mmu = vcpu.mmu();
        match root_kind(mmu.root()?) {
            RootKind::Tdp(root) => {
                let gfn = Gfn(address >> PAGE_SHIFT);
                self.tdp.walk(&self.host(), root, gfn, path)
            }
            _ => {
                let root = self.shadow_root(mmu)?;
                self.shadow.walk(&self.host(), root.start(), address, path)
            }
        }
    }

    fn lowest_entry(&self, vcpu: &Vcpu, address: u64) -> Option<Spte> {
        let mut path = [Spte::NONPRESENT; 6];
        let (level, _) = self.walk_root(vcpu, address, &mut path)?;
        path.get(usize::from(level.get())).copied()
    }

    /// Handles a fault; `level` is where the frame is mapped in the end.
    fn handle(&self, vcpu: &Vcpu, access: &Access, level: &mut Level) -> Result<Handled> {
        if !vcpu.mmu().direct() {
            return self.guest_fault(vcpu, access, level);
        }
        if !param::tdp_mmu() {
            return self.direct_fault(vcpu, access, level);
        }
        let slot = vcpu.slot(access.gfn);
        if self.writes_tracked_frame(access, slot) {
            return Ok(Handled::WriteProtected { own_table: false });
        }
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
        let host = HostWindow::look(
            self.kvm,
            slot,
            access.gfn,
            range,
            access.write,
            lock.held(),
            &mut place,
        )?;
        self.looked(vcpu, host.level.is_some());
        let (host_level, page) = (host.level?, host.page(access.gfn)?);
        let mut fault =
            self.fault_of_frame(vcpu, access, slot, host_level, page.pfn, page.writable);
        self.choose_level_by(&mut fault, |gfn, limit| slot.max_level(gfn, limit));
        let outcome = self.install(vcpu, access, &lock, root, &mut fault, slot, Some(&host));
        *level = fault.goal_level;
        Some(finish(outcome))
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

    /// The vCPU's root, unless it was invalidated meanwhile. `mmu_lock` is held, so it stays so.
    #[inline]
    fn current_root(&self, vcpu: &Vcpu) -> Option<TablePtr> {
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

    /// Prints the entries on the way to `gpa`; `kvm_mmu_print_sptes()`.
    pub fn print_sptes(&self, vcpu: &Vcpu, gpa: u64) {
        let mut path = [Spte::NONPRESENT; 6];
        let Some((lowest, top)) = self.walk_root(vcpu, gpa, &mut path) else {
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

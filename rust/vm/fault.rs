// SPDX-License-Identifier: GPL-2.0

//! Page faults, from the exit to the entry that resolves them.
//!
//! [`Vm::page_fault`] is where a fault comes in. Most are served by the TDP MMU, see [`tdp`](super::tdp), or by the shadow
//! MMU, see [`shadow`](super::shadow); both look up what backs the frame as in [`backing`](super::backing). A write to a
//! page the host or the slot does not let the guest write, and an access to no slot at all, is emulated.

use super::{shadow::AfterProtection, Vm};
use crate::kvm::bindings::{
    EMULTYPE_ALLOW_RETRY_PF, EMULTYPE_PF, EMULTYPE_WRITE_PF_TO_SP,
    RMMU_KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
};
use crate::{
    kvm::{
        param,
        root::RootKind,
        trace,
        vcpu::{self, FaultStat, Instruction, Vcpu},
    },
    mmu::{
        spte::Spte,
        sync::atomic::{AtomicU64, Ordering},
        tdp::FastOutcome,
        types::{Gfn, Level, PAGE_SHIFT},
    },
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

/// The generation of the slots is about to change.
const UPDATE_IN_PROGRESS: u64 = RMMU_KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS as u64;

/// Error codes of stage-2 faults (AMD APM volume 2, 15.25.6; KVM translates those of EPT into them).
pub(super) mod pferr {
    use crate::kvm::bindings::*;

    pub(in crate::vm) const PRESENT: u64 = RMMU_PFERR_PRESENT_MASK;
    pub(in crate::vm) const WRITE: u64 = RMMU_PFERR_WRITE_MASK;
    pub(in crate::vm) const RSVD: u64 = RMMU_PFERR_RSVD_MASK;
    pub(in crate::vm) const FETCH: u64 = RMMU_PFERR_FETCH_MASK;
    pub(in crate::vm) const GUEST_FINAL: u64 = RMMU_PFERR_GUEST_FINAL_MASK;
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

    pub(super) fn has(&self, bit: u64) -> bool {
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
    pub fn page_fault(&self, vcpu: &Vcpu, gpa: u64, error_code: u64, insn: Instruction) -> i32 {
        if vcpu.mmu().root().is_none() {
            return self.no_root();
        }
        if error_code & pferr::RSVD != 0 {
            return Self::reserved_fault(vcpu, gpa, error_code, insn, self);
        }
        Self::memory_fault(vcpu, gpa, error_code, insn, self)
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
    fn reserved_fault(vcpu: &Vcpu, gpa: u64, error_code: u64, insn: Instruction, vm: &Vm) -> i32 {
        if vcpu.mmio_cached(gpa, vcpu.mmu().direct()) {
            // KVM does not count a known MMIO access as an emulated fault.
            bump(&vm.faults.mmio);
            return vcpu.emulate(gpa, EMULTYPE_PF as i32, insn);
        }
        match vm.mmio_fault(vcpu, gpa) {
            Some(Handled::Retry) => {
                bump(&vm.faults.retry);
                ret::RETRY
            }
            Some(_) => {
                bump(&vm.faults.mmio);
                vcpu.emulate(gpa, EMULTYPE_PF as i32, insn)
            }
            None => Self::memory_fault(vcpu, gpa, error_code, insn, vm),
        }
    }

    /// A fault that is not a known MMIO access.
    #[inline(never)]
    fn memory_fault(vcpu: &Vcpu, gpa: u64, error_code: u64, insn: Instruction, vm: &Vm) -> i32 {
        let access = &Access::new(gpa, error_code, false);
        let emulate = |kind: u32| vcpu.emulate(access.address, kind as i32, insn);
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
            if vcpu.is_vm_dead() {
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
        match mmu.root()?.kind() {
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
        let slot = vcpu.slot(access.gfn);
        if self.writes_tracked_frame(access, slot) {
            return Ok(Handled::WriteProtected { own_table: false });
        }
        if !param::tdp_mmu() {
            return self.direct_fault(vcpu, access, slot, level);
        }
        self.tdp_fault(vcpu, access, slot, level)
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

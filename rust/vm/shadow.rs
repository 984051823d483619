// SPDX-License-Identifier: GPL-2.0

//! Faults that the shadow MMU serves: of guests whose tables are shadowed, and of direct roots without the TDP MMU.
//!
//! [`Vm::guest_fault`] is the first kind. The address is a virtual one, or for a nested guest one of its physical ones, and
//! the guest's own tables decide about it first:
//!
//! 1. walk the guest's tables, as its CPU would; a fault that is found there is the guest's, or its hypervisor's;
//! 2. look up the host's page, as for any fault;
//! 3. under `mmu_lock` held for write: make room in the quota of pages, see whether anything is stale, and let the engine
//!    shadow the path of the walk.
//!
//! A write to a table that is shadowed ends as "write protected": the page may be given up as a table, or the write is
//! emulated, and followed from `kvm_mmu_track_write()`.

use super::{
    fault::{trace_fast, Access, Backing, Handled},
    Vm,
};
use crate::{
    kvm::{
        page::{HostPage, NO_SLOT},
        paging::{GuestPaging, VcpuMemory},
        shadow::{root_kind, RootKind, ShadowCpu},
        trace,
        vcpu::FaultStat,
        Slot, Vcpu,
    },
    mmu::{
        shadow::{
            guest::{
                self, ErrorCode, Guest, GuestContext, GuestWalk, Paging32, Paging64, PagingEpt,
                Stop,
            },
            NoSpace,
        },
        sync::MmuWrite,
        tdp::{FastOutcome, Fault, Outcome},
        types::{Level, ACC_WRITE},
    },
};
use kernel::prelude::*;

/// How the vCPU's guest pages at the moment.
pub(super) struct Paging {
    pub(super) kind: GuestPaging,
    pub(super) context: GuestContext,
}

impl Paging {
    pub(super) fn of(vm: &Vm, vcpu: &Vcpu) -> Option<Paging> {
        let kind = vcpu.guest_paging(vm.ept());
        let context = vcpu.guest_context(kind)?;
        Some(Paging { kind, context })
    }

    fn walk(
        &self,
        memory: &VcpuMemory<'_>,
        address: u64,
        kind: ErrorCode,
    ) -> Result<GuestWalk, Stop> {
        match self.kind {
            GuestPaging::Small => guest::walk::<Paging32, _>(memory, &self.context, address, kind),
            GuestPaging::Long => guest::walk::<Paging64, _>(memory, &self.context, address, kind),
            GuestPaging::Ept => guest::walk::<PagingEpt, _>(memory, &self.context, address, kind),
        }
    }
}

/// Runs an expression with the guest's tables, compiled for each format.
macro_rules! with_guest {
    ($paging:expr, $memory:expr, $guest:ident => $body:expr) => {
        match $paging.kind {
            $crate::kvm::paging::GuestPaging::Small => {
                let $guest = Guest::<$crate::mmu::shadow::guest::Paging32, _>::new(
                    &$paging.context,
                    &$memory,
                );
                $body
            }
            $crate::kvm::paging::GuestPaging::Long => {
                let $guest = Guest::<$crate::mmu::shadow::guest::Paging64, _>::new(
                    &$paging.context,
                    &$memory,
                );
                $body
            }
            $crate::kvm::paging::GuestPaging::Ept => {
                let $guest = Guest::<$crate::mmu::shadow::guest::PagingEpt, _>::new(
                    &$paging.context,
                    &$memory,
                );
                $body
            }
        }
    };
}
pub(super) use with_guest;

/// Tables of a guest that has none.
pub(super) type NoGuest<'a> = Guest<'a, Paging64, VcpuMemory<'a>>;

impl Vm {
    /// The hardware's tables are EPT, and so are those of nested hypervisors.
    pub(super) fn ept(&self) -> bool {
        self.format.nx == 0
    }

    pub(super) fn make_pages_available(&self, lock: &mut MmuWrite<'_>) -> Result {
        self.shadow
            .make_available(&self.host(), lock)
            .map_err(|NoSpace| ENOSPC)
    }

    /// A fault of a guest whose tables are shadowed.
    pub(super) fn guest_fault(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        level: &mut Level,
    ) -> Result<Handled> {
        let paging = Paging::of(self, vcpu).ok_or(EIO)?;
        let memory = VcpuMemory(vcpu);
        let kind = ErrorCode(access.error_code & !ErrorCode::RSVD.bits());
        let mut walk = match paging.walk(&memory, access.address, kind) {
            Ok(walk) => walk,
            Err(Stop::Fault(fault)) => {
                if access.prefetch {
                    return Ok(Handled::Retry);
                }
                vcpu.inject_page_fault(&fault);
                return Ok(Handled::Injected);
            }
            Err(Stop::Retry) => return Ok(Handled::Retry),
        };
        let access = &Access {
            gfn: walk.gfn,
            ..*access
        };
        let slot = vcpu.slot(walk.gfn);
        if self.writes_tracked_frame(access, slot) {
            if let Some(root) = self.shadow_root(vcpu.mmu()) {
                self.shadow
                    .clear_flood(&self.host(), root.start(), access.address);
            }
            return Ok(Handled::WriteProtected { own_table: false });
        }
        vcpu.topup_shadow_caches(true)?;
        // A nested guest's address is no virtual one, which is seen where it is cached.
        let backing = self.back(vcpu, access, slot, access.address, walk.access);
        let (slot, page, seq) = match backing {
            Ok(Backing::Page { slot, page, seq }) => (Some(slot), Some(page), seq),
            Ok(Backing::Mmio { seq }) => (None, None, seq),
            Err(handled) => return handled,
        };
        let mmu = vcpu.mmu();
        let supervisor_write = access.write && access.error_code & ErrorCode::USER.bits() == 0;
        if supervisor_write
            && walk.access & ACC_WRITE == 0
            && !mmu.write_protects_supervisor()
            && paging.kind != GuestPaging::Ept
            && slot.is_some()
        {
            walk.write_without_wp(mmu.smep());
        }
        let mut fault = self.shadow_fault(vcpu, access, slot, page.as_ref());
        fault.max_level = fault.max_level.min(walk.level);

        let mut lock = self.kvm.write_lock();
        let root = match self.usable_root(vcpu) {
            Ok(root) if !page.is_some() || !self.kvm.invalidate_retry(&lock, seq, access.gfn.0) => {
                root
            }
            other => {
                drop(lock);
                return self.stale(vcpu, page, other.err());
            }
        };
        if let Err(error) = self.make_pages_available(lock.token()) {
            drop(lock);
            return self.give_up(page, Err(error));
        }
        let mut cpu = ShadowCpu::new(vcpu);
        let host = self.host();
        let (outcome, own_table) = with_guest!(paging, memory, guest => {
            self.shadow.map_guest(
                &host,
                lock.token(),
                &mut cpu,
                &guest,
                root.start(),
                access.address,
                &walk,
                &mut fault,
                |fault| self.adjust(fault, walk.access),
            )
        });
        *level = fault.goal_level;
        self.finish(vcpu, page, outcome, own_table)
    }

    /// A fault in a direct root that is the shadow MMU's.
    pub(super) fn direct_fault(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        level: &mut Level,
    ) -> Result<Handled> {
        let slot = vcpu.slot(access.gfn);
        if self.writes_tracked_frame(access, slot) {
            return Ok(Handled::WriteProtected { own_table: false });
        }
        if let Some(handled) = self.fast_direct(vcpu, access, slot) {
            return Ok(handled);
        }
        vcpu.topup_shadow_caches(false)?;
        let gva = if self.tdp_enabled { 0 } else { access.address };
        let all = vcpu.mmu().root_role().map_or(0, |role| role.access);
        let (slot, page, seq) = match self.back(vcpu, access, slot, gva, all) {
            Ok(Backing::Page { slot, page, seq }) => (Some(slot), Some(page), seq),
            Ok(Backing::Mmio { seq }) => (None, None, seq),
            Err(handled) => return handled,
        };
        let mut fault = self.shadow_fault(vcpu, access, slot, page.as_ref());
        if !self.tdp_enabled {
            // A guest without paging has PAE tables, whose entries map 2 MiB at most.
            fault.max_level = fault.max_level.min(Level::L2M);
        }
        let mut lock = self.kvm.write_lock();
        let root = match self.usable_root(vcpu) {
            Ok(root) if !page.is_some() || !self.kvm.invalidate_retry(&lock, seq, access.gfn.0) => {
                root
            }
            other => {
                drop(lock);
                return self.stale(vcpu, page, other.err());
            }
        };
        if let Err(error) = self.make_pages_available(lock.token()) {
            drop(lock);
            return self.give_up(page, Err(error));
        }
        self.adjust(&mut fault, all);
        let mut cpu = ShadowCpu::new(vcpu);
        let outcome = self.shadow.map_direct(
            &self.host(),
            lock.token(),
            &mut cpu,
            root.start(),
            &mut fault,
        );
        *level = fault.goal_level;
        self.finish(vcpu, page, outcome, false)
    }

    /// Chooses the level, when all tables that are shadowed are accounted for.
    fn adjust(&self, fault: &mut Fault<'_, Slot>, access: u8) {
        let pfn = match fault.slot {
            Some(slot) => {
                self.choose_level(slot, fault);
                fault.pfn
            }
            None => NO_SLOT,
        };
        trace::spte_requested(fault.gfn, pfn, fault.goal_level, access);
    }

    /// Fixes a present entry of a direct root without a lock, if that is all it takes.
    fn fast_direct(&self, vcpu: &Vcpu, access: &Access, slot: Option<&Slot>) -> Option<Handled> {
        if !self.can_be_fast(access) {
            return None;
        }
        let root = self.shadow_root(vcpu.mmu())?;
        let outcome = self.shadow.fast_fault(
            &self.host(),
            root.start(),
            access.gfn,
            access.write,
            access.exec,
            slot,
            slot.is_some_and(Slot::dirty_tracked),
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

    fn shadow_fault<'s>(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: Option<&'s Slot>,
        page: Option<&HostPage>,
    ) -> Fault<'s, Slot> {
        let fault = self.fault_for(vcpu, access);
        match (slot, page) {
            (Some(slot), Some(page)) => self.fault_of_page(vcpu, fault, slot, page),
            _ => fault,
        }
    }

    /// The vCPU's root, unless it is obsolete, under the lock.
    fn usable_root(&self, vcpu: &Vcpu) -> Result<super::shadow_roots::LoadedRoot, Unusable> {
        let mmu = vcpu.mmu();
        match mmu.root().map(root_kind) {
            // The guest's root has become memory since: load it.
            Some(RootKind::Dummy) => Err(Unusable::Dummy),
            // Whether it is obsolete shows only in what the vCPU is asked to do.
            Some(RootKind::Special) if vcpu.free_obsolete_roots_pending() => {
                Err(Unusable::Obsolete)
            }
            Some(RootKind::Special) => self.shadow_root(mmu).ok_or(Unusable::Obsolete),
            Some(root) if !self.is_obsolete(root) => {
                self.shadow_root(mmu).ok_or(Unusable::Obsolete)
            }
            _ => Err(Unusable::Obsolete),
        }
    }

    fn stale(&self, vcpu: &Vcpu, page: Option<HostPage>, why: Option<Unusable>) -> Result<Handled> {
        if why == Some(Unusable::Dummy) {
            vcpu.request_free_obsolete_roots();
        }
        self.give_up(page, Ok(Handled::Retry))
    }

    fn give_up(&self, page: Option<HostPage>, result: Result<Handled>) -> Result<Handled> {
        if let Some(page) = page {
            page.release_unused();
        }
        result
    }

    /// Gives the page back, and says what became of the fault. `mmu_lock` is held.
    fn finish(
        &self,
        vcpu: &Vcpu,
        page: Option<HostPage>,
        outcome: Outcome,
        own_table: bool,
    ) -> Result<Handled> {
        if let Some(page) = page {
            if matches!(outcome, Outcome::Retry | Outcome::OutOfMemory) {
                page.release_unused();
            } else {
                page.release_mapped();
            }
        }
        match outcome {
            Outcome::Fixed => Ok(Handled::Fixed),
            Outcome::Spurious => Ok(Handled::Spurious),
            Outcome::Retry => Ok(Handled::Retry),
            Outcome::WriteProtected => Ok(Handled::WriteProtected { own_table }),
            Outcome::Emulate => {
                vcpu.count(FaultStat::MmioInstalled);
                Ok(Handled::Mmio)
            }
            Outcome::OutOfMemory => Err(ENOMEM),
        }
    }

    /// A write fault on a frame that must not become writable: how it goes on; `kvm_mmu_write_protect_fault()`.
    pub(super) fn write_protected(&self, vcpu: &Vcpu, access: &Access) -> AfterProtection {
        // The same instruction at the same address, let go on before: it would fault for ever.
        if vcpu.was_retried(access.address) {
            return AfterProtection::Emulate { may_retry: false };
        }
        vcpu.forget_retry();
        // If the guest's CPU wrote to its tables by walking them, there is nothing to emulate; and while an event waits to be
        // delivered, emulating instructions would delay it. Without the table being shadowed, the guest goes on by itself.
        let walks_tables = ErrorCode::GUEST_PAGE | ErrorCode::WRITE | ErrorCode::PRESENT;
        let unprotect = if vcpu.mmu().direct() {
            ErrorCode(access.error_code).contains(walks_tables)
        } else {
            vcpu.event_needs_reinjection()
        };
        if unprotect && self.unprotect_and_retry(vcpu, access.address, false) {
            return AfterProtection::Retry;
        }
        // What a nested guest's instruction hit is not its own table, so that unprotecting it would not help.
        AfterProtection::Emulate {
            may_retry: !vcpu.guest_mode(),
        }
    }

    /// The guest writes to a frame in which all writes must be seen.
    pub(super) fn writes_tracked_frame(&self, access: &Access, slot: Option<&Slot>) -> bool {
        let write = access.write
            && access.error_code & ErrorCode::PRESENT.bits() != 0
            && access.error_code & ErrorCode::RSVD.bits() == 0;
        write && slot.is_some_and(|slot| slot.write_tracked(self.kvm, access.gfn))
    }

    /// A page that was on its way in for a guest whose tables are shadowed is there.
    pub fn guest_page_ready(&self, vcpu: &Vcpu, address: u64, error_code: u64, root: u64) {
        if vcpu.mmu().direct() || self.reload(vcpu).is_err() || vcpu.guest_root() != root {
            return;
        }
        let access = Access::new(address, error_code, true);
        if let Ok(Handled::Fixed) = self.guest_fault(vcpu, &access, &mut Level::L4K.clone()) {
            vcpu.count(FaultStat::Fixed);
        }
    }
}

/// Why a root cannot be used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unusable {
    Dummy,
    Obsolete,
}

/// What follows a write fault on a protected frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum AfterProtection {
    /// The guest goes on.
    Retry,
    /// The instruction is emulated; if it turns out that it does not write to tables, it may be let go on after all.
    Emulate { may_retry: bool },
}

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
    backing::Backing,
    fault::{trace_fast, Access, Handled},
    shadow_roots::LoadedRoot,
    Vm,
};
use crate::{
    kvm::{
        lock::WriteGuard,
        page::{HostPage, HostWindow, MappedPage, NO_SLOT},
        paging::{table_gfn, GuestPaging, VcpuMemory},
        root::{RootHpa, RootKind},
        shadow::ShadowCpu,
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
            NoSpace, PagePtr, WrongRoot,
        },
        sync::MmuWrite,
        tdp::{FastOutcome, Fault, Outcome},
        types::{GfnRange, Level, ACC_WRITE},
    },
};
use kernel::prelude::*;

/// How the vCPU's guest pages at the moment.
pub(super) struct Paging {
    pub(super) kind: GuestPaging,
    pub(super) context: GuestContext,
}

impl Paging {
    #[inline(always)]
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
        found: &mut GuestWalk,
    ) -> Result<(), Stop> {
        let context = &self.context;
        match self.kind {
            GuestPaging::Small => guest::walk::<Paging32, _>(memory, context, address, kind, found),
            GuestPaging::Long => guest::walk::<Paging64, _>(memory, context, address, kind, found),
            GuestPaging::Ept => guest::walk::<PagingEpt, _>(memory, context, address, kind, found),
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
        let memory = VcpuMemory::new(vcpu);
        let kind = ErrorCode(access.error_code & !ErrorCode::RSVD.bits());
        let mut walk = GuestWalk::new();
        match paging.walk(&memory, access.address, kind, &mut walk) {
            Ok(()) => {}
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
        let Ready {
            mut lock,
            root,
            backing,
        } = match self.ready(vcpu, access, slot, access.address, walk.access) {
            Ok(ready) => ready,
            Err(handled) => return handled,
        };
        let mut fault = self.fault_at(vcpu, access, slot, &backing);
        let (page, resident) = backing.into_page();
        let root = LoadedRoot::of(vcpu.mmu(), root);
        let mmu = vcpu.mmu();
        let supervisor_write = access.write && access.error_code & ErrorCode::USER.bits() == 0;
        if supervisor_write
            && walk.access & ACC_WRITE == 0
            && !mmu.write_protects_supervisor()
            && paging.kind != GuestPaging::Ept
            && fault.slot.is_some()
        {
            walk.write_without_wp(mmu.smep());
        }
        fault.max_level = fault.max_level.min(walk.level);
        let mut cpu = ShadowCpu::for_fault(vcpu, resident);
        let host = self.host();
        let served = with_guest!(paging, memory, guest => {
            self.shadow.map_guest(
                &host,
                lock.token(),
                &mut cpu,
                &guest,
                root.start(),
                access.address,
                &walk,
                &mut fault,
                |fault| self.adjust(fault, walk.access, resident),
            )
        });
        *level = fault.goal_level;
        match served {
            Ok((outcome, own_table)) => self.finish(vcpu, page, outcome, own_table),
            Err(WrongRoot) => {
                drop(lock);
                self.give_up(page, self.load_right_root(vcpu, access.address))
            }
        }
    }

    /// A fault in a direct root that is the shadow MMU's.
    pub(super) fn direct_fault(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: Option<&Slot>,
        level: &mut Level,
    ) -> Result<Handled> {
        if let Some(handled) = self.fast_direct(vcpu, access, slot) {
            return Ok(handled);
        }
        vcpu.topup_shadow_caches(false)?;
        let gva = if self.tdp_enabled { 0 } else { access.address };
        let all = vcpu.mmu().root_role().map_or(0, |role| role.access);
        let Ready {
            mut lock,
            root,
            backing,
        } = match self.ready(vcpu, access, slot, gva, all) {
            Ok(ready) => ready,
            Err(handled) => return handled,
        };
        let mut fault = self.fault_at(vcpu, access, slot, &backing);
        let (page, resident) = backing.into_page();
        let root = LoadedRoot::of(vcpu.mmu(), root);
        if !self.tdp_enabled {
            // A guest without paging has PAE tables, whose entries map 2 MiB at most.
            fault.max_level = fault.max_level.min(Level::L2M);
        }
        self.adjust(&mut fault, all, resident);
        let mut cpu = ShadowCpu::for_fault(vcpu, resident);
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

    /// Finds what backs the frame, takes the lock, and makes sure that nothing is stale and that there are pages enough.
    #[inline]
    fn ready<'a>(
        &'a self,
        vcpu: &Vcpu,
        access: &Access,
        slot: Option<&'a Slot>,
        gva: u64,
        allowed: u8,
    ) -> Result<Ready<'a>, Result<Handled>> {
        let plain = self
            .may_be_resident(slot)
            .filter(|_| self.worth_a_look(vcpu));
        let mut ready = match plain.and_then(|slot| self.ready_if_resident(vcpu, access, slot)) {
            Some(ready) => ready?,
            None => {
                let backing = self.back(vcpu, access, slot, gva, allowed)?;
                self.ready_if_fresh(vcpu, access, backing)?
            }
        };
        if let Err(error) = self.make_pages_available(ready.lock.token()) {
            drop(ready.lock);
            return Err(self.give_up(ready.backing.into_page().0, Err(error)));
        }
        Ok(ready)
    }

    /// A fault at a page that the host has mapped; `None` if it has not, or has it in a way that is not for us to judge.
    fn ready_if_resident<'a>(
        &'a self,
        vcpu: &Vcpu,
        access: &Access,
        slot: &'a Slot,
    ) -> Option<Result<Ready<'a>, Result<Handled>>> {
        // An invalidation needs the lock for write: keep off it.
        if self.kvm.invalidating_hint(access.gfn) {
            return Some(Err(Ok(Handled::Retry)));
        }
        let lock = self.kvm.write_lock();
        let root = match self.usable_root(vcpu) {
            Ok(root) => root,
            Err(why) => {
                drop(lock);
                return Some(Err(self.stale(vcpu, None, Some(why))));
            }
        };
        let alone = GfnRange::new(access.gfn, access.gfn.add(1));
        if self.kvm.invalidates(&lock, alone) {
            return Some(Err(Ok(Handled::Retry)));
        }
        let mut place = HostWindow::PLACE;
        let (level, page, _) = self.look(vcpu, access, slot, alone, lock.held(), &mut place)?;
        let backing = ReadyBacking::Resident { level, page };
        Some(Ok(Ready {
            lock,
            root,
            backing,
        }))
    }

    /// A fault at a page that was looked up before, if that is still true.
    fn ready_if_fresh<'a>(
        &'a self,
        vcpu: &Vcpu,
        access: &Access,
        backing: Backing<'a>,
    ) -> Result<Ready<'a>, Result<Handled>> {
        let (backing, seq) = match backing {
            Backing::Page { page, seq, .. } => (ReadyBacking::Held(page), Some(seq)),
            Backing::Mmio => (ReadyBacking::Mmio, None),
        };
        let lock = self.kvm.write_lock();
        let gone = |seq| self.kvm.invalidate_retry(&lock, seq, access.gfn.0);
        match self.usable_root(vcpu) {
            Ok(root) if !seq.is_some_and(gone) => Ok(Ready {
                lock,
                root,
                backing,
            }),
            other => {
                drop(lock);
                Err(self.stale(vcpu, backing.into_page().0, other.err()))
            }
        }
    }

    /// Chooses the level, when all tables that are shadowed are accounted for.
    fn adjust(&self, fault: &mut Fault<'_, Slot>, access: u8, resident: bool) {
        let pfn = match fault.slot {
            Some(slot) => {
                // The look at the host's page table has limited the level already.
                if resident {
                    self.choose_level_by(fault, |gfn, limit| slot.max_level(gfn, limit));
                } else {
                    self.choose_level(slot, fault);
                }
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

    /// The fault, now that it is known what backs the frame.
    #[inline(always)]
    fn fault_at<'s>(
        &self,
        vcpu: &Vcpu,
        access: &Access,
        slot: Option<&'s Slot>,
        backing: &ReadyBacking,
    ) -> Fault<'s, Slot> {
        match (slot, backing) {
            (Some(slot), &ReadyBacking::Resident { level, page }) => {
                self.fault_of_frame(vcpu, access, slot, level, page.pfn, page.writable)
            }
            (Some(slot), ReadyBacking::Held(page)) => self.fault_of_page(vcpu, access, slot, page),
            _ => self.fault_for(vcpu, access),
        }
    }

    /// The vCPU's root, unless it is obsolete, under the lock: its page, or none if it is no page.
    fn usable_root(&self, vcpu: &Vcpu) -> Result<Option<PagePtr>, Unusable> {
        match vcpu.mmu().root().map(RootHpa::kind) {
            // The guest's root has become memory since: load it.
            Some(RootKind::Dummy) => Err(Unusable::Dummy),
            // Whether it is obsolete shows only in what the vCPU is asked to do.
            Some(RootKind::Special) if vcpu.free_obsolete_roots_pending() => {
                Err(Unusable::Obsolete)
            }
            Some(RootKind::Special) => Ok(None),
            Some(RootKind::Shadow(root)) if !self.shadow.is_obsolete(root) => Ok(Some(root)),
            _ => Err(Unusable::Obsolete),
        }
    }

    /// Makes the vCPU load its roots again, because the one in use is not that of the guest's table for `address`, or there
    /// is none: with PAE, what the guest's entry led to may have been no memory when it was loaded. If the guest still sees
    /// no memory there (KVM's own slots are none), nothing comes of it, and faulting again would never end. May sleep.
    #[cold]
    fn load_right_root(&self, vcpu: &Vcpu, address: u64) -> Result<Handled> {
        let table = match vcpu.mmu().guest_level() {
            Some(Level::L1G) => {
                let index = (address >> 30) as usize & 3;
                vcpu.guest_pdptrs().get(index).copied()
            }
            _ => Some(vcpu.guest_root()),
        };
        if !table.is_some_and(|table| vcpu.sees(table_gfn(table))) {
            return Err(EFAULT);
        }
        vcpu.request_free_obsolete_roots();
        Ok(Handled::Retry)
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

/// A fault that can be served: the lock is held, and nothing is stale as long as it is.
struct Ready<'a> {
    lock: WriteGuard<'a>,
    /// The page of the root; none if it has four PAE entries instead.
    root: Option<PagePtr>,
    backing: ReadyBacking,
}

/// What backs the frame.
enum ReadyBacking {
    /// A page that the host maps at this level, as long as the lock is held.
    Resident { level: Level, page: MappedPage },
    /// A page that a reference is held on.
    Held(HostPage),
    /// Nothing.
    Mmio,
}

impl ReadyBacking {
    /// The page that a reference is held on; or else whether the host maps the page, so that its level is known.
    fn into_page(self) -> (Option<HostPage>, bool) {
        match self {
            ReadyBacking::Resident { .. } => (None, true),
            ReadyBacking::Held(page) => (Some(page), false),
            ReadyBacking::Mmio => (None, false),
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

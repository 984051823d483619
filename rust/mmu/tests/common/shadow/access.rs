// SPDX-License-Identifier: GPL-2.0

//! Accesses of the guest: hardware, page faults, emulation, and what of it is
//! allowed.

use super::{
    cpu::{self, Hit, Kind},
    host::Slot,
    paging::Mode,
    Vm, WithGuest,
};
use rmmu_engine::mmu::{
    shadow::{
        guest::{walk, GuestWalk, Paging32, Paging64, PagingEpt, Stop},
        GuestTables, PagePtr, WrongRoot,
    },
    types::{ACC_USER, ACC_WRITE},
    Fault, Gfn, GfnRange, Host, Level, Outcome, Pfn, Spte,
};

/// What an access of the guest came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touch {
    Memory(Gfn),
    /// The guest got a fault.
    Fault,
    Mmio(Gfn),
    /// A write to a read-only slot, which is its user's to serve.
    ReadOnly(Gfn),
    /// The write was emulated.
    Emulated(Gfn),
}

impl Vm {
    /// The guest accesses memory. Panics if it sees what it must not.
    pub fn touch(&mut self, vcpu: usize, va: u64, kind: Kind) -> Touch {
        for _ in 0..60 {
            self.ensure_roots(vcpu);
            let roots = self.vcpus[vcpu].roots.clone().unwrap();
            let rules = self.paging_of(vcpu).rules();
            let hit = cpu::access(&self.machine, vcpu, &roots, va, kind, rules);
            let touch = match hit {
                Hit::Memory(pfn) => Some(Touch::Memory(self.check_hit(vcpu, va, kind, pfn))),
                Hit::Reserved(spte) => self.reserved_fault(vcpu, va, kind, spte),
                Hit::NotPresent => self.page_fault(vcpu, va, kind, false),
                Hit::Protected => self.page_fault(vcpu, va, kind, true),
            };
            self.note_tables();
            if let Some(touch) = touch {
                return touch;
            }
        }
        panic!("the guest makes no progress at {va:#x}: {kind:?}");
    }

    /// The guest stores to a table.
    pub fn store(&mut self, vcpu: usize, va: u64, gpa: u64, value: u64) -> Touch {
        let kind = Kind {
            write: true,
            exec: false,
            user: false,
        };
        let touch = self.touch(vcpu, va, kind);
        match touch {
            Touch::Memory(gfn) => {
                assert_eq!(gfn.0, gpa >> 12, "the kernel's map of a table");
                self.ram.store(gpa, self.paging_of(vcpu).width(), value);
            }
            Touch::Emulated(gfn) => {
                assert_eq!(gfn.0, gpa >> 12);
                self.emulated_store_by(vcpu, gpa, value);
            }
            _ => panic!("{touch:?} for a store to a table"),
        }
        self.note_tables();
        touch
    }

    /// A store to memory that KVM does for the guest.
    pub fn emulated_store(&mut self, gpa: u64, value: u64) {
        self.emulated_store_by(0, gpa, value);
    }

    /// The same, for a vCPU, of which it depends how wide the store is.
    pub fn emulated_store_by(&mut self, vcpu: usize, gpa: u64, value: u64) {
        let paging = self.paging_of(vcpu);
        self.ram.store(gpa, paging.width(), value);
        let gfn = Gfn(gpa >> 12);
        if let Some(slot) = self.machine.valid_slot(gfn) {
            slot.dirty.borrow_mut().insert(gfn.0);
        }
        if self.shadow.indirect_pages() != 0 {
            let bytes = paging.entry_bytes() as usize;
            self.machine.write(|lock| {
                self.shadow
                    .track_write(&self.machine, lock, gpa, bytes, value != 0);
            });
        }
        self.note_tables();
    }

    fn check_hit(&mut self, vcpu: usize, va: u64, kind: Kind, pfn: Pfn) -> Gfn {
        let owners = self.ram.owners(pfn);
        assert!(
            !owners.is_empty(),
            "{va:#x} leads to a page that was taken away"
        );
        let allowed: Vec<Gfn> = owners
            .iter()
            .copied()
            .filter(|&gfn| self.is_allowed(vcpu, va, kind, gfn))
            .collect();
        let Some(&gfn) = allowed.first() else {
            let known = self.vcpus[vcpu].history.get(&(va >> 12));
            panic!(
                "{kind:?} at {va:#x} must not lead to {owners:x?}; the guest's tables said {known:x?}"
            );
        };
        if kind.write {
            assert!(self.ram.backing(gfn).unwrap().writable && !self.ram.is_rom(gfn));
            self.assert_write_is_seen(&allowed);
            // Of frames that share a page and that the address may both lead to, it
            // is the one that the entry was made for whose write is logged.
            let logged = self.machine.valid_slot(gfn).is_some_and(|s| s.logged.get());
            if logged && allowed.len() == 1 {
                self.logged_writes.insert(gfn.0);
            }
        }
        gfn
    }

    /// The guest's tables allow the access, or did when the address was flushed.
    fn is_allowed(&self, vcpu: usize, va: u64, kind: Kind, gfn: Gfn) -> bool {
        let known = self.vcpus[vcpu].history.get(&(va >> 12));
        let paging = self.paging_of(vcpu);
        known.into_iter().flatten().any(|one| {
            // With CR0.WP clear the supervisor writes to read-only pages, too; its
            // dirty bit is set nevertheless.
            let smap = paging.smap && one.access & ACC_USER != 0;
            let without_wp = !paging.wp && !kind.user && kind.write && !smap;
            one.gfn == gfn && (one.allows(&paging, kind) || without_wp)
        })
    }

    /// A write to a table that is shadowed does not go unnoticed. The write came by one
    /// of the frames.
    fn assert_write_is_seen(&self, frames: &[Gfn]) {
        let mut tables = Vec::new();
        self.machine.write(|lock| {
            self.shadow.visit_pages(lock, |page| {
                if frames.contains(&page.gfn) && page.role.has_guest_entries() && !page.unsync {
                    tables.push(*page);
                }
            });
        });
        assert!(
            frames
                .iter()
                .any(|&gfn| tables.iter().all(|page| page.gfn != gfn)),
            "shadowed tables can be written to by {frames:x?}: {tables:x?}"
        );
    }

    fn reserved_fault(&mut self, vcpu: usize, va: u64, kind: Kind, spte: Spte) -> Option<Touch> {
        let format = *self.machine.format();
        assert!(
            spte.is_mmio(&format),
            "an entry with reserved bits: {spte:x?}"
        );
        if spte.mmio_generation() != self.generation.get() {
            return self.page_fault(vcpu, va, kind, true);
        }
        let gfn = spte.mmio_gfn(&format);
        assert!(self.machine.valid_slot(gfn).is_none());
        // The emulator checks permissions itself; here it is the translation that
        // counts.
        let known = self.vcpus[vcpu].history.get(&(va >> 12));
        assert!(known.is_some_and(|all| all.iter().any(|one| one.gfn == gfn)));
        Some(Touch::Mmio(gfn))
    }

    /// Reads the guest's tables for an access.
    pub fn walk(&self, vcpu: usize, va: u64, kind: Kind) -> Result<GuestWalk, Stop> {
        let (context, seen) = (self.context(vcpu), self.seen());
        let paging = self.paging_of(vcpu);
        let code = paging.error_code(kind);
        let mut found = GuestWalk::new();
        match paging.mode {
            Mode::Bits32 => walk::<Paging32, _>(&seen, &context, va, code, &mut found),
            Mode::Ept => walk::<PagingEpt, _>(&seen, &context, va, code, &mut found),
            _ => walk::<Paging64, _>(&seen, &context, va, code, &mut found),
        }
        .map(|()| found)
    }

    fn page_fault(&mut self, vcpu: usize, va: u64, kind: Kind, present: bool) -> Option<Touch> {
        self.faults += 1;
        let paging = self.paging_of(vcpu);
        let walked = self.walk(vcpu, va, kind);
        let mut walked = match walked {
            Ok(walked) => walked,
            Err(Stop::Fault(_)) => return Some(Touch::Fault),
            Err(Stop::Retry) => panic!("nobody else changes entries"),
        };
        let gfn = walked.gfn;
        if let Some(slot) = self.machine.valid_slot(gfn) {
            if present && kind.write && slot.is_tracked(gfn) {
                let roots = self.vcpus[vcpu].roots.clone().unwrap();
                self.shadow.clear_flood(&self.machine, roots.as_root(), va);
                return self.write_protected(gfn, false);
            }
            if kind.write && self.ram.is_rom(gfn) {
                return Some(Touch::ReadOnly(gfn));
            }
            if kind.write && !self.ram.backing(gfn).unwrap().writable {
                // The host copies the page.
                self.invalidate(GfnRange::new(gfn, gfn.add(1)), |ram| {
                    ram.back(gfn, true);
                });
            }
        }
        let has_slot = self.machine.valid_slot(gfn).is_some();
        let write_access = walked.access & ACC_WRITE != 0;
        if kind.write && !write_access && !paging.wp && !kind.user && has_slot {
            walked.write_without_wp(paging.smep);
        }
        let (outcome, own) = match self.map(vcpu, va, kind, &walked) {
            Ok(served) => served,
            Err(WrongRoot) => {
                self.reload(vcpu);
                return None;
            }
        };
        match outcome {
            Outcome::Fixed | Outcome::Spurious | Outcome::Retry => None,
            Outcome::OutOfMemory => {
                self.cache.set((5, 14));
                None
            }
            Outcome::Emulate => {
                assert!(self.machine.valid_slot(gfn).is_none());
                Some(Touch::Mmio(gfn))
            }
            Outcome::WriteProtected => self.write_protected(gfn, own),
        }
    }

    fn write_protected(&mut self, gfn: Gfn, own_table: bool) -> Option<Touch> {
        if self.unprotect.get() && !own_table {
            let helped = self
                .machine
                .write(|lock| self.shadow.unprotect_gfn(&self.machine, lock, gfn));
            if helped {
                return None;
            }
        }
        Some(Touch::Emulated(gfn))
    }

    /// Serves a fault whose address `walked` translated.
    pub fn map(
        &self,
        vcpu: usize,
        va: u64,
        kind: Kind,
        walked: &GuestWalk,
    ) -> Result<(Outcome, bool), WrongRoot> {
        self.with_guest(
            vcpu,
            Map {
                vcpu,
                va,
                kind,
                walked,
            },
        )
    }

    /// A fault on a frame of the guest, before its level is known.
    pub fn fault(&self, gfn: Gfn, kind: Kind) -> Fault<'_, Slot> {
        let slot = self.machine.valid_slot(gfn);
        let backing = self.ram.backing(gfn);
        Fault {
            gfn,
            write: kind.write,
            exec: kind.exec,
            prefetch: false,
            req_level: Level::L4K,
            goal_level: Level::L4K,
            max_level: Level::MAX_HUGE,
            huge_page_disallowed: kind.exec && self.machine.nx.get(),
            nx_workaround: self.machine.nx.get(),
            pfn: backing.map_or(Pfn(0), |page| page.pfn),
            slot,
            map_writable: backing.is_some_and(|page| page.writable) && !self.ram.is_rom(gfn),
            write_tracked: false,
            dirty_track: slot.is_some_and(|slot| slot.logged.get()),
            mmio_generation: self.generation.get(),
            memtype: crate::common::format::write_back(self.machine.format()),
            is_host_mmio: self.machine.host_mmio.get(),
        }
    }

    /// The highest level at which slot and host let a frame be mapped.
    pub fn max_level(&self, gfn: Gfn) -> Level {
        let slot = self.machine.valid_slot(gfn);
        let huge = self.ram.is_huge(gfn)
            && slot.is_some_and(|slot| !slot.lpage_disallowed(gfn, Level::L2M));
        if huge {
            Level::L2M
        } else {
            Level::L4K
        }
    }

    /// Sets a fault's levels.
    pub fn adjust(&self, fault: &mut Fault<'_, Slot>, max: Level) {
        fault.max_level = max;
        let logged = fault.slot.is_some_and(|slot| slot.logged.get());
        if fault.slot.is_none() || logged || max == Level::L4K {
            return;
        }
        fault.req_level = self.max_level(fault.gfn).min(max);
        if fault.huge_page_disallowed {
            return;
        }
        fault.goal_level = fault.req_level;
        fault.pfn = Pfn(fault.pfn.0 & !fault.goal_level.gfn_mask());
    }
}

struct Map<'a> {
    vcpu: usize,
    va: u64,
    kind: Kind,
    walked: &'a GuestWalk,
}

impl WithGuest for Map<'_> {
    type Output = Result<(Outcome, bool), WrongRoot>;

    fn run<G: GuestTables>(self, vm: &Vm, guest: &G) -> Self::Output {
        let walked = self.walked;
        let roots = vm.vcpus[self.vcpu].roots.as_ref().unwrap();
        vm.machine.write(|lock| {
            vm.make_room(lock);
            let obsolete = |page: &PagePtr| vm.shadow.is_obsolete(*page);
            if roots.pages(&vm.machine).iter().any(obsolete) {
                return Ok((Outcome::Retry, false));
            }
            let mut fault = vm.fault(walked.gfn, self.kind);
            vm.shadow.map_guest(
                &vm.machine,
                lock,
                &mut vm.acting(self.vcpu),
                guest,
                roots.as_root(),
                self.va,
                walked,
                &mut fault,
                |fault| vm.adjust(fault, walked.level),
            )
        })
    }
}

// SPDX-License-Identifier: GPL-2.0

//! A VM whose guest has no tables of its own: addresses are frames.

use super::{
    cpu::{self, Hit, Kind, Roots, Rules},
    paging::P,
    Vm,
};
use rmmu_engine::mmu::{
    shadow::PageRole, types::ACC_ALL, FastOutcome, Gfn, Host, Level, Outcome, Pfn,
};

/// The role of a direct root of four levels.
pub const DIRECT: PageRole = PageRole(4 | 1 << 7 | (ACC_ALL as u32) << 8);

impl Vm {
    /// Gives a vCPU a direct root, with PAE or four levels.
    pub fn load_direct(&mut self, vcpu: usize, pae: bool) {
        let ad_disabled = !self.machine.format().ad_enabled;
        let direct = PageRole(DIRECT.0 | u32::from(ad_disabled) << 16);
        let roots = if pae {
            let role = direct.with_level(Level::L2M);
            Roots::Pae(core::array::from_fn(|i| {
                self.alloc_root(vcpu, Gfn((i as u64) << 18), role).hpa().0 | P
            }))
        } else {
            Roots::Page(self.alloc_root(vcpu, Gfn(0), direct))
        };
        self.vcpus[vcpu].roots = Some(roots);
        self.machine.tlbs.borrow_mut()[vcpu].flush();
    }

    /// Serves a fault of a guest without tables.
    pub fn map_direct(&self, vcpu: usize, gfn: u64, kind: Kind) -> Outcome {
        self.machine.write(|lock| {
            self.make_room(lock);
            let mut fault = self.fault(Gfn(gfn), kind);
            self.adjust(&mut fault, Level::MAX_HUGE);
            let mut acting = self.acting(vcpu);
            self.shadow.map_direct(
                &self.machine,
                lock,
                &mut acting,
                self.root(vcpu),
                &mut fault,
            )
        })
    }

    /// A fast fault of a guest without tables.
    pub fn fast_direct(&self, vcpu: usize, gfn: u64, kind: Kind) -> FastOutcome {
        let slot = self.machine.valid_slot(Gfn(gfn));
        let logged = slot.is_some_and(|slot| slot.logged.get());
        self.shadow.fast_fault(
            &self.machine,
            self.root(vcpu),
            Gfn(gfn),
            kind.write,
            kind.exec,
            slot,
            logged,
            |_, _, _| {},
        )
    }

    /// What hardware makes of an access of a guest without tables.
    pub fn hit_direct(&self, vcpu: usize, gfn: u64, kind: Kind) -> Hit {
        let roots = self.vcpus[vcpu].roots.as_ref().unwrap();
        let hit = cpu::access(
            &self.machine,
            vcpu,
            roots,
            gfn << 12,
            kind,
            Rules::default(),
        );
        if let Hit::Memory(Pfn(pfn)) = hit {
            let owners = self.ram.owners(Pfn(pfn));
            assert!(owners.contains(&Gfn(gfn)), "{gfn:#x} leads to {pfn:#x}");
        }
        hit
    }

    /// The guest accesses a frame, which must be in a slot.
    pub fn touch_direct(&mut self, vcpu: usize, gfn: u64, kind: Kind) {
        for _ in 0..10 {
            match self.hit_direct(vcpu, gfn, kind) {
                Hit::Memory(_) => {
                    if kind.write && self.machine.slots[0].logged.get() {
                        self.logged_writes.insert(gfn);
                    }
                    return;
                }
                Hit::Reserved(spte) => panic!("an entry with reserved bits: {spte:x?}"),
                Hit::NotPresent => {}
                Hit::Protected => {
                    if self.fast_direct(vcpu, gfn, kind) != FastOutcome::Invalid {
                        continue;
                    }
                }
            }
            let outcome = self.map_direct(vcpu, gfn, kind);
            assert!(
                matches!(outcome, Outcome::Fixed | Outcome::Spurious),
                "{outcome:?} for {gfn:#x}"
            );
        }
        panic!("the guest makes no progress at {gfn:#x}: {kind:?}");
    }
}

// SPDX-License-Identifier: GPL-2.0

//! A VM for tests of the engine.

// Every test crate uses its own part of this.
#![allow(dead_code)]

pub mod format;
pub mod host;
pub mod model;
pub mod tlb;

use host::{Cache, FakeHost, Slot};
use rmmu_engine::mmu::{
    audit::{Audit, Frames},
    sync::atomic::Ordering,
    types::PAGE_SHIFT,
    Around, FastOutcome, Fault, Flush, Gfn, GfnRange, Host, Level, MmuWrite, Outcome, Pfn, Role,
    Spte, SpteFormat, TablePtr, Tdp,
};
use std::{collections::BTreeMap, env};

/// A VM: a host, an MMU, one slot of memory.
pub struct Vm {
    /// The host.
    pub host: FakeHost,
    /// What is tested.
    pub tdp: Tdp,
    /// The slot.
    pub slot: Slot,
    /// The role of the normal root.
    pub role: Role,
}

/// All frames are in the slot, and none is a table.
pub struct AllFrames;

impl Frames for AllFrames {
    fn has_slot(&self, _smm: bool, _gfn: Gfn) -> bool {
        true
    }

    fn may_be_writable(&self, _smm: bool, _gfn: Gfn, _level: Level, _: &MmuWrite<'_>) -> bool {
        true
    }
}

/// What a random test does of its full work: all of it, unless `RMMU_TEST_PERCENT`
/// says how much.
pub fn portion(full: u64) -> u64 {
    match env::var("RMMU_TEST_PERCENT") {
        Ok(percent) => full * percent.parse::<u64>().expect("a number") / 100,
        Err(_) => full,
    }
}

/// A deterministic source of numbers.
pub struct Random(pub u64);

impl Random {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// A range of frames.
pub fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn(start), Gfn(end))
}

/// A read of `gfn`, which the host backs by `pfn` at `level`.
pub fn read_fault<'s>(format: &SpteFormat, gfn: u64, pfn: u64, level: Level) -> Fault<'s, Slot> {
    Fault {
        gfn: Gfn(gfn),
        write: false,
        exec: false,
        prefetch: false,
        req_level: level,
        goal_level: level,
        max_level: Level::MAX_HUGE,
        huge_page_disallowed: false,
        nx_workaround: false,
        pfn: Pfn(pfn & !level.gfn_mask()),
        slot: None,
        map_writable: true,
        write_tracked: false,
        dirty_track: false,
        mmio_generation: 0,
        memtype: format::write_back(format),
        is_host_mmio: false,
    }
}

impl Vm {
    /// A VM with so many vCPUs, all with a root.
    pub fn new(format: SpteFormat, vcpus: usize) -> Vm {
        let vm = Vm {
            role: format::root_role(&format, false),
            host: FakeHost::new(format, vcpus),
            tdp: Tdp::new(),
            slot: Slot::default(),
        };
        for vcpu in 0..vcpus {
            vm.load_root(vcpu, vm.role);
        }
        vm
    }

    /// Gives a vCPU a root, with a reference, and flushes it as KVM does.
    pub fn load_root(&self, vcpu: usize, role: Role) -> TablePtr {
        self.unload_root(vcpu);
        let root = self
            .host
            .read(|lock| {
                let mut cache = Cache(&self.host);
                self.tdp
                    .find_or_alloc_root(&self.host, lock, role, &mut cache)
            })
            .expect("no memory for a root");
        let mut tlb = self.host.tlb(vcpu);
        tlb.root = Some(root);
        tlb.obsolete = false;
        tlb.flush();
        root
    }

    /// Takes the root from a vCPU.
    pub fn unload_root(&self, vcpu: usize) {
        let old = {
            let mut tlb = self.host.tlb(vcpu);
            tlb.flush();
            tlb.root.take()
        };
        if let Some(old) = old {
            self.host.read(|_| self.tdp.put_root(&self.host, old));
        }
    }

    /// The root a vCPU uses.
    pub fn root(&self, vcpu: usize) -> TablePtr {
        self.host.tlb(vcpu).root.expect("the vCPU has no root")
    }

    /// A read fault on `gfn` in the slot.
    pub fn fault(&self, gfn: u64, pfn: u64, level: Level) -> Fault<'_, Slot> {
        Fault {
            slot: Some(&self.slot),
            ..read_fault(self.host.format(), gfn, pfn, level)
        }
    }

    /// Serves a fault.
    pub fn map(&self, vcpu: usize, mut fault: Fault<'_, Slot>) -> Outcome {
        let root = self.root(vcpu);
        self.host.read(|lock| {
            let mut cache = Cache(&self.host);
            self.tdp.map(&self.host, lock, root, &mut fault, &mut cache)
        })
    }

    /// Serves a fault and maps what is around it.
    pub fn map_around(
        &self,
        vcpu: usize,
        mut fault: Fault<'_, Slot>,
        around: &mut impl Around,
    ) -> Outcome {
        let root = self.root(vcpu);
        self.host.read(|lock| {
            let mut cache = Cache(&self.host);
            self.tdp
                .map_around(&self.host, lock, root, &mut fault, &mut cache, around)
        })
    }

    /// Maps for writing, where each frame is backed by the frame of its number.
    pub fn map_write(&self, gfn: u64, level: Level) -> Outcome {
        let fault = self.fault(gfn, gfn, level);
        self.map(
            0,
            Fault {
                write: true,
                ..fault
            },
        )
    }

    /// A fast fault of the first vCPU.
    pub fn fast(&self, gfn: u64, write: bool, dirty_track: bool) -> FastOutcome {
        let slot = Some(&self.slot);
        let root = self.root(0);
        self.tdp.fast_fault(
            &self.host,
            root,
            Gfn(gfn),
            write,
            false,
            slot,
            dirty_track,
            |_, _, _| {},
        )
    }

    /// Unmaps for a notifier, with the flush that is owed.
    pub fn unmap(&self, range: GfnRange) {
        self.host.write(|lock| {
            let flush = self
                .tdp
                .unmap_range(&self.host, lock, None, range, true, Flush::none());
            self.host.spend(flush, lock);
        });
    }

    /// Invalidates all roots and makes vCPUs look, as KVM does under the lock.
    pub fn invalidate(&self) {
        self.host.write(|lock| {
            self.tdp.invalidate_roots(&self.host, lock);
            for tlb in &self.host.tlbs {
                let mut tlb = tlb.lock().unwrap();
                tlb.obsolete = true;
                tlb.flush();
            }
        });
    }

    /// Everything that is mapped below the root of a vCPU.
    pub fn leaves(&self, vcpu: usize) -> BTreeMap<u64, (Level, Spte)> {
        let mut leaves = BTreeMap::new();
        let mut from = Some(Gfn(0));
        let root = self.root(vcpu);
        while let Some(gfn) = from {
            from = self
                .tdp
                .visit_leaves(&self.host, root, gfn, 1000, |gfn, level, spte| {
                    leaves.insert(gfn.0, (level, spte));
                });
        }
        leaves
    }

    /// The entry that maps `gfn`, and its level.
    pub fn leaf(&self, gfn: u64) -> Option<(Level, Spte)> {
        let mut sptes = [Spte::NONPRESENT; 6];
        let (level, _) = self
            .tdp
            .walk(&self.host, self.root(0), Gfn(gfn), &mut sptes)?;
        let spte = sptes[usize::from(level.get())];
        spte.is_leaf(level).then_some((level, spte))
    }

    /// The host frame that `gfn` is mapped to.
    pub fn pfn_of(&self, gfn: u64) -> Option<u64> {
        let (level, spte) = self.leaf(gfn)?;
        Some(spte.pfn(self.host.format()).0 + (gfn & level.gfn_mask()))
    }

    /// Panics if the engine's own audit finds anything. Nothing changes meanwhile.
    pub fn assert_audit(&self) {
        let mut found = Vec::new();
        let mut audit = Audit::new(|finding| found.push(finding));
        let host = &self.host;
        host.write(|lock| self.tdp.audit(host, lock, &AllFrames, &mut audit));
        audit.compare_leaves(|level| self.counted(level));
        assert_eq!(found, Vec::new(), "what the audit found");
    }

    /// Ends the VM and checks that nothing is left of it.
    pub fn destroy(self) {
        self.destroy_and(|_| ());
    }

    /// The same, with a last look at what the host has counted.
    pub fn destroy_and<R>(self, look: impl FnOnce(&FakeHost) -> R) -> R {
        self.assert_audit();
        for vcpu in 0..self.host.tlbs.len() {
            self.unload_root(vcpu);
        }
        self.host.write(|lock| self.tdp.uninit(&self.host, lock));
        assert!(self.tdp.is_empty());
        assert_eq!(self.tdp.nx_candidates(), 0);
        self.host.assert_nothing_left();
        look(&self.host)
    }

    /// Leaves of a level, as the host counts them.
    pub fn counted(&self, level: Level) -> i64 {
        self.host.leaves[level.slot()].load(Ordering::Relaxed)
    }
}

/// The address of a frame.
pub const fn address(frame: u64) -> u64 {
    frame << PAGE_SHIFT
}

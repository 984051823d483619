// SPDX-License-Identifier: GPL-2.0

//! A small VM, and the things that happen to one.

use crate::{
    cpu::{Cache, Cpu},
    explore::{race, saw},
    format,
    hardware::Access,
    machine::{Machine, Slot},
    memory::FRAMES,
};
use loom::thread::{self, JoinHandle};
use rmmu_engine::mmu::{
    FastOutcome, Fault, Flush, Gfn, GfnRange, Host, Level, MmuWrite, Outcome, Pfn, Role, Spte,
    SpteFormat, TablePtr, Tdp,
};
use std::{ops::Deref, sync::Arc};

/// How often an access may fault before that is no progress.
const FAULTS: usize = 6;

/// NPT, which has nothing against the small pages of a model.
pub fn npt() -> SpteFormat {
    for_models(format::npt())
}

/// EPT without accessed and dirty bits.
pub fn ept_without_ad() -> SpteFormat {
    for_models(format::ept(false))
}

/// EPT with accessed and dirty bits, where the CPU can log dirty pages.
pub fn ept_with_ad() -> SpteFormat {
    for_models(format::ept(true))
}

fn for_models(format: SpteFormat) -> SpteFormat {
    SpteFormat {
        rsvd: [[0; 5]; 2],
        max_gfn: Gfn(FRAMES - 1),
        ..format
    }
}

/// A range of frames.
pub fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn(start), Gfn(end))
}

/// A VM with an MMU and one slot of memory.
pub struct Vm {
    pub machine: Machine,
    pub tdp: Tdp,
    role: Role,
    cpus: usize,
}

/// A CPU of the VM, and who runs there.
pub struct Actor<'v> {
    vm: &'v Vm,
    cpu: Cpu<'v>,
}

impl Vm {
    /// A VM whose roots are of `level`, with so many vCPUs that have the root.
    pub fn new(format: SpteFormat, level: Level, cpus: usize) -> Vm {
        Vm::on(Machine::new(format, cpus), level, cpus)
    }

    /// As [`new`](Vm::new), with NPT and the NX mitigation.
    pub fn with_nx(level: Level, cpus: usize) -> Vm {
        let mut machine = Machine::new(npt(), cpus);
        machine.nx = true;
        Vm::on(machine, level, cpus)
    }

    fn on(machine: Machine, level: Level, cpus: usize) -> Vm {
        let role = Role {
            level,
            ..format::root_role(&machine.format, false)
        };
        let vm = Vm {
            machine,
            tdp: Tdp::new(),
            role,
            cpus,
        };
        for cpu in 0..cpus {
            vm.on_cpu(cpu).load_root();
        }
        vm
    }

    pub fn on_cpu(&self, id: usize) -> Actor<'_> {
        Actor {
            vm: self,
            cpu: Cpu::new(&self.machine, id),
        }
    }

    /// Runs `f` on CPU `id`, at the same time as everything else.
    pub fn spawn<R: 'static>(
        self: &Arc<Self>,
        id: usize,
        f: impl FnOnce(&Actor<'_>) -> R + 'static,
    ) -> JoinHandle<R> {
        let vm = Arc::clone(self);
        race();
        thread::spawn(move || f(&vm.on_cpu(id)))
    }

    /// Ends the VM and checks that nothing is left of it.
    pub fn destroy(&self) {
        for cpu in 0..self.cpus {
            self.on_cpu(cpu).unload_root();
        }
        let actor = self.on_cpu(0);
        actor.cpu.write(|lock| self.tdp.uninit(&actor.cpu, lock));
        assert!(self.tdp.is_empty());
        assert_eq!(self.tdp.nx_candidates(), 0);
        self.machine.assert_nothing_left();
    }

    /// Leaves of a level, as the host counts them.
    pub fn leaves(&self, level: Level) -> i64 {
        self.machine.counts.lock().unwrap().leaves[level.slot()]
    }

    /// Leaves of a level there ever were.
    pub fn leaves_ever(&self, level: Level) -> i64 {
        self.machine.counts.lock().unwrap().leaves_ever[level.slot()]
    }

    /// User space has what is in the page behind a frame, or will be told to
    /// fetch it.
    pub fn assert_copied_or_logged(&self, gfn: Gfn) {
        let (memory, slot) = (&self.machine.memory, &self.machine.slot);
        let logged = (0..self.cpus).any(|cpu| self.machine.vcpu(cpu).logged.contains(&gfn));
        assert!(
            logged || slot.contains(gfn) || memory.is_copied(memory.behind(gfn)),
            "a write is lost to the dirty log"
        );
    }

    /// Linked tables, roots apart.
    pub fn tables(&self) -> i64 {
        self.machine.counts.lock().unwrap().tables
    }
}

impl<'v> Deref for Actor<'v> {
    type Target = Cpu<'v>;

    fn deref(&self) -> &Cpu<'v> {
        &self.cpu
    }
}

impl Actor<'_> {
    /// Gives the vCPU a root, with a reference, and flushes it as KVM does.
    pub fn load_root(&self) {
        self.unload_root();
        let (vm, cpu) = (self.vm, &self.cpu);
        let root = cpu
            .read(|lock| {
                let mut cache = Cache(cpu);
                vm.tdp.find_or_alloc_root(cpu, lock, vm.role, &mut cache)
            })
            .expect("no memory for a root");
        let mut hardware = cpu.hardware();
        hardware.root = Some(root);
        hardware.obsolete = false;
        hardware.flush();
    }

    /// Takes the root from the vCPU.
    pub fn unload_root(&self) {
        let root = {
            let mut hardware = self.cpu.hardware();
            hardware.flush();
            hardware.root.take()
        };
        if let Some(root) = root {
            // The reference kept it.
            self.vm.machine.table_at(root.hpa());
            self.vm.tdp.put_root(&self.cpu, root);
        }
    }

    /// The root that the vCPU uses.
    pub fn root(&self) -> TablePtr {
        self.cpu.hardware().root.expect("the vCPU has no root")
    }

    /// An access to `gfn`, to be mapped at `level`.
    pub fn fault(&self, gfn: u64, write: bool, level: Level) -> Fault<'_, Slot> {
        let format = &self.vm.machine.format;
        let first = Gfn(gfn).round_down(level);
        Fault {
            gfn: Gfn(gfn),
            write,
            exec: false,
            prefetch: false,
            req_level: level,
            goal_level: level,
            max_level: Level::MAX_HUGE,
            huge_page_disallowed: false,
            nx_workaround: self.vm.machine.nx,
            pfn: self.vm.machine.memory.behind(first),
            slot: Some(&self.vm.machine.slot),
            map_writable: true,
            write_tracked: false,
            dirty_track: false,
            mmio_generation: 0,
            memtype: format::write_back(format),
            is_host_mmio: false,
        }
    }

    /// Serves a fault. `fault` is made under the lock: by then no notifier is
    /// about to take away the page that it says.
    pub fn map<'f>(&'f self, fault: impl FnOnce() -> Fault<'f, Slot>) -> Outcome {
        let root = self.root();
        let outcome = self.cpu.read(|lock| {
            let (cpu, mut cache) = (&self.cpu, Cache(&self.cpu));
            self.vm.tdp.map(cpu, lock, root, &mut fault(), &mut cache)
        });
        saw(format!("{outcome:?}"));
        outcome
    }

    /// Maps a frame for writing.
    pub fn map_write(&self, gfn: u64, level: Level) -> Outcome {
        self.map(|| self.fault(gfn, true, level))
    }

    /// A fast fault.
    pub fn fast(&self, gfn: u64, write: bool, dirty_track: bool) -> FastOutcome {
        let (cpu, root) = (&self.cpu, self.root());
        let slot = Some(&self.vm.machine.slot);
        let gfn = Gfn(gfn);
        let outcome = self.vm.tdp.fast_fault(
            cpu,
            root,
            gfn,
            write,
            false,
            slot,
            dirty_track,
            |_, _, _| (),
        );
        saw(format!("fast {outcome:?}"));
        outcome
    }

    /// The guest accesses a frame; its faults are served as `fault` says. Returns
    /// the page it got.
    pub fn guest<'f>(&'f self, gfn: u64, write: bool, fault: impl Fn() -> Fault<'f, Slot>) -> Pfn {
        for _ in 0..FAULTS {
            match self.cpu.access(Gfn(gfn), write) {
                Access::Hit(pfn) => return pfn,
                Access::Obsolete => {
                    saw("new root");
                    self.load_root();
                }
                Access::Fault { present } => {
                    let dirty_track = fault().dirty_track;
                    // An old page is not present when it has no accessed bit.
                    let fast = present || !self.vm.machine.format.ad_enabled;
                    if !fast || self.fast(gfn, write, dirty_track) == FastOutcome::Invalid {
                        self.map(&fault);
                    }
                }
            }
        }
        panic!("the guest makes no progress at {gfn}");
    }

    /// The guest writes to a frame, which is mapped at `level`.
    pub fn guest_write(&self, gfn: u64, level: Level) -> Pfn {
        self.guest(gfn, true, || self.fault(gfn, true, level))
    }

    /// The guest writes to a small page of a slot that logs.
    pub fn guest_write_logged(&self, gfn: u64) -> Pfn {
        self.guest(gfn, true, || Fault {
            dirty_track: true,
            ..self.fault(gfn, true, Level::L4K)
        })
    }

    /// Unmaps a range, as a notifier demands.
    pub fn unmap(&self, range: GfnRange) {
        self.cpu.write(|lock| self.unmap_locked(lock, range));
    }

    fn unmap_locked(&self, lock: &mut MmuWrite<'_>, range: GfnRange) {
        let tdp = &self.vm.tdp;
        let flush = tdp.unmap_range(&self.cpu, lock, None, range, true, Flush::none());
        self.cpu.spend(flush, lock);
    }

    /// The host takes back the pages behind a range, and gives others instead.
    pub fn take_back(&self, range: GfnRange) {
        let memory = &self.vm.machine.memory;
        let gone = self.cpu.write(|lock| {
            saw(format!("{} pages mapped", self.vm.leaves(Level::L4K)));
            let gone = memory.replace(range);
            self.unmap_locked(lock, range);
            gone
        });
        for pfn in gone {
            memory.give_back(pfn);
        }
    }

    /// Makes the pages of the range old.
    pub fn age(&self, range: GfnRange) -> bool {
        self.vm.tdp.age(&self.cpu, None, range, false)
    }

    /// Clears the dirty bits of the range, and flushes.
    pub fn clear_dirty(&self, range: GfnRange) {
        let (tdp, cpu) = (&self.vm.tdp, &self.cpu);
        cpu.read(|lock| tdp.clear_dirty_range(cpu, lock, false, range));
        cpu.flush_all();
    }

    /// User space fetches the dirty log and copies the pages that are in it.
    /// The log is taken with `wrprot`, or by dirty bits.
    pub fn harvest(&self, wrprot: bool) {
        let (vm, cpu) = (self.vm, &self.cpu);
        let slot = &vm.machine.slot;
        vm.machine.for_each_vcpu(|hardware| {
            for gfn in hardware.logged.drain(..) {
                slot.mark(gfn);
            }
        });
        let dirty = cpu.write(|lock| {
            let dirty = slot.harvest();
            vm.tdp
                .clear_dirty_masked(cpu, lock, false, Gfn(0), dirty, wrprot);
            dirty
        });
        cpu.flush_all();
        for gfn in (0..FRAMES).map(Gfn).filter(|gfn| dirty >> gfn.0 & 1 != 0) {
            saw("copied");
            vm.machine.memory.copy(vm.machine.memory.behind(gfn));
        }
    }

    /// Invalidates all roots, and makes vCPUs look.
    pub fn invalidate(&self) {
        self.cpu.write(|lock| {
            self.vm.tdp.invalidate_roots(&self.cpu, lock);
            self.vm.machine.for_each_vcpu(|hardware| {
                hardware.obsolete = true;
                hardware.flush();
            });
        });
    }

    /// The entry that covers `gfn`, and its level.
    pub fn entry(&self, gfn: u64) -> (Level, Spte) {
        let mut sptes = [Spte::NONPRESENT; 6];
        let (level, _) = self
            .vm
            .tdp
            .walk(&self.cpu, self.root(), Gfn(gfn), &mut sptes)
            .expect("the root does not cover the frame");
        (level, sptes[usize::from(level.get())])
    }
}

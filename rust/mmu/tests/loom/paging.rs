// SPDX-License-Identifier: GPL-2.0

//! A small VM whose guest has tables, and what its CPUs and KVM do with them.

use crate::{
    cpu::Cpu,
    explore::{race, saw},
    guest::{target, to, Access, Acting, Guest, Tables},
    machine::{Machine, Slot},
    memory::FRAMES,
    vm::npt,
};
use loom::{
    sync::atomic::{fence, Ordering},
    thread::{self, JoinHandle},
};
use rmmu_engine::mmu::{
    shadow::{GuestTable, GuestWalk, PagePtr, PageRole, Root, Shadow},
    types::ACC_ALL,
    Fault, Gfn, Host, Level, Outcome, Pfn, ENTRIES,
};
use std::{ops::Deref, sync::Arc};

/// How often an access may fault before that is no progress.
const FAULTS: usize = 6;

/// Tables of the guest: from the root down, each leads to the next by its first entry.
const TABLES: [u64; 3] = [7, 6, 5];
/// Another root, which leads to the same tables.
const OTHER_ROOT: u64 = 4;

/// See the module.
pub struct Vm {
    pub machine: Machine,
    pub shadow: Shadow,
    role: PageRole,
    cpus: usize,
}

/// A CPU of the VM, and who runs there.
pub struct Actor<'v> {
    vm: &'v Vm,
    cpu: Cpu<'v>,
}

impl Vm {
    /// A guest with tables of so many levels, whose last one maps frame 0 at pages 0
    /// and 1. No CPU has a root.
    pub fn new(level: Level, cpus: usize) -> Vm {
        let mut machine = Machine::new(npt(), 0);
        machine.rcu = crate::rcu::Rcu::new(cpus);
        machine.guest = Guest::new(cpus);
        let shadow = Shadow::new(100);
        // SAFETY: Fresh, and there as long as the machine.
        unsafe { shadow.set_buckets(machine.guest.buckets()) };
        let vm = Vm {
            machine,
            shadow,
            role: PageRole(u32::from(level.get()) | u32::from(ACC_ALL) << 8),
            cpus,
        };
        for tables in TABLES[..usize::from(level.get())].windows(2) {
            vm.machine.guest.store(tables[0], 0, to(tables[1]));
        }
        for index in 0..ENTRIES {
            vm.machine.guest.store(vm.table(Level::L4K), index, to(0));
        }
        vm
    }

    /// As [`new`](Vm::new); all CPUs have the root, and the pages are mapped.
    pub fn mapped(level: Level, cpus: usize) -> Vm {
        let vm = Vm::new(level, cpus);
        for cpu in 0..cpus {
            vm.on_cpu(cpu).load_cr3(vm.table(level));
        }
        for page in 0..ENTRIES as u64 {
            assert_eq!(vm.on_cpu(0).read(page), 0);
        }
        vm
    }

    /// As [`mapped`](Vm::mapped); the table of the last level is unsync.
    pub fn unsync(level: Level, cpus: usize) -> Vm {
        let vm = Vm::mapped(level, cpus);
        assert!(vm.on_cpu(0).map_table(vm.table(Level::L4K)));
        vm
    }

    /// As [`unsync`](Vm::unsync), but the CPUs have gone on to another root, below
    /// which nothing is linked yet. The old one stays, without a user.
    pub fn with_other_root(level: Level, cpus: usize) -> Vm {
        let vm = Vm::unsync(level, cpus);
        let first = vm.machine.guest.load(vm.table(level), 0);
        vm.machine.guest.store(OTHER_ROOT, 0, first);
        for cpu in 0..cpus {
            vm.on_cpu(cpu).load_cr3(OTHER_ROOT);
        }
        vm.on_cpu(0).map_table(vm.table(Level::L4K));
        vm
    }

    /// A guest without paging. All CPUs have the root. Frame 0 was mapped for writing,
    /// and protected for the dirty log.
    pub fn direct(cpus: usize) -> Vm {
        const DIRECT: u32 = 1 << 7;
        let mut vm = Vm::new(Level::L2M, cpus);
        vm.role = PageRole(vm.role.0 | DIRECT);
        for cpu in 0..cpus {
            vm.on_cpu(cpu).load_cr3(0);
        }
        let (shadow, slot) = (&vm.shadow, &vm.machine.slot);
        let cpu = vm.on_cpu(0);
        let root = cpu.root();
        cpu.write(|lock| {
            let mut fault = Fault {
                write: true,
                map_writable: true,
                ..cpu.fault_at(Gfn(0))
            };
            let acting = &mut cpu.acting();
            let outcome = shadow.map_direct(&*cpu, lock, acting, Root::Page(root), &mut fault);
            assert_eq!(outcome, Outcome::Fixed);
            let flush = shadow.write_protect_slot(&*cpu, lock, slot, Level::L4K);
            cpu.spend(flush, lock);
        });
        drop(cpu);
        vm
    }

    /// The guest's table of a level.
    pub fn table(&self, level: Level) -> u64 {
        TABLES[self.role.level().slot() - level.slot()]
    }

    pub fn on_cpu(&self, id: usize) -> Actor<'_> {
        Actor {
            vm: self,
            cpu: Cpu::new(&self.machine, id),
        }
    }

    /// Runs `f` on CPU `id`, at the same time as everything else.
    pub fn spawn(
        self: &Arc<Self>,
        id: usize,
        f: impl FnOnce(&Actor<'_>) + 'static,
    ) -> JoinHandle<()> {
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
        actor.cpu.write(|lock| self.shadow.uninit(&actor.cpu, lock));
        assert_eq!(self.shadow.pages(), 0);
        assert_eq!(self.shadow.indirect_pages(), 0);
        self.machine.guest.assert_nothing_left();
        self.machine.assert_nothing_left();
    }
}

impl<'v> Deref for Actor<'v> {
    type Target = Cpu<'v>;

    fn deref(&self) -> &Cpu<'v> {
        &self.cpu
    }
}

impl<'v> Actor<'v> {
    fn guest(&self) -> &'v Guest {
        &self.cpu.machine.guest
    }

    fn acting(&self) -> Acting<'_, 'v> {
        Acting {
            cpu: &self.cpu,
            role: self.vm.role,
            interrupted: false,
        }
    }

    /// The guest loads CR3.
    pub fn load_cr3(&self, table: u64) {
        self.unload_root();
        self.guest().vcpu(self.cpu.id).cr3 = table;
        self.load_root();
    }

    /// Gives the vCPU the root of the guest's tables, as KVM does.
    fn load_root(&self) {
        let (vm, cpu) = (self.vm, &self.cpu);
        let gfn = Gfn(self.guest().vcpu(cpu.id).cr3);
        let root = cpu.write(|lock| {
            let source = &mut self.acting();
            vm.shadow.alloc_root(cpu, lock, source, gfn, vm.role)
        });
        self.guest().vcpu(cpu.id).root = root;
        self.flush();
    }

    /// Takes the root from the vCPU.
    pub fn unload_root(&self) {
        let root = {
            let mut hardware = self.guest().vcpu(self.cpu.id);
            hardware.flush();
            hardware.root.take()
        };
        let (vm, cpu) = (self.vm, &self.cpu);
        cpu.write(|lock| vm.shadow.put_roots(cpu, lock, root));
    }

    /// The root that the vCPU uses.
    pub fn root(&self) -> PagePtr {
        let root = self.guest().vcpu(self.cpu.id).root;
        root.expect("the vCPU has no root")
    }

    /// The guest flushes its TLB.
    pub fn flush(&self) {
        self.flush_with(false);
    }

    /// As [`flush`](Actor::flush); its tables may be unreadable just then.
    pub fn flush_with(&self, unreadable: bool) {
        let (vm, cpu, root) = (self.vm, &self.cpu, self.root());
        let unsync = vm.shadow.is_unsync(root);
        saw(format!("unsync {unsync}"));
        if unsync {
            let tables = Tables {
                guest: self.guest(),
                unreadable,
            };
            cpu.write(|lock| {
                let acting = &mut self.acting();
                vm.shadow.sync_root(cpu, lock, acting, &tables, root);
            });
        }
        self.guest().vcpu(cpu.id).flush();
    }

    /// The guest reads at a virtual page; returns the frame that it got.
    pub fn read(&self, page: u64) -> u64 {
        for _ in 0..FAULTS {
            let access = self.guest().vcpu(self.cpu.id).read(&self.cpu, page);
            match access {
                Access::Hit(gfn) => return gfn,
                Access::Fault => self.fault(page),
                Access::Obsolete => self.look_for_root(),
            }
        }
        panic!("the guest makes no progress at {page}");
    }

    /// Does what the vCPU was asked for.
    fn look_for_root(&self) {
        self.guest().vcpu(self.cpu.id).obsolete = false;
        if self.vm.shadow.is_obsolete(self.root()) {
            saw("new root");
            self.unload_root();
            self.load_root();
        }
    }

    /// What the guest's tables say.
    fn walk(&self, page: u64) -> GuestWalk {
        let top = self.vm.role.level();
        let mut walk = GuestWalk::new();
        (walk.top, walk.access) = (top, ACC_ALL);
        let (mut table, mut level) = (self.guest().vcpu(self.cpu.id).cr3, top);
        loop {
            let index = Gfn(page).index(level);
            let entry = self.guest().load(table, index);
            walk.tables[level.slot()] = GuestTable {
                entry_gpa: entry_gpa(table, index),
                entry,
                access: ACC_ALL,
            };
            let next = target(entry).expect("the guest does not reach what is not there");
            match level.child() {
                Some(child) => (table, level) = (next, child),
                None => {
                    walk.gfn = Gfn(next);
                    return walk;
                }
            }
        }
    }

    /// A read of a frame.
    fn fault_at(&self, gfn: Gfn) -> Fault<'v, Slot> {
        Fault {
            gfn,
            write: false,
            exec: false,
            prefetch: false,
            req_level: Level::L4K,
            goal_level: Level::L4K,
            max_level: Level::L4K,
            huge_page_disallowed: false,
            nx_workaround: false,
            pfn: Pfn(FRAMES + gfn.0),
            slot: Some(&self.cpu.machine.slot),
            map_writable: false,
            write_tracked: false,
            dirty_track: false,
            mmio_generation: 0,
            memtype: 0,
            is_host_mmio: false,
        }
    }

    /// A fast fault of a guest without paging, which writes to a frame.
    pub fn fast(&self, gfn: Gfn) {
        let (root, slot) = (self.root(), &self.cpu.machine.slot);
        let outcome = self.vm.shadow.fast_fault(
            &self.cpu,
            Root::Page(root),
            gfn,
            true,
            false,
            Some(slot),
            false,
            |_, _, _| (),
        );
        saw(format!("fast {outcome:?}"));
    }

    /// Serves a fault at a virtual page.
    fn fault(&self, page: u64) {
        let (vm, cpu) = (self.vm, &self.cpu);
        let (walk, root) = (self.walk(page), self.root());
        let tables = Tables {
            guest: self.guest(),
            unreadable: false,
        };
        let outcome = cpu.write(|lock| {
            if vm.shadow.is_obsolete(root) {
                return Outcome::Retry;
            }
            let mut fault = self.fault_at(walk.gfn);
            let served = vm.shadow.map_guest(
                cpu,
                lock,
                &mut self.acting(),
                &tables,
                Root::Page(root),
                page << 12,
                &walk,
                &mut fault,
                |_| (),
            );
            served.expect("the walk began at the root's table").0
        });
        saw(format!("{outcome:?}"));
    }

    /// A fault of the TDP MMU lets the guest write to a table, if it may.
    pub fn map_table(&self, table: u64) -> bool {
        let (vm, cpu) = (self.vm, &self.cpu);
        cpu.read(|lock| {
            let slot = &cpu.machine.slot;
            let allowed = vm.shadow.try_unsync(cpu, lock, slot, Gfn(table), false);
            if allowed.is_ok() {
                self.guest().allow_writes(table);
            }
            allowed.is_ok()
        })
    }

    /// The guest writes an entry of a table.
    pub fn write_entry(&self, table: u64, index: usize, entry: u64) {
        for _ in 0..FAULTS {
            let written = self
                .guest()
                .vcpu(self.cpu.id)
                .write(self.guest(), table, index, entry);
            if written {
                return;
            }
            if !self.map_table(table) {
                return self.emulate(table, index, entry);
            }
        }
        panic!("the guest does not get to write to {table}");
    }

    /// KVM writes an entry of a table for the guest.
    pub fn emulate(&self, table: u64, index: usize, entry: u64) {
        let (vm, cpu) = (self.vm, &self.cpu);
        self.guest().store(table, index, entry);
        fence(Ordering::SeqCst);
        if vm.shadow.indirect_pages() == 0 {
            saw("not tracked");
            return;
        }
        saw("tracked");
        let gpa = entry_gpa(table, index);
        cpu.write(|lock| vm.shadow.track_write(cpu, lock, gpa, 8, entry != 0));
    }

    /// The guest maps another frame at a virtual page, flushes, and uses the new one.
    pub fn remap(&self, table: u64, page: u64, gfn: u64) {
        let index = page as usize % ENTRIES;
        self.write_entry(table, index, to(gfn));
        self.flush();
        assert_eq!(
            self.read(page),
            gfn,
            "the guest sees a translation that it has flushed"
        );
    }
}

/// Where an entry of a table is.
fn entry_gpa(table: u64, index: usize) -> u64 {
    Gfn(table).to_gpa() + 8 * index as u64
}

// SPDX-License-Identifier: GPL-2.0

//! Bits that two set or clear at the same time.

use crate::{
    explore::{explore, saw, UNBOUNDED},
    hardware::Access,
    vm::{npt, range, Vm},
};
use rmmu_engine::mmu::{FastOutcome, Gfn, Host, Level};
use std::sync::Arc;

/// A VM whose frame 0 is mapped for writing, and clean.
fn clean_page() -> Arc<Vm> {
    let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
    vm.on_cpu(1).guest_write(0, Level::L4K);
    vm.on_cpu(1).clear_dirty(range(0, 1));
    vm
}

#[test]
fn aging_keeps_the_dirty_bit_that_the_hardware_sets() {
    explore(UNBOUNDED, &["young"], || {
        let vm = clean_page();
        let guest = vm.spawn(1, |cpu| cpu.access(Gfn(0), true));
        if vm.on_cpu(0).age(range(0, 1)) {
            saw("young");
        }
        assert!(matches!(guest.join().unwrap(), Access::Hit(_)));
        assert!(vm.on_cpu(1).entry(0).1.is_dirty(&vm.machine.format));
        vm.destroy();
    });
}

#[test]
fn write_tracking_keeps_the_dirty_bit_and_no_write_comes_after_it() {
    explore(UNBOUNDED, &["written", "tracked", "fast Invalid"], || {
        let vm = clean_page();
        let guest = vm.spawn(1, |cpu| {
            let first = cpu.access(Gfn(0), true);
            if first == (Access::Fault { present: true }) {
                saw("tracked");
                // Nobody may make it writable behind the tracker's back.
                assert_eq!(cpu.fast(0, true, false), FastOutcome::Invalid);
            }
            cpu.access(Gfn(0), true);
            matches!(first, Access::Hit(_))
        });
        let (cpu, tdp, memory) = (vm.on_cpu(0), &vm.tdp, &vm.machine.memory);
        let page = memory.behind(Gfn(0));
        cpu.write(|lock| {
            let flush = tdp.write_protect_gfn(&*cpu, lock, false, Gfn(0), Level::L4K);
            cpu.spend(flush, lock);
        });
        memory.copy(page);
        let (_, spte) = cpu.entry(0);
        assert!(!spte.is_writable());
        if guest.join().unwrap() {
            saw("written");
            assert!(vm.on_cpu(1).entry(0).1.is_dirty(&vm.machine.format));
        }
        assert!(memory.is_copied(page), "a write escaped the tracker");
        vm.destroy();
    });
}

#[test]
fn aging_does_not_undo_write_protection() {
    explore(UNBOUNDED, &[], || {
        let vm = clean_page();
        let aging = vm.spawn(1, |cpu| cpu.age(range(0, 1)));
        let (cpu, tdp) = (vm.on_cpu(0), &vm.tdp);
        cpu.read(|lock| {
            let flush = tdp.write_protect_slot(&*cpu, lock, false, range(0, 1), Level::L4K);
            assert!(flush.needed());
            cpu.spend(flush, lock);
        });
        assert!(aging.join().unwrap());
        let (_, spte) = cpu.entry(0);
        assert!(!spte.is_writable() && spte.is_mmu_writable(&vm.machine.format));
        vm.destroy();
    });
}

// SPDX-License-Identifier: GPL-2.0

//! Huge pages that are split or put together, and the tables that go.

use crate::{
    explore::{explore, saw, BOUNDED, UNBOUNDED},
    vm::{npt, range, Actor, Vm},
};
use rmmu_engine::mmu::{Gfn, Level, Outcome};
use std::sync::Arc;

fn split(cpu: &Actor<'_>, vm: &Vm) {
    cpu.read(|lock| {
        vm.tdp
            .split_huge(&**cpu, lock, false, range(0, 2), Level::L4K)
    })
    .expect("no memory for a table");
}

fn promote(cpu: &Actor<'_>, vm: &Vm, level: Level) {
    cpu.read(|lock| {
        vm.tdp
            .recover_huge(&**cpu, lock, false, range(0, 4), |_| level);
    });
}

#[test]
fn a_split_keeps_the_dirty_bit_that_the_hardware_sets() {
    explore(UNBOUNDED, &[], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        let page = vm.on_cpu(1).guest_write(1, Level::L2M);
        vm.on_cpu(1).clear_dirty(range(0, 2));
        let guest = vm.spawn(1, |cpu| cpu.guest_write(1, Level::L2M));
        split(&vm.on_cpu(0), &vm);
        assert_eq!(guest.join().unwrap(), page);
        let (level, spte) = vm.on_cpu(1).entry(1);
        assert_eq!(level, Level::L4K);
        assert!(spte.is_dirty(&vm.machine.format));
        assert_eq!((vm.leaves(Level::L4K), vm.tables()), (2, 1));
        vm.destroy();
    });
}

#[test]
fn a_split_and_a_small_fault_split_once() {
    explore(UNBOUNDED, &["Retry", "Spurious"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        vm.on_cpu(1).guest_write(0, Level::L2M);
        let fault = vm.spawn(
            1,
            |cpu| while cpu.map_write(1, Level::L4K) == Outcome::Retry {},
        );
        split(&vm.on_cpu(0), &vm);
        fault.join().unwrap();
        assert_eq!((vm.leaves(Level::L4K), vm.tables()), (2, 1));
        assert_eq!(vm.leaves(Level::L2M), 0);
        vm.on_cpu(1).guest_write(1, Level::L4K);
        vm.destroy();
    });
}

#[test]
fn a_small_fault_meets_a_huge_fault_that_frees_its_table() {
    explore(BOUNDED, &["Fixed", "Retry"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        vm.on_cpu(1).guest_write(0, Level::L4K);
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write(1, Level::L4K);
        });
        vm.on_cpu(0).map_write(0, Level::L2M);
        guest.join().unwrap();
        vm.on_cpu(1).guest_write(1, Level::L4K);
        vm.destroy();
    });
}

#[test]
fn a_small_fault_meets_a_huge_fault_that_frees_the_tables_on_its_way() {
    explore(BOUNDED, &["Fixed", "Retry"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L1G, 2));
        vm.on_cpu(1).guest_write(0, Level::L4K);
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write(2, Level::L4K);
        });
        vm.on_cpu(0).map_write(0, Level::L1G);
        guest.join().unwrap();
        vm.on_cpu(1).guest_write(2, Level::L4K);
        vm.destroy();
    });
}

#[test]
fn promotion_frees_a_table_only_when_no_guest_is_on_it() {
    explore(BOUNDED, &["Fixed"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        vm.on_cpu(1).guest_write(0, Level::L4K);
        let other = Arc::clone(&vm);
        let promotion = vm.spawn(0, move |cpu| promote(cpu, &other, Level::L2M));
        let guest = vm.on_cpu(1);
        guest.guest_write(1, Level::L4K);
        guest.guest_write(0, Level::L4K);
        promotion.join().unwrap();
        vm.destroy();
    });
}

#[test]
fn promotion_of_a_whole_subtree_meets_a_fault_in_it() {
    explore(BOUNDED, &["Fixed", "Retry"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L1G, 2));
        vm.on_cpu(1).guest_write(0, Level::L4K);
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write(2, Level::L4K);
        });
        promote(&vm.on_cpu(0), &vm, Level::L1G);
        guest.join().unwrap();
        vm.destroy();
    });
}

#[test]
fn aging_walks_a_table_that_a_huge_fault_removes() {
    explore(UNBOUNDED, &["overlooked"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        vm.on_cpu(1).guest_write(0, Level::L4K);
        vm.on_cpu(1).clear_dirty(range(0, 1));
        let aging = vm.spawn(1, |cpu| cpu.age(range(0, 2)));
        vm.on_cpu(0).map_write(0, Level::L2M);
        // In a table that was just removed there is nothing to be seen.
        if !aging.join().unwrap() {
            saw("overlooked");
        }
        vm.destroy();
    });
}

#[test]
fn a_fast_fault_walks_a_table_that_a_huge_fault_removes() {
    explore(UNBOUNDED, &["fast Fixed", "fast Invalid"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        let cpu = vm.on_cpu(1);
        cpu.guest_write_logged(0);
        cpu.harvest(true);
        let fault = vm.spawn(1, |cpu| cpu.fast(0, true, true));
        vm.on_cpu(0).map_write(0, Level::L2M);
        fault.join().unwrap();
        vm.destroy();
    });
}

#[test]
fn looking_at_entries_meets_the_removal_of_their_table() {
    explore(BOUNDED, &[], || {
        let vm = Arc::new(Vm::new(npt(), Level::L1G, 2));
        vm.on_cpu(1).guest_write(0, Level::L4K);
        let other = Arc::clone(&vm);
        let looking = vm.spawn(1, move |cpu| {
            cpu.entry(0);
            other
                .tdp
                .visit_leaves(&**cpu, cpu.root(), Gfn(0), 10, |_, _, _| ());
        });
        vm.on_cpu(0).map_write(0, Level::L1G);
        looking.join().unwrap();
        vm.destroy();
    });
}

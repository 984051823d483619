// SPDX-License-Identifier: GPL-2.0

//! Roots that are taken up, invalidated and dropped.

use crate::{
    explore::{explore, BOUNDED, UNBOUNDED},
    vm::{ept_without_ad, npt, range, Actor, Vm},
};
use rmmu_engine::mmu::Level;
use std::sync::Arc;

fn zap_invalidated(cpu: &Actor<'_>, vm: &Vm) {
    cpu.read(|lock| vm.tdp.zap_invalidated_roots(&**cpu, lock));
}

/// A VM in which only vCPU 1 has the root, and frame 0 is mapped below it.
fn one_user() -> Arc<Vm> {
    let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
    vm.on_cpu(1).guest_write(0, Level::L4K);
    vm.on_cpu(0).unload_root();
    vm
}

#[test]
fn a_guest_goes_on_with_a_new_root_when_its_own_is_invalidated() {
    explore(BOUNDED, &["new root", "Retry"], || {
        let vm = one_user();
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write(1, Level::L4K);
        });
        let cpu = vm.on_cpu(0);
        cpu.invalidate();
        zap_invalidated(&cpu, &vm);
        guest.join().unwrap();
        vm.on_cpu(1).guest_write(0, Level::L4K);
        vm.destroy();
    });
}

#[test]
fn the_last_reference_goes_while_the_root_is_zapped() {
    explore(UNBOUNDED, &[], || {
        let vm = one_user();
        vm.on_cpu(0).invalidate();
        let guest = vm.spawn(1, |cpu| cpu.unload_root());
        zap_invalidated(&vm.on_cpu(0), &vm);
        guest.join().unwrap();
        assert!(vm.tdp.is_empty());
        vm.destroy();
    });
}

#[test]
fn two_that_zap_invalidated_roots_zap_each_once() {
    explore(BOUNDED, &[], || {
        let vm = one_user();
        vm.on_cpu(0).invalidate();
        let other = Arc::clone(&vm);
        let zap = vm.spawn(1, move |cpu| zap_invalidated(cpu, &other));
        zap_invalidated(&vm.on_cpu(0), &vm);
        zap.join().unwrap();
        vm.on_cpu(1).unload_root();
        assert!(vm.tdp.is_empty());
        vm.destroy();
    });
}

#[test]
fn a_notifier_meets_a_root_that_is_on_its_way_out() {
    explore(UNBOUNDED, &[], || {
        let vm = one_user();
        vm.on_cpu(0).invalidate();
        zap_invalidated(&vm.on_cpu(0), &vm);
        let guest = vm.spawn(1, |cpu| cpu.unload_root());
        vm.on_cpu(0).unmap(range(0, 1));
        guest.join().unwrap();
        vm.destroy();
    });
}

#[test]
fn a_fast_fault_in_a_root_that_is_emptied_leaves_nothing_there() {
    explore(BOUNDED, &["fast Fixed", "fast Invalid"], || {
        let vm = Arc::new(Vm::new(ept_without_ad(), Level::L2M, 2));
        vm.on_cpu(1).guest_write(0, Level::L4K);
        vm.on_cpu(1).age(range(0, 1));
        vm.on_cpu(0).invalidate();
        // The guest faulted before.
        let guest = vm.spawn(1, |cpu| cpu.fast(0, true, false));
        zap_invalidated(&vm.on_cpu(0), &vm);
        guest.join().unwrap();
        assert_eq!((vm.leaves(Level::L4K), vm.tables()), (0, 0));
        vm.destroy();
    });
}

#[test]
fn a_root_is_freed_while_the_list_is_walked() {
    explore(BOUNDED, &[], || {
        let vm = one_user();
        vm.on_cpu(1).clear_dirty(range(0, 1));
        vm.on_cpu(0).invalidate();
        vm.on_cpu(1).unload_root();
        vm.on_cpu(1).load_root();
        let aging = vm.spawn(1, |cpu| cpu.age(range(0, 1)));
        zap_invalidated(&vm.on_cpu(0), &vm);
        aging.join().unwrap();
        vm.destroy();
    });
}

#[test]
fn two_vcpus_that_need_a_root_share_one() {
    explore(UNBOUNDED, &[], || {
        let vm = one_user();
        vm.on_cpu(0).invalidate();
        let other = vm.spawn(1, |cpu| {
            cpu.load_root();
            cpu.root()
        });
        let cpu = vm.on_cpu(0);
        cpu.load_root();
        assert_eq!(other.join().unwrap(), cpu.root());
        zap_invalidated(&cpu, &vm);
        vm.destroy();
    });
}

#[test]
fn memory_is_taken_back_while_its_root_is_zapped() {
    explore(
        UNBOUNDED,
        &["2 pages mapped", "1 pages mapped", "0 pages mapped"],
        || {
            let vm = one_user();
            vm.on_cpu(1).guest_write(1, Level::L4K);
            vm.on_cpu(0).invalidate();
            let other = Arc::clone(&vm);
            let zap = vm.spawn(1, move |cpu| {
                // At the second page.
                cpu.breaks.set(1);
                zap_invalidated(cpu, &other);
            });
            vm.on_cpu(0).take_back(range(0, 2));
            assert_eq!(vm.leaves(Level::L4K), 0);
            zap.join().unwrap();
            vm.on_cpu(1).load_root();
            vm.on_cpu(1).guest_write(0, Level::L4K);
            vm.destroy();
        },
    );
}

#[test]
fn a_notifier_finds_what_is_mapped_behind_a_root_that_goes() {
    explore(Some(3), &[], || {
        // Frame 1 is mapped below the first root, and nothing below the second.
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 3));
        vm.on_cpu(1).guest_write(1, Level::L4K);
        vm.on_cpu(0).invalidate();
        vm.on_cpu(0).load_root();
        vm.on_cpu(0).invalidate();
        let other = Arc::clone(&vm);
        let zap = vm.spawn(2, move |cpu| {
            // When it is done with the second, and comes to the page.
            cpu.breaks.set(0b1_0000);
            zap_invalidated(cpu, &other);
        });
        let guest = vm.spawn(0, |cpu| cpu.unload_root());
        let notifier = vm.on_cpu(1);
        notifier.take_back(range(1, 2));
        assert_eq!(vm.leaves(Level::L4K), 0);
        zap.join().unwrap();
        guest.join().unwrap();
        vm.destroy();
    });
}

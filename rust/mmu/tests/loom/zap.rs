// SPDX-License-Identifier: GPL-2.0

//! Memory that is taken away, while it is mapped, used, aged.

use crate::{
    explore::{explore, saw, UNBOUNDED},
    hardware::Access,
    vm::{ept_without_ad, npt, range, Vm},
};
use rmmu_engine::mmu::{Gfn, Host, Level, SpteFormat};
use std::sync::Arc;

#[test]
fn a_page_that_was_taken_back_is_not_reached() {
    explore(UNBOUNDED, &["Fixed"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        let old = vm.on_cpu(1).guest_write(0, Level::L4K);
        let guest = vm.spawn(1, move |cpu| {
            for _ in 0..2 {
                if cpu.guest_write(0, Level::L4K) == old {
                    saw("old page");
                }
            }
        });
        vm.on_cpu(0).take_back(range(0, 1));
        guest.join().unwrap();
        assert_ne!(vm.on_cpu(1).guest_write(0, Level::L4K), old);
        vm.destroy();
    });
}

#[test]
fn a_page_is_installed_while_another_is_taken_back() {
    explore(UNBOUNDED, &["Fixed"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write(0, Level::L4K);
            cpu.guest_write(1, Level::L4K);
        });
        vm.on_cpu(0).take_back(range(0, 2));
        guest.join().unwrap();
        vm.on_cpu(1).guest_write(0, Level::L4K);
        vm.destroy();
    });
}

#[test]
fn who_finds_nothing_to_unmap_owes_no_flush() {
    explore(UNBOUNDED, &["hit", "fault"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 3));
        let page = vm.on_cpu(2).guest_write(0, Level::L4K);
        vm.on_cpu(2).guest_write(1, Level::L4K);
        let guest = vm.spawn(2, |cpu| match cpu.access(Gfn(0), true) {
            Access::Hit(_) => saw("hit"),
            _ => saw("fault"),
        });
        // Lets others have the lock when the first frame is unmapped.
        let first = vm.spawn(1, |cpu| {
            cpu.breaks.set(1);
            cpu.unmap(range(0, 2));
        });
        vm.on_cpu(0).unmap(range(0, 1));
        vm.machine.memory.give_back(page);
        guest.join().unwrap();
        first.join().unwrap();
        vm.destroy();
    });
}

/// The entry has no dirty bit, so that it is not unmapped by a plain store: loom can
/// not tell that an exchange that came before it stays before it.
fn old_or_zapped(format: SpteFormat) {
    let vm = Arc::new(Vm::new(format, Level::L2M, 2));
    vm.on_cpu(1).guest_write(0, Level::L4K);
    vm.on_cpu(1).clear_dirty(range(0, 1));
    let aging = vm.spawn(1, |cpu| {
        if cpu.age(range(0, 1)) {
            saw("was young");
        }
    });
    vm.on_cpu(0).take_back(range(0, 1));
    aging.join().unwrap();
    let read = vm.on_cpu(1).access(Gfn(0), false);
    assert_eq!(read, Access::Fault { present: false });
    vm.destroy();
}

#[test]
fn aging_does_not_bring_back_what_was_zapped() {
    explore(UNBOUNDED, &["was young"], || old_or_zapped(npt()));
}

#[test]
fn aging_does_not_bring_back_what_was_zapped_without_ad_bits() {
    explore(
        UNBOUNDED,
        &["was young"],
        || old_or_zapped(ept_without_ad()),
    );
}

#[test]
fn a_fast_fault_does_not_bring_back_what_was_zapped() {
    explore(UNBOUNDED, &["fast Fixed", "fast Invalid", "Fixed"], || {
        let vm = Arc::new(Vm::new(ept_without_ad(), Level::L2M, 2));
        let old = vm.on_cpu(1).guest_write(0, Level::L4K);
        vm.on_cpu(1).age(range(0, 1));
        vm.on_cpu(1).flush_all();
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write(0, Level::L4K);
        });
        vm.on_cpu(0).take_back(range(0, 1));
        guest.join().unwrap();
        assert_ne!(vm.on_cpu(1).guest_write(0, Level::L4K), old);
        vm.destroy();
    });
}

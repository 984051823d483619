// SPDX-License-Identifier: GPL-2.0

//! The dirty log: what is written after user space copied a page is logged again.

use crate::{
    explore::{explore, BOUNDED, UNBOUNDED},
    vm::{ept_with_ad, ept_without_ad, npt, range, Vm},
};
use rmmu_engine::mmu::{Gfn, Host, Level, SpteFormat};
use std::sync::Arc;

fn written_page(format: SpteFormat, cpus: usize) -> Arc<Vm> {
    let vm = Arc::new(Vm::new(format, Level::L2M, cpus));
    vm.on_cpu(1).guest_write_logged(0);
    vm
}

#[test]
fn a_fast_fault_loses_no_write_to_the_log() {
    explore(UNBOUNDED, &["copied", "fast Fixed"], || {
        let vm = written_page(npt(), 2);
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write_logged(0);
            cpu.guest_write_logged(0);
        });
        vm.on_cpu(0).harvest(true);
        vm.on_cpu(0).harvest(true);
        guest.join().unwrap();
        vm.assert_copied_or_logged(Gfn(0));
        vm.destroy();
    });
}

#[test]
fn aging_and_a_fast_fault_lose_no_write_to_the_log() {
    explore(BOUNDED, &["copied", "fast Fixed"], || {
        let vm = written_page(ept_without_ad(), 3);
        vm.on_cpu(0).harvest(true);
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write_logged(0);
        });
        let aging = vm.spawn(2, |cpu| cpu.age(range(0, 1)));
        vm.on_cpu(0).harvest(true);
        guest.join().unwrap();
        aging.join().unwrap();
        vm.assert_copied_or_logged(Gfn(0));
        vm.destroy();
    });
}

#[test]
fn the_cpu_logs_what_is_written_after_dirty_bits_were_cleared() {
    explore(UNBOUNDED, &["copied"], || {
        let vm = written_page(ept_with_ad(), 2);
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write_logged(0);
            cpu.guest_write_logged(0);
        });
        vm.on_cpu(0).harvest(false);
        vm.on_cpu(0).harvest(false);
        guest.join().unwrap();
        vm.assert_copied_or_logged(Gfn(0));
        vm.destroy();
    });
}

#[test]
fn a_page_mapped_while_the_log_begins_is_protected_or_logged() {
    explore(UNBOUNDED, &["Fixed"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        vm.on_cpu(1).guest_write(1, Level::L4K);
        let guest = vm.spawn(1, |cpu| {
            cpu.guest_write_logged(0);
            cpu.guest_write_logged(1);
        });
        let (cpu, memory) = (vm.on_cpu(0), &vm.machine.memory);
        cpu.read(|lock| {
            let _ = vm
                .tdp
                .write_protect_slot(&*cpu, lock, false, range(0, 2), Level::L4K);
        });
        cpu.flush_all();
        for gfn in [Gfn(0), Gfn(1)] {
            memory.copy(memory.behind(gfn));
        }
        guest.join().unwrap();
        for gfn in [Gfn(0), Gfn(1)] {
            vm.assert_copied_or_logged(gfn);
        }
        vm.destroy();
    });
}

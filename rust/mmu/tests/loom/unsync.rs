// SPDX-License-Identifier: GPL-2.0

//! What vCPUs ask the shadow MMU without a lock, against all that changes the answer.
//!
//! Most of all: a guest that flushes is told that there is nothing to bring up to
//! date. Then nothing stale may be within its reach.

use crate::{
    explore::{explore, BOUNDED, UNBOUNDED},
    guest::to,
    paging::{Actor, Vm},
};
use rmmu_engine::mmu::{
    shadow::{Root, ShadowHost},
    Gfn, Host, Level, Spte,
};
use std::sync::Arc;

/// CPU 1 maps another frame at page 0 and flushes, while `other` happens on CPU 0.
fn meets(vm: Vm, other: impl FnOnce(&Actor<'_>, &Vm)) {
    let vm = Arc::new(vm);
    let table = vm.table(Level::L4K);
    let guest = vm.spawn(1, move |cpu| cpu.remap(table, 0, 1));
    other(&vm.on_cpu(0), &vm);
    guest.join().unwrap();
    vm.destroy();
}

/// As [`meets`], while CPU 2 zaps the root.
fn meets_two(vm: Vm, other: impl FnOnce(&Actor<'_>, &Vm)) {
    let vm = Arc::new(vm);
    let table = vm.table(Level::L4K);
    let guest = vm.spawn(1, move |cpu| cpu.remap(table, 0, 1));
    let zap = vm.spawn(2, {
        let vm = Arc::clone(&vm);
        move |cpu| unprotect(cpu, &vm, Level::L2M)
    });
    other(&vm.on_cpu(0), &vm);
    guest.join().unwrap();
    zap.join().unwrap();
    vm.destroy();
}

/// Stops shadowing the guest's table of a level.
fn unprotect(cpu: &Actor<'_>, vm: &Vm, level: Level) {
    let gfn = Gfn(vm.table(level));
    cpu.write(|lock| vm.shadow.unprotect_gfn(&**cpu, lock, gfn));
}

#[test]
fn a_flush_meets_a_zap_of_the_root() {
    explore(
        UNBOUNDED,
        &["unsync true", "unsync false", "new root"],
        || {
            meets(Vm::unsync(Level::L2M, 2), |cpu, vm| {
                unprotect(cpu, vm, Level::L2M);
            });
        },
    );
}

#[test]
fn a_flush_meets_a_zap_of_the_root_two_levels_up() {
    explore(
        BOUNDED,
        &["unsync true", "unsync false", "new root"],
        || {
            meets(Vm::unsync(Level::L1G, 2), |cpu, vm| {
                unprotect(cpu, vm, Level::L1G);
            });
        },
    );
}

#[test]
fn a_flush_meets_a_zap_of_the_page_above() {
    explore(BOUNDED, &["unsync true"], || {
        meets(Vm::unsync(Level::L1G, 2), |cpu, vm| {
            unprotect(cpu, vm, Level::L2M);
        });
    });
}

#[test]
fn a_flush_meets_a_zap_of_the_unsync_page() {
    explore(BOUNDED, &["unsync true"], || {
        meets(Vm::unsync(Level::L2M, 2), |cpu, vm| {
            unprotect(cpu, vm, Level::L4K);
        });
    });
}

#[test]
fn a_flush_meets_a_write_that_unlinks_the_unsync_page() {
    explore(BOUNDED, &["tracked", "unsync true"], || {
        meets(Vm::unsync(Level::L2M, 2), |cpu, vm| {
            let (root, table) = (vm.table(Level::L2M), vm.table(Level::L4K));
            cpu.emulate(root, 0, to(table));
        });
    });
}

#[test]
fn a_flush_meets_a_fast_zap_of_all() {
    explore(
        BOUNDED,
        &["unsync true", "unsync false", "new root"],
        || {
            meets(Vm::unsync(Level::L2M, 2), |cpu, vm| {
                let host = &**cpu;
                cpu.write(|lock| {
                    vm.shadow.invalidate_all(lock);
                    // The same request tells vCPUs of this.
                    host.root_zapped();
                    vm.shadow.zap_obsolete(host, lock);
                });
            });
        },
    );
}

#[test]
fn a_flush_meets_a_zap_for_want_of_room() {
    explore(BOUNDED, &["unsync true"], || {
        meets(Vm::unsync(Level::L2M, 2), |cpu, vm| {
            cpu.write(|lock| vm.shadow.set_max_pages(&**cpu, lock, 0));
        });
    });
}

#[test]
fn a_flush_meets_a_sync_of_the_same_root() {
    explore(UNBOUNDED, &["unsync true", "unsync false"], || {
        meets(Vm::unsync(Level::L2M, 2), |cpu, _| cpu.flush());
    });
}

#[test]
fn a_flush_meets_a_sync_that_cannot_read_the_table() {
    explore(BOUNDED, &["unsync true", "unsync false"], || {
        meets(Vm::unsync(Level::L2M, 2), |cpu, _| cpu.flush_with(true));
    });
}

#[test]
fn a_flush_meets_a_fault_that_links_the_unsync_page() {
    explore(BOUNDED, &["unsync true", "unsync false"], || {
        meets(Vm::with_other_root(Level::L2M, 2), |cpu, _| {
            cpu.read(1);
        });
    });
}

#[test]
fn a_flush_meets_a_fault_that_links_a_page_above_the_unsync_page() {
    explore(BOUNDED, &["unsync true", "unsync false"], || {
        meets(Vm::with_other_root(Level::L1G, 2), |cpu, _| {
            cpu.read(1);
        });
    });
}

#[test]
fn two_faults_make_one_table_unsync() {
    explore(Some(3), &["unsync true"], || {
        meets(Vm::mapped(Level::L2M, 2), |cpu, vm| {
            cpu.remap(vm.table(Level::L4K), 1, 2);
        });
    });
}

#[test]
fn an_emulated_write_meets_the_first_root() {
    explore(UNBOUNDED, &["tracked", "not tracked"], || {
        let vm = Arc::new(Vm::new(Level::L2M, 2));
        let (root, other_table) = (vm.table(Level::L2M), 3);
        vm.machine.guest.store(other_table, 0, to(1));
        let guest = vm.spawn(1, move |cpu| {
            cpu.load_cr3(root);
            cpu.read(0);
        });
        vm.on_cpu(0).emulate(root, 0, to(other_table));
        guest.join().unwrap();
        let cpu = vm.on_cpu(1);
        cpu.flush();
        assert_eq!(cpu.read(0), 1, "a write to the guest's table is lost");
        vm.destroy();
    });
}

#[test]
fn walks_without_the_lock_meet_a_zap_of_the_root() {
    explore(UNBOUNDED, &["walked to 2", "walked to 1"], || {
        let vm = Arc::new(Vm::unsync(Level::L2M, 2));
        let zap = vm.spawn(0, {
            let vm = Arc::clone(&vm);
            move |cpu| unprotect(cpu, &vm, Level::L2M)
        });
        let cpu = vm.on_cpu(1);
        let (host, root) = (&*cpu, Root::Page(cpu.root()));
        let mut sptes = [Spte::NONPRESENT; 6];
        let walked = vm.shadow.walk(host, root, 0, &mut sptes);
        let (lowest, _) = walked.expect("the root has a page");
        crate::explore::saw(format!("walked to {}", lowest.get()));
        vm.shadow.clear_flood(host, root, 0);
        zap.join().unwrap();
        vm.destroy();
    });
}

#[test]
fn a_fast_fault_does_not_bring_back_what_was_taken_for_a_table() {
    explore(UNBOUNDED, &["fast Fixed", "fast Invalid"], || {
        let vm = Arc::new(Vm::direct(2));
        let guest = vm.spawn(1, |cpu| {
            cpu.fast(Gfn(0));
            cpu.read(0);
        });
        let cpu = vm.on_cpu(0);
        cpu.write(|lock| {
            let (host, slot) = (&*cpu, &vm.machine.slot);
            let flush = vm
                .shadow
                .write_protect_gfn(host, lock, slot, Gfn(0), Level::L4K);
            host.spend(flush, lock);
        });
        guest.join().unwrap();
        assert!(!vm.machine.guest.vcpu(1).may_write(0));
        vm.machine.guest.vcpu(1).flush();
        vm.on_cpu(1).fast(Gfn(0));
        vm.on_cpu(1).read(0);
        assert!(!vm.machine.guest.vcpu(1).may_write(0));
        vm.destroy();
    });
}

#[test]
fn a_flush_meets_a_sync_and_a_zap_of_the_root() {
    explore(
        Some(2),
        &["unsync true", "unsync false", "new root"],
        || {
            let vm = Vm::unsync(Level::L2M, 3);
            meets_two(vm, |cpu, _| cpu.flush());
        },
    );
}

// SPDX-License-Identifier: GPL-2.0

//! Tables that are there because of the NX mitigation, noted and removed at the same
//! time.

use crate::{
    explore::{explore, saw, BOUNDED},
    vm::{range, Actor, Vm},
};
use rmmu_engine::mmu::{Fault, Gfn, Level, Outcome};
use std::sync::Arc;

/// The guest executes a frame of a page that the host could map huge.
fn execute(cpu: &Actor<'_>, gfn: u64) {
    let fault = || Fault {
        exec: true,
        huge_page_disallowed: true,
        req_level: Level::L2M,
        ..cpu.fault(gfn, false, Level::L4K)
    };
    while cpu.map(fault) == Outcome::Retry {}
}

#[test]
fn a_candidate_is_removed_while_it_is_noted() {
    explore(BOUNDED, &["Retry", "removed", "stays"], || {
        let vm = Arc::new(Vm::with_nx(Level::L2M, 2));
        let guest = vm.spawn(1, |cpu| execute(cpu, 0));
        let cpu = vm.on_cpu(0);
        // There is something in the table to be promoted.
        execute(&cpu, 1);
        cpu.read(|lock| {
            vm.tdp
                .recover_huge(&*cpu, lock, false, range(0, 2), |_| Level::L2M);
        });
        guest.join().unwrap();
        if vm.tables() == 0 {
            saw("removed");
            assert_eq!(vm.tdp.nx_candidates(), 0);
        } else {
            saw("stays");
            assert_eq!(vm.tdp.nx_candidates(), 1);
        }
        vm.destroy();
    });
}

#[test]
fn a_candidate_is_recovered_and_promoted_once() {
    explore(BOUNDED, &["recovered", "promoted"], || {
        let vm = Arc::new(Vm::with_nx(Level::L2M, 2));
        execute(&vm.on_cpu(1), 0);
        // The hardware has the table in its caches.
        vm.on_cpu(1).access(Gfn(0), false);
        let other = Arc::clone(&vm);
        let recovery = vm.spawn(1, move |cpu| {
            cpu.read(|lock| other.tdp.recover_nx(&**cpu, lock, 3, |_, _| false))
        });
        let cpu = vm.on_cpu(0);
        cpu.read(|lock| {
            vm.tdp
                .recover_huge(&*cpu, lock, false, range(0, 2), |_| Level::L2M);
        });
        let recovered = recovery.join().unwrap();
        saw(if recovered == 1 {
            "recovered"
        } else {
            "promoted"
        });
        assert_eq!(vm.leaves(Level::L2M), i64::from(recovered == 0));
        assert_eq!(vm.leaves_ever(Level::L2M), i64::from(recovered == 0));
        assert_eq!((vm.tables(), vm.tdp.nx_candidates()), (0, 0));
        vm.destroy();
    });
}

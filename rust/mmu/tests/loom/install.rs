// SPDX-License-Identifier: GPL-2.0

//! Faults against each other.

use crate::{
    explore::{explore, UNBOUNDED},
    vm::{npt, Vm},
};
use rmmu_engine::mmu::Level;
use std::sync::Arc;

#[test]
fn two_faults_on_neighbours_build_one_path() {
    explore(UNBOUNDED, &["Fixed", "Retry"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L1G, 2));
        let other = vm.spawn(1, |cpu| cpu.guest_write(1, Level::L4K));
        vm.on_cpu(0).guest_write(0, Level::L4K);
        other.join().unwrap();
        assert_eq!((vm.leaves(Level::L4K), vm.tables()), (2, 2));
        vm.destroy();
    });
}

#[test]
fn two_faults_on_one_frame_map_it_once() {
    explore(UNBOUNDED, &["Fixed", "Retry", "Spurious"], || {
        let vm = Arc::new(Vm::new(npt(), Level::L2M, 2));
        let other = vm.spawn(1, |cpu| cpu.guest_write(0, Level::L4K));
        let page = vm.on_cpu(0).guest_write(0, Level::L4K);
        assert_eq!(other.join().unwrap(), page);
        assert_eq!((vm.leaves(Level::L4K), vm.tables()), (1, 1));
        vm.destroy();
    });
}

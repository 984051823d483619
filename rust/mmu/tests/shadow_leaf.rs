// SPDX-License-Identifier: GPL-2.0

//! What making a leaf does besides mapping memory: tables that it may let go out of
//! sync, and the dirty log.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::format;
use rmmu_engine::mmu::{types::ACC_WRITE, Gfn};
use shadow::{
    cpu::Kind,
    host::Slot,
    paging::{Mode, Paging, FULL, W},
    set, Touch, Vm,
};

const ROOT: u64 = 0x10;
const L3: u64 = 0x11;
const L2: u64 = 0x12;
const L1: u64 = 0x13;
const DATA: u64 = 0x40;
const END: u64 = 0x60;

/// A guest that maps page 0 as said, and page 1 to `DATA` with all rights.
fn new_vm(page0: u64) -> Vm {
    let slots = vec![Slot::new(0, END, false)];
    let mut vm = Vm::new(format::npt(), Paging::new(Mode::Level4), slots, 1);
    vm.prefetch.set(false);
    for (table, below) in [(ROOT, L3), (L3, L2), (L2, L1)] {
        set(&vm, table, 0, below << 12 | FULL);
    }
    set(&vm, L1, 0, page0);
    set(&vm, L1, 1, DATA << 12 | FULL);
    vm.watched.extend([0, 1]);
    vm.load_cr3(0, ROOT << 12, false);
    // The pages of all tables are there.
    let touch = vm.touch(0, 1 << 12, Kind::READ);
    assert_eq!(touch, Touch::Memory(Gfn(DATA)));
    vm
}

/// Whether the page that shadows the last table is out of sync.
fn is_unsync(vm: &Vm) -> bool {
    let mut found = None;
    vm.visit(|page| {
        if page.gfn == Gfn(L1) && page.role.access() & ACC_WRITE != 0 {
            found = Some(page.unsync);
        }
    });
    found.expect("the table is shadowed")
}

#[test]
fn a_table_that_the_guest_maps_for_reading_stays_in_sync() {
    let mut vm = new_vm(L1 << 12 | FULL & !W);
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Memory(Gfn(L1)));
    assert!(!is_unsync(&vm));
    vm.check();
    vm.destroy();

    // With a mapping that it can write through, the table goes out of sync.
    let mut vm = new_vm(L1 << 12 | FULL);
    assert_eq!(vm.touch(0, 0, Kind::WRITE), Touch::Memory(Gfn(L1)));
    assert!(is_unsync(&vm));
    vm.check();
    vm.destroy();
}

#[test]
fn a_page_that_is_only_read_is_not_in_the_log() {
    let mut vm = new_vm((DATA + 1) << 12 | FULL & !W);
    vm.start_logging(0);
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Memory(Gfn(DATA + 1)));
    assert!(!vm.harvest(0).contains(&(DATA + 1)));
    vm.touch(0, 1 << 12, Kind::WRITE);
    assert!(vm.harvest(0).contains(&DATA));
    vm.destroy();
}

#[test]
fn nothing_is_logged_for_a_slot_that_does_not_log() {
    let mut vm = new_vm((DATA + 1) << 12 | FULL);
    vm.touch(0, 0, Kind::WRITE);
    vm.touch(0, 1 << 12, Kind::WRITE);
    assert!(vm.machine.slots[0].dirty.borrow().is_empty());
    vm.destroy();
}

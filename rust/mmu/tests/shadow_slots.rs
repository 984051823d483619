// SPDX-License-Identifier: GPL-2.0

//! Slots that come while a guest runs: what was no memory when it was looked at must be
//! looked at again.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::format;
use rmmu_engine::mmu::Gfn;
use shadow::{
    cpu::Kind,
    host::Slot,
    paging::{Mode, Paging, FULL, P},
    set, Touch, Vm,
};

const ROOT: u64 = 0x10;
const L3: u64 = 0x11;
const L2: u64 = 0x12;
const L1: u64 = 0x13;
/// The first frame of the slot that comes late.
const LATE: u64 = 0x400;

/// A VM without its second slot.
fn new_vm(mode: Mode) -> Vm {
    let slots = vec![Slot::new(0, LATE, false), Slot::new(LATE, 0x800, false)];
    let vm = Vm::new(format::npt(), Paging::new(mode), slots, 1);
    vm.prefetch.set(false);
    vm.machine.slots[1].valid.set(false);
    vm
}

/// The second slot comes, and with it a new generation of the slots.
fn add_slot(vm: &mut Vm) {
    vm.machine.slots[1].valid.set(true);
    vm.generation.set(vm.generation.get() + 2);
}

/// A guest whose page 0 is no memory, with an entry that says so, and whose page 1 is the
/// table of both.
fn with_mmio() -> Vm {
    let mut vm = new_vm(Mode::Level4);
    for (table, below) in [(ROOT, L3), (L3, L2), (L2, L1)] {
        set(&vm, table, 0, below << 12 | FULL);
    }
    set(&vm, L1, 0, LATE << 12 | FULL);
    set(&vm, L1, 1, L1 << 12 | FULL);
    vm.watched.extend([0, 1]);
    vm.load_cr3(0, ROOT << 12, false);
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Mmio(Gfn(LATE)));
    vm
}

/// The table is let out of sync, and brought up to date by the guest's flush.
fn write_and_flush(vm: &mut Vm) {
    let gpa = vm.paging.entry_gpa(Gfn(L1), 7);
    vm.store(0, 1 << 12 | gpa & 0xfff, gpa, 0);
    vm.load_cr3(0, ROOT << 12, false);
}

#[test]
fn a_sync_does_not_make_mmio_of_memory_that_came_since() {
    let mut vm = with_mmio();
    add_slot(&mut vm);
    write_and_flush(&mut vm);
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Memory(Gfn(LATE)));
    vm.check();
    vm.destroy();
}

#[test]
fn a_sync_keeps_mmio_that_is_no_memory_still() {
    let mut vm = with_mmio();
    vm.generation.set(vm.generation.get() + 2);
    write_and_flush(&mut vm);
    let faults = vm.faults;
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Mmio(Gfn(LATE)));
    assert_eq!(vm.faults, faults, "the entry has the new generation");
    vm.destroy();
}

/// A PAE guest whose first directory is in a slot that is not there when CR3 is loaded.
#[test]
fn a_page_directory_that_is_memory_only_later_is_found() {
    let mut vm = new_vm(Mode::Pae);
    set(&vm, ROOT, 0, LATE << 12 | P);
    set(&vm, LATE, 0, L1 << 12 | FULL);
    set(&vm, L1, 0, 0x200 << 12 | FULL);
    vm.watched.insert(0);
    vm.load_cr3(0, ROOT << 12, false);
    add_slot(&mut vm);
    vm.ram.changed.set(true);
    vm.note_tables();
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Memory(Gfn(0x200)));
    vm.check();
    vm.destroy();
}

/// A hypervisor that changes the entries of its guest's four roots in memory.
#[test]
fn a_walk_from_another_table_than_the_roots_is_not_mapped_below_it() {
    let mut vm = new_vm(Mode::Pae);
    set(&vm, ROOT, 0, L3 << 12 | P);
    for (directory, frame) in [(L3, 0x200), (L2, 0x201)] {
        set(&vm, directory, 0, (L1 + frame - 0x200) << 12 | FULL);
        set(&vm, L1 + frame - 0x200, 0, frame << 12 | FULL);
    }
    vm.watched.insert(0);
    vm.load_cr3(0, ROOT << 12, false);
    vm.vcpus[0].pdptrs[0] = L2 << 12 | P;
    vm.ram.changed.set(true);
    vm.note_tables();
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Memory(Gfn(0x201)));
    // What shadows the first directory says what that says.
    vm.check();
    vm.vcpus[0].pdptrs[0] = L3 << 12 | P;
    vm.reload(0);
    assert_eq!(vm.touch(0, 0, Kind::READ), Touch::Memory(Gfn(0x200)));
    vm.check();
    vm.destroy();
}

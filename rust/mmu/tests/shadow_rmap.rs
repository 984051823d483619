// SPDX-License-Identifier: GPL-2.0

//! Reverse maps against a multiset: which addresses map a frame.
//!
//! That the maps hold the very entries which map the frame, in KVM's layout, is
//! compared by `Vm::check`.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::{format, Random};
use rmmu_engine::mmu::{
    shadow::{Counter, Maximum},
    sync::atomic::Ordering,
    Gfn, GfnRange, Level,
};
use shadow::{
    cpu::Kind,
    host::Slot,
    paging::{Mode, Paging, FULL},
    set, Touch, Vm,
};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
};

const ROOT: u64 = 0x10;
const L3: u64 = 0x11;
const L2: u64 = 0x12;
const L1: u64 = 0x13;
const DATA: u64 = 0x40;
const END: u64 = 0x60;

/// A VM whose tables are there, but map nothing.
fn new_vm(tables: u64) -> Vm {
    let slots = vec![Slot::new(0, END, false)];
    let mut vm = Vm::new(format::npt(), Paging::new(Mode::Level4), slots, 1);
    vm.prefetch.set(false);
    set(&vm, ROOT, 0, L3 << 12 | FULL);
    set(&vm, L3, 0, L2 << 12 | FULL);
    for i in 0..tables {
        set(&vm, L2, i, (L1 + i) << 12 | FULL);
    }
    vm.load_cr3(0, ROOT << 12, false);
    vm
}

/// The guest maps `gfn` at an entry, and reads from there.
fn map(vm: &mut Vm, entry: u64, gfn: u64) -> Touch {
    let (table, index) = (L1 + entry / 512, entry % 512);
    let gpa = vm.paging.entry_gpa(Gfn(table), index);
    vm.emulated_store(gpa, gfn << 12 | FULL);
    vm.watched = BTreeSet::from([entry]);
    vm.ram.changed.set(true);
    vm.note_tables();
    vm.touch(0, entry << 12, Kind::READ)
}

fn unmap(vm: &mut Vm, entry: u64) {
    let (table, index) = (L1 + entry / 512, entry % 512);
    let gpa = vm.paging.entry_gpa(Gfn(table), index);
    vm.emulated_store(gpa, 0);
    vm.invlpg(0, entry << 12);
}

fn entries_of(vm: &Vm) -> BTreeMap<u64, u64> {
    let mut entries = BTreeMap::new();
    vm.machine.write(|lock| {
        vm.shadow
            .visit_leaves(&vm.machine, lock, vm.root(0), |addr, gfn, _, _| {
                entries.insert(addr.0, gfn.0);
                true
            });
    });
    entries
}

#[test]
fn maps_hold_what_was_added_and_not_removed() {
    let mut random = Random(11);
    let mut vm = new_vm(1);
    let mut model: BTreeMap<u64, u64> = BTreeMap::new();
    for step in 0..20_000 {
        let entry = random.below(120);
        match random.below(40) {
            0..=22 => {
                let gfn = DATA + random.below(4);
                assert_eq!(map(&mut vm, entry, gfn), Touch::Memory(Gfn(gfn)));
                model.insert(entry, gfn);
            }
            23..=38 => {
                unmap(&mut vm, entry);
                model.remove(&entry);
            }
            _ => {
                let gfn = DATA + random.below(4);
                vm.invalidate(GfnRange::new(Gfn(gfn), Gfn(gfn + 1)), |ram| {
                    ram.back(Gfn(gfn), true);
                });
                model.retain(|_, mapped| *mapped != gfn);
            }
        }
        if step % 16 == 0 {
            assert_eq!(entries_of(&vm), model);
            vm.check();
        }
    }
    assert!(vm.machine.maxima.borrow()[&Maximum::RmapSize] > 28);
    vm.destroy();
}

#[test]
fn a_frame_with_too_many_entries_loses_them_all() {
    let mut vm = new_vm(3);
    for entry in 0..1200 {
        let touch = map(&mut vm, entry, DATA);
        assert_eq!(touch, Touch::Memory(Gfn(DATA)));
    }
    vm.check();
    let entries = entries_of(&vm);
    assert_eq!(entries.len(), 1200 - 1001);
    assert!(entries.contains_key(&1199));
    assert_eq!(vm.machine.descs.get(), 199_i64.div_euclid(14) + 1);
    vm.destroy();
}

#[test]
fn one_entry_needs_no_descriptor() {
    let mut vm = new_vm(1);
    vm.cache.set((5, 0));
    for entry in 0..20 {
        vm.cache.set((5, 0));
        map(&mut vm, entry, DATA + entry);
        assert_eq!(vm.cache.get(), (5, 0), "a descriptor was asked for");
    }
    assert_eq!(vm.machine.descs.get(), 0);
    // The second one does, and without it the fault is tried again.
    let touch = map(&mut vm, 20, DATA);
    assert_eq!(touch, Touch::Memory(Gfn(DATA)));
    assert_ne!(vm.cache.get(), (5, 0));
    assert_eq!(vm.machine.descs.get(), 1);
    vm.check();
    vm.destroy();
}

/// A map that also has the entry of another frame, as a fault of ours may leave it.
#[test]
fn recovery_of_huge_pages_ends_although_an_entry_is_in_a_wrong_map() {
    let slots = vec![Slot::new(0, 0x400, false)];
    let mut vm = Vm::new(format::npt(), Paging::new(Mode::Level4), slots, 1);
    vm.prefetch.set(false);
    vm.load_direct(0, false);
    vm.touch_direct(0, 0x200, Kind::WRITE);
    let mut leaf = None;
    vm.visit(|page| {
        if page.role.level() == Level::L4K {
            leaf = Some(vm.machine.entry_address(page.hpa, 0));
        }
    });
    let (machine, slot) = (&vm.machine, &vm.machine.slots[0]);
    let wrong = slot.head(Gfn(0x201), Level::L4K).unwrap();
    wrong.store(leaf.unwrap(), Ordering::Relaxed);
    let looked = Cell::new(0);
    machine.write(|lock| {
        vm.shadow.recover_huge(machine, lock, slot, |_| {
            looked.set(looked.get() + 1);
            assert!(looked.get() < 10, "the same entry is found for ever");
            Level::L2M
        });
    });
    assert_eq!(machine.counter(Counter::ShadowZapped), 0);
    assert_eq!(machine.leaves[0].get(), 0);
    wrong.store(0, Ordering::Relaxed);
    vm.destroy();
}

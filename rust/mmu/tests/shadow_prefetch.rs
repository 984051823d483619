// SPDX-License-Identifier: GPL-2.0

//! Entries installed in advance: which, and which not.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::format;
use rmmu_engine::mmu::{
    shadow::Counter, sync::atomic::Ordering, Gfn, GfnRange, Host, Level, Outcome, Spte,
};
use shadow::{
    cpu::Kind,
    host::Slot,
    paging::{Mode, Paging, A, D, FULL, P, W},
    set, Touch, Vm,
};

const ROOT: u64 = 0x10;
const L3: u64 = 0x11;
const L2: u64 = 0x12;
const L1: u64 = 0x13;
const DATA: u64 = 0x40;
const END: u64 = 0x80;
/// A bit that must not be set.
const RESERVED: u64 = 1 << 50;

/// A VM whose first 32 pages map consecutive frames.
fn new_vm(mode: Mode) -> Vm {
    let slots = vec![Slot::new(0, END, false)];
    let mut vm = Vm::new(format::npt(), Paging::new(mode), slots, 1);
    match mode {
        Mode::Bits32 => set(&vm, ROOT, 0, L1 << 12 | FULL),
        _ => {
            set(&vm, ROOT, 0, L3 << 12 | FULL);
            set(&vm, L3, 0, L2 << 12 | FULL);
            set(&vm, L2, 0, L1 << 12 | FULL);
        }
    }
    for i in 0..32 {
        set(&vm, L1, i, (DATA + i) << 12 | FULL);
        vm.watched.insert(i);
    }
    vm.load_cr3(0, ROOT << 12, false);
    vm
}

/// The frames that are mapped, by page of the address space.
fn mapped(vm: &Vm) -> Vec<(u64, Spte)> {
    let mut leaves = Vec::new();
    vm.machine.write(|lock| {
        vm.shadow
            .visit_leaves(&vm.machine, lock, vm.root(0), |addr, _, _, spte| {
                leaves.push((addr.0, spte));
                true
            });
    });
    leaves
}

fn pages(vm: &Vm) -> Vec<u64> {
    mapped(vm).into_iter().map(|(page, _)| page).collect()
}

fn read(vm: &mut Vm, page: u64) {
    vm.note_tables();
    let touch = vm.touch(0, page << 12, Kind::READ);
    assert!(matches!(touch, Touch::Memory(_)), "{touch:?}");
    vm.check();
}

#[test]
fn the_aligned_group_of_eight_is_mapped_and_only_the_fault_is_an_access() {
    let mut vm = new_vm(Mode::Level4);
    read(&mut vm, 13);
    assert_eq!(pages(&vm), (8..16).collect::<Vec<_>>());
    assert_eq!(vm.machine.counter(Counter::Prefetched), 7);
    for (page, spte) in mapped(&vm) {
        assert_eq!(spte.is_accessed(vm.machine.format()), page == 13);
        assert!(spte.is_writable());
    }
    let (machine, slot) = (&vm.machine, &vm.machine.slots[0]);
    let is_young = |page: u64| {
        let range = GfnRange::new(Gfn(DATA + page), Gfn(DATA + page + 1));
        machine.write(|lock| vm.shadow.age(machine, lock, slot, range, true))
    };
    assert!(is_young(13));
    assert!(!is_young(12));
    vm.destroy();
}

#[test]
fn a_group_of_small_entries_in_the_second_half_of_a_table() {
    let mut vm = new_vm(Mode::Bits32);
    for i in 600..640 {
        set(&vm, L1, i, (DATA + i - 600) << 12 | FULL);
        vm.watched.insert(i);
    }
    vm.ram.changed.set(true);
    read(&mut vm, 611);
    assert_eq!(pages(&vm), (608..616).collect::<Vec<_>>());
    vm.destroy();
}

/// What is mapped after a read of page 8 + `at`, of the group from 8 to 15.
fn after(prepare: impl FnOnce(&mut Vm), at: u64) -> Vec<u64> {
    let mut vm = new_vm(Mode::Level4);
    prepare(&mut vm);
    read(&mut vm, 8 + at);
    let pages = pages(&vm).into_iter().map(|page| page - 8).collect();
    vm.destroy();
    pages
}

#[test]
fn the_first_failure_ends_it() {
    let entry = |i: u64, value: u64| {
        move |vm: &mut Vm| {
            set(vm, L1, 8 + i, value);
        }
    };
    let data = (DATA + 11) << 12;
    assert_eq!(after(entry(3, 0), 0), [0, 1, 2], "not present");
    assert_eq!(after(entry(3, data | FULL & !P), 5), [0, 1, 2, 5]);
    assert_eq!(
        after(entry(3, data | FULL & !A), 0),
        [0, 1, 2],
        "not accessed"
    );
    assert_eq!(after(entry(3, data | FULL | RESERVED), 7), [0, 1, 2, 7]);
    assert_eq!(after(entry(0, 0), 4), [4]);
    assert_eq!(after(entry(3, END << 12 | FULL), 0), [0, 1, 2], "no slot");
    // Clean or read-only is no failure, but not writable.
    assert_eq!(
        after(entry(3, data | FULL & !D), 0),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    assert_eq!(
        after(entry(3, data | FULL & !W), 0),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
}

#[test]
fn the_host_must_have_the_page_and_let_it_be_written() {
    let read_only = |vm: &mut Vm| {
        vm.ram.back(Gfn(DATA + 10), false);
    };
    assert_eq!(after(read_only, 0), [0, 1]);
    assert_eq!(after(read_only, 4), [0, 1, 4]);
}

#[test]
fn nothing_is_mapped_ahead_while_the_slot_logs_or_pages_are_taken_away() {
    assert_eq!(after(|vm| vm.start_logging(0), 2), [2]);
    assert_eq!(after(|vm| vm.prefetch.set(false), 2), [2]);
}

#[test]
fn an_empty_cache_ends_it() {
    // The fault takes four pages. No frame has an entry yet, so that only aliases
    // take descriptors.
    let aliases = |vm: &mut Vm| {
        vm.prefetch.set(false);
        for i in 0..8 {
            set(vm, L1, 16 + i, (DATA + 8 + i) << 12 | FULL);
        }
        vm.ram.changed.set(true);
        for i in 0..8 {
            read(vm, 16 + i);
        }
        vm.prefetch.set(true);
        vm.cache.set((5, 3));
    };
    let mut vm = new_vm(Mode::Level4);
    aliases(&mut vm);
    read(&mut vm, 8);
    assert_eq!(pages(&vm), [8, 9, 10, 16, 17, 18, 19, 20, 21, 22, 23]);
    vm.destroy();
}

#[test]
fn the_guests_tables_stay_protected() {
    // Two pages map tables, of the second and of the last level.
    let mut vm = new_vm(Mode::Level4);
    set(&vm, L1, 9, L2 << 12 | FULL);
    set(&vm, L1, 10, L1 << 12 | FULL);
    read(&mut vm, 8);
    assert_eq!(pages(&vm), (8..16).collect::<Vec<_>>());
    let format = vm.machine.format();
    for (page, spte) in mapped(&vm) {
        let table = page == 9 || page == 10;
        assert_eq!(spte.is_writable(), !table);
        assert_eq!(spte.is_mmu_writable(format), !table);
    }
    assert_eq!(vm.machine.counter(Counter::Unsync), 0);
    vm.destroy();
}

#[test]
fn what_is_mapped_already_is_left_alone() {
    let mut vm = new_vm(Mode::Level4);
    vm.prefetch.set(false);
    read(&mut vm, 10);
    vm.prefetch.set(true);
    read(&mut vm, 12);
    for (page, spte) in mapped(&vm) {
        let accessed = page == 10 || page == 12;
        assert_eq!(spte.is_accessed(vm.machine.format()), accessed);
    }
    assert_eq!(vm.machine.counter(Counter::Prefetched), 6);
    vm.destroy();
}

#[test]
fn a_sequential_touch_faults_once_a_group() {
    let count = |prefetch: bool| {
        let mut vm = new_vm(Mode::Level4);
        vm.prefetch.set(prefetch);
        for page in 0..32 {
            read(&mut vm, page);
        }
        let faults = vm.faults;
        vm.destroy();
        faults
    };
    assert_eq!(count(true), 4);
    assert_eq!(count(false), 32);
}

#[test]
fn direct_pages_map_runs_of_neighbours() {
    let slots = vec![Slot::new(0, END, false)];
    let mut vm = Vm::new(format::npt(), Paging::new(Mode::Level4), slots, 1);
    vm.load_direct(0, false);
    vm.prefetch.set(false);
    vm.touch_direct(0, 10, Kind::READ);
    vm.prefetch.set(true);
    // Two runs: before and behind what is mapped.
    vm.touch_direct(0, 13, Kind::READ);
    assert_eq!(pages(&vm), (8..16).collect::<Vec<_>>());
    assert_eq!(vm.prefetched.get(), 6);
    // A page that the host would have to make writable first ends a run.
    vm.ram.back(Gfn(18), false);
    vm.touch_direct(0, 22, Kind::READ);
    assert_eq!(
        pages(&vm)[8..],
        [16, 17, 22],
        "what is behind the failure is left"
    );
    // The slot ends.
    vm.touch_direct(0, END - 1, Kind::WRITE);
    assert_eq!(pages(&vm).len(), 19);
    let cell = |gfn: u64| {
        let head = vm.machine.slots[0].head(Gfn(gfn), Level::L4K).unwrap();
        head.load(Ordering::Relaxed)
    };
    assert_eq!(cell(18), 0);
    vm.check();
    vm.destroy();
}

#[test]
fn direct_pages_without_accessed_bits_map_nothing_ahead() {
    let slots = vec![Slot::new(0, END, false)];
    let mut vm = Vm::new(format::ept(false), Paging::new(Mode::Level4), slots, 1);
    vm.load_direct(0, false);
    assert_eq!(vm.map_direct(0, 13, Kind::READ), Outcome::Fixed);
    assert_eq!(pages(&vm), [13]);
    vm.destroy();
}

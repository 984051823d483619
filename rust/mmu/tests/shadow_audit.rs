// SPDX-License-Identifier: GPL-2.0

//! The audit finds what is broken, and calls it by its name. Each test breaks one thing
//! in the memory of a VM that is whole.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::format;
use rmmu_engine::mmu::{audit::Broken, sync::atomic::Ordering, Gfn, Host, Hpa, Level, Spte};
use shadow::{
    cpu::Kind,
    host::Slot,
    paging::{Mode, Paging, FULL},
    set, Touch, Vm,
};

const ROOT: u64 = 0x10;
const L3: u64 = 0x11;
const L2: u64 = 0x12;
const L1: u64 = 0x13;
const DATA: u64 = 0x200;

/// Two pages that are mapped, and the table that maps them, in use.
fn whole() -> Vm {
    let slots = vec![Slot::new(0, 0x400, false)];
    let mut vm = Vm::new(format::npt(), Paging::new(Mode::Level4), slots, 1);
    vm.prefetch.set(false);
    for (table, below) in [(ROOT, L3), (L3, L2), (L2, L1)] {
        set(&vm, table, 0, below << 12 | FULL);
    }
    for i in 0..2 {
        set(&vm, L1, i, (DATA + i) << 12 | FULL);
    }
    set(&vm, L1, 2, L1 << 12 | FULL);
    set(&vm, L1, 3, L2 << 12 | FULL);
    vm.watched.extend([0, 1, 2, 3]);
    vm.load_cr3(0, ROOT << 12, false);
    for i in 0..2 {
        let touch = vm.touch(0, i << 12, Kind::WRITE);
        assert!(matches!(touch, Touch::Memory(_)), "{touch:?}");
    }
    let (looked, found) = vm.audit();
    assert_eq!(found, []);
    assert_eq!(looked.pages, 4);
    assert_eq!(looked.shadow_entries, 5);
    assert_eq!(looked.rmap_entries, 2);
    assert_eq!(looked.frames, 0x400);
    vm
}

/// The page that shadows a table.
fn page(vm: &Vm, table: u64) -> Hpa {
    let mut found = None;
    vm.visit(|page| {
        if page.gfn == Gfn(table) {
            found = Some(page.hpa);
        }
    });
    found.unwrap()
}

fn entry(vm: &Vm, table: u64, index: usize) -> Spte {
    Spte(
        vm.machine
            .entry(page(vm, table), index)
            .load(Ordering::Relaxed),
    )
}

fn poke(vm: &Vm, table: u64, index: usize, spte: Spte) {
    let cell = vm.machine.entry(page(vm, table), index);
    cell.store(spte.0, Ordering::Relaxed);
}

fn head(vm: &Vm, gfn: u64) -> &rmmu_engine::mmu::sync::atomic::AtomicU64 {
    vm.machine.slots[0].head(Gfn(gfn), Level::L4K).unwrap()
}

/// Names of what the audit finds; the VM is not used any more.
fn found(vm: Vm) -> Vec<&'static str> {
    let (_, found) = vm.audit();
    let mut names: Vec<_> = found.iter().map(|finding| finding.what.name()).collect();
    names.sort_unstable();
    names.dedup();
    std::mem::forget(vm);
    names
}

#[test]
fn a_leaf_that_left_its_reverse_map() {
    let vm = whole();
    head(&vm, DATA).store(0, Ordering::Relaxed);
    assert_eq!(found(vm), [Broken::LeafNotInRmap.name()]);
}

#[test]
fn a_reverse_map_that_leads_to_another_frames_leaf() {
    let vm = whole();
    let other = head(&vm, DATA + 1).load(Ordering::Relaxed);
    head(&vm, DATA).store(other, Ordering::Relaxed);
    let names = [Broken::LeafNotInRmap, Broken::RmapWrongLeaf].map(Broken::name);
    assert_eq!(found(vm), names);
}

#[test]
fn a_reverse_map_that_leads_to_a_page_that_is_gone() {
    let mut vm = whole();
    let address = head(&vm, DATA).load(Ordering::Relaxed);
    vm.zap_fast();
    head(&vm, DATA).store(address, Ordering::Relaxed);
    assert_eq!(found(vm), [Broken::RmapDangling.name()]);
}

#[test]
fn a_table_that_can_be_written_to() {
    let mut vm = whole();
    let data = entry(&vm, L1, 0);
    let page = vm.ram.backing(Gfn(L2)).unwrap().pfn;
    vm.touch(0, 3 << 12, Kind::READ);
    let table = entry(&vm, L1, 3);
    let format = *vm.machine.format();
    assert_eq!(table.pfn(&format), page);
    assert!(!table.is_mmu_writable(&format));
    // The rights of the data's entry, for the table above the last level.
    let address = format.base_addr_mask;
    let writable = data.raw() & !address | table.raw() & address;
    poke(&vm, L1, 3, Spte(writable));
    assert_eq!(found(vm), [Broken::ProtectedWritable.name()]);
}

#[test]
fn a_link_that_its_page_does_not_know() {
    let vm = whole();
    let link = entry(&vm, L2, 0);
    poke(&vm, L2, 1, link);
    assert_eq!(found(vm), [Broken::LinkNotInParents.name()]);
}

#[test]
fn a_parent_that_does_not_lead_to_its_page() {
    let vm = whole();
    poke(&vm, L2, 0, Spte::NONPRESENT);
    assert_eq!(found(vm), [Broken::ParentWrong.name()]);
}

#[test]
fn a_link_to_no_page() {
    let vm = whole();
    let link = entry(&vm, L2, 0);
    poke(&vm, L2, 1, Spte(link.raw() + (1000 << 12)));
    assert_eq!(found(vm), [Broken::LinkDangling.name()]);
}

#[test]
fn a_link_to_a_page_for_something_else() {
    let vm = whole();
    let link = entry(&vm, L2, 0);
    poke(&vm, L3, 1, link);
    let names = [Broken::LinkNotInParents, Broken::LinkWrongPage].map(Broken::name);
    assert_eq!(found(vm), names);
}

#[test]
fn a_missing_mark_above_an_unsync_page() {
    let mut vm = whole();
    let gpa = vm.paging.entry_gpa(Gfn(L1), 7);
    vm.store(0, 2 << 12 | gpa & 0xfff, gpa, 0);
    assert_eq!(vm.audit().1, []);
    vm.machine.clear_unsync_marks(page(&vm, L2));
    assert_eq!(
        found(vm),
        [Broken::UnsyncCount.name(), Broken::UnsyncMark.name()]
    );
}

#[test]
fn counters_of_a_slot_that_are_wrong() {
    let vm = whole();
    vm.machine.slots[0].count_tracked(Gfn(L2), 1);
    assert_eq!(found(vm), [Broken::WriteTrackCount.name()]);
    let vm = whole();
    vm.machine.slots[0].count_lpage(Gfn(L2), Level::L2M, -1);
    assert_eq!(found(vm), [Broken::LpageCount.name()]);
    let vm = whole();
    vm.machine.slots[0].count_lpage(Gfn(L2), Level::L1G, 1);
    assert_eq!(found(vm), [Broken::LpageCount.name()]);
}

#[test]
fn a_table_whose_writes_are_not_tracked() {
    let vm = whole();
    vm.machine.slots[0].count_tracked(Gfn(L2), -1);
    let names = [Broken::TableUntracked, Broken::WriteTrackCount].map(Broken::name);
    assert_eq!(found(vm), names);
}

#[test]
fn bits_that_are_reserved() {
    let vm = whole();
    let spte = entry(&vm, L1, 0);
    poke(&vm, L1, 0, Spte(spte.raw() | 1 << 51));
    assert!(found(vm).contains(&Broken::ReservedBits.name()));
}

#[test]
fn leaves_that_are_not_accounted() {
    let vm = whole();
    let leaves = &vm.machine.leaves[0];
    leaves.set(leaves.get() + 1);
    assert_eq!(found(vm), [Broken::Accounting.name()]);
}

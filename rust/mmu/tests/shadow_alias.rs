// SPDX-License-Identifier: GPL-2.0

//! Frames that share a page of the host: the zero page, what KSM merged, two slots at
//! one address. A leaf belongs to the frame that it was made for, not to the page.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::format;
use rmmu_engine::mmu::{Gfn, GfnRange};
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
const FIRST: u64 = 0x200;
const SECOND: u64 = 0x201;

/// A guest whose page 0 is the frame `FIRST`, and two frames that share a page.
fn sharing(mode: Mode) -> Vm {
    let slots = vec![Slot::new(0, 0x400, false)];
    let mut vm = Vm::new(format::npt(), Paging::new(mode), slots, 1);
    vm.prefetch.set(false);
    for (table, below) in [(ROOT, L3), (L3, L2), (L2, L1)] {
        set(&vm, table, 0, below << 12 | FULL);
    }
    vm.ram.share(Gfn(SECOND), Gfn(FIRST));
    vm.watched.insert(0);
    set(&vm, L1, 0, FIRST << 12 | FULL & !W);
    vm.load_cr3(0, ROOT << 12, false);
    assert!(matches!(vm.touch(0, 0, Kind::READ), Touch::Memory(_)));
    vm
}

/// Takes the page behind a frame away; nothing may lead to it afterwards.
fn take_away(vm: &mut Vm, gfn: u64) {
    let range = GfnRange::new(Gfn(gfn), Gfn(gfn + 1));
    vm.invalidate(range, |ram| {
        ram.back(Gfn(gfn), true);
    });
    vm.check();
}

/// The guest makes page 0 the other frame, without a flush, and writes to it.
fn moved(mode: Mode) -> Vm {
    let mut vm = sharing(mode);
    set(&vm, L1, 0, SECOND << 12 | FULL);
    vm.note_tables();
    let touch = vm.touch(0, 0, Kind::WRITE);
    assert!(matches!(touch, Touch::Memory(_)), "{touch:?}");
    vm
}

#[test]
fn a_leaf_that_changes_its_frame_changes_the_reverse_map() {
    for mode in [Mode::Level4, Mode::Level4By5] {
        let vm = moved(mode);
        vm.check();
        vm.destroy();
    }
}

#[test]
fn a_notifier_of_either_frame_finds_what_maps_it() {
    for gfn in [FIRST, SECOND] {
        let mut vm = moved(Mode::Level4);
        take_away(&mut vm, gfn);
        vm.touch(0, 0, Kind::READ);
        vm.check();
        vm.destroy();
    }
}

#[test]
fn the_frame_of_before_is_discarded_after_its_page_table_went() {
    let mut vm = moved(Mode::Level4);
    vm.zap_fast();
    take_away(&mut vm, FIRST);
    take_away(&mut vm, SECOND);
    vm.touch(0, 0, Kind::WRITE);
    vm.check();
    vm.destroy();
}

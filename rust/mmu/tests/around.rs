// SPDX-License-Identifier: GPL-2.0

//! Fault-around: what is mapped with a page, what is not, and what is counted.

mod common;

use common::{
    format::{ept, npt},
    range,
    tlb::Access,
    Vm,
};
use rmmu_engine::mmu::{
    Around, Fault, Gfn, GfnRange, Host, Level, Neighbour, Outcome, Pfn, Spte, SpteFormat,
};

/// The host backs frame n by frame n + 1000; some are read-only, one may be missing.
struct Window {
    range: GfnRange,
    read_only: GfnRange,
    missing: Option<u64>,
    mapped: u64,
}

impl Window {
    fn new(start: u64, end: u64) -> Window {
        Window {
            range: range(start, end),
            read_only: range(0, 0),
            missing: None,
            mapped: 0,
        }
    }
}

impl Around for Window {
    fn range(&self) -> GfnRange {
        self.range
    }

    fn page(&self, gfn: Gfn) -> Option<Neighbour> {
        (self.missing != Some(gfn.0)).then(|| Neighbour {
            pfn: Pfn(gfn.0 + 1000),
            writable: !self.read_only.contains(gfn),
        })
    }

    fn mapped(&mut self, pages: u64) {
        self.mapped += pages;
    }
}

fn fault(vm: &Vm, gfn: u64) -> Fault<'_, common::host::Slot> {
    vm.fault(gfn, gfn + 1000, Level::L4K)
}

fn spte(vm: &Vm, gfn: u64) -> Option<Spte> {
    vm.leaf(gfn).map(|leaf| leaf.1)
}

fn mapped_frames(vm: &Vm) -> Vec<u64> {
    vm.leaves(0).into_keys().collect()
}

fn formats() -> [SpteFormat; 2] {
    [npt(), ept(true)]
}

#[test]
fn one_fault_maps_the_window_and_touches_only_its_own_page() {
    for format in formats() {
        let vm = Vm::new(format, 1);
        let mut window = Window::new(16, 32);
        window.read_only = range(20, 22);
        assert_eq!(
            vm.map_around(0, fault(&vm, 18), &mut window),
            Outcome::Fixed
        );
        assert_eq!(mapped_frames(&vm), (16..32).collect::<Vec<_>>());
        assert_eq!(window.mapped, 15);
        assert_eq!(vm.counted(Level::L4K), 16);
        for gfn in 16..32 {
            let entry = spte(&vm, gfn).unwrap();
            assert_eq!(entry.is_accessed(&format), gfn == 18, "{gfn}");
            assert_eq!(entry.is_dirty(&format), gfn == 18, "{gfn}");
            assert_eq!(entry.is_ahead(), gfn != 18, "{gfn}");
            assert_eq!(entry.is_writable(), !(20..22).contains(&gfn), "{gfn}");
            assert_eq!(
                vm.host.access(0, Gfn(gfn), false, false),
                Access::Hit(Pfn(gfn + 1000))
            );
        }
        vm.destroy();
    }
}

#[test]
fn it_stops_at_the_first_page_that_is_missing() {
    let vm = Vm::new(npt(), 1);
    let mut window = Window::new(16, 32);
    window.missing = Some(25);
    vm.map_around(0, fault(&vm, 18), &mut window);
    assert_eq!(mapped_frames(&vm), (16..25).collect::<Vec<_>>());
    vm.destroy();
}

#[test]
fn it_never_leaves_the_table_of_the_fault() {
    let vm = Vm::new(npt(), 1);
    let mut window = Window::new(500, 530);
    vm.map_around(0, fault(&vm, 510), &mut window);
    assert_eq!(mapped_frames(&vm), (500..512).collect::<Vec<_>>());
    let mut window = Window::new(500, 530);
    vm.map_around(0, fault(&vm, 513), &mut window);
    assert_eq!(mapped_frames(&vm), (500..530).collect::<Vec<_>>());
    assert_eq!(vm.counted(Level::L4K), 30);
    vm.destroy();
}

#[test]
fn what_is_there_already_stays_as_it_is() {
    let vm = Vm::new(ept(true), 1);
    let read_only = Fault {
        map_writable: false,
        ..fault(&vm, 17)
    };
    vm.map(0, read_only);
    // An access to a frame of no slot.
    let mmio = Fault {
        slot: None,
        mmio_generation: 4,
        ..fault(&vm, 20)
    };
    assert_eq!(vm.map(0, mmio), Outcome::Emulate);
    let before = spte(&vm, 17);
    let mut window = Window::new(16, 24);
    vm.map_around(0, fault(&vm, 18), &mut window);
    assert_eq!(spte(&vm, 17), before);
    let (_, device) = vm.leaves(0)[&20];
    assert!(device.is_mmio(vm.host.format()) && !device.is_present());
    assert_eq!(vm.counted(Level::L4K), 7);
    assert_eq!(window.mapped, 5);
    vm.destroy();
}

#[test]
fn the_log_of_dirty_pages_turns_it_off() {
    let vm = Vm::new(npt(), 1);
    let mut window = Window::new(16, 32);
    let logged = Fault {
        dirty_track: true,
        write: true,
        ..fault(&vm, 18)
    };
    assert_eq!(vm.map_around(0, logged, &mut window), Outcome::Fixed);
    assert_eq!(mapped_frames(&vm), [18]);
    assert_eq!(window.mapped, 0);
    assert_eq!(
        vm.slot.dirty.lock().unwrap().iter().collect::<Vec<_>>(),
        [&18]
    );
    vm.destroy();
}

#[test]
fn where_a_huge_page_could_be_it_stays_out() {
    let vm = Vm::new(npt(), 1);
    let mut window = Window::new(16, 32);
    // Split for the NX mitigation.
    let exec = Fault {
        exec: true,
        req_level: Level::L2M,
        huge_page_disallowed: true,
        nx_workaround: true,
        ..fault(&vm, 18)
    };
    assert_eq!(vm.map_around(0, exec, &mut window), Outcome::Fixed);
    assert_eq!(mapped_frames(&vm), [18]);
    let huge = vm.fault(1024 + 5, 2048, Level::L2M);
    let mut window = Window::new(1024, 1040);
    assert_eq!(vm.map_around(0, huge, &mut window), Outcome::Fixed);
    assert_eq!(vm.counted(Level::L4K), 1);
    vm.destroy();
}

#[test]
fn without_accessed_bits_it_is_off() {
    let vm = Vm::new(ept(false), 1);
    let mut window = Window::new(16, 32);
    assert_eq!(
        vm.map_around(0, fault(&vm, 18), &mut window),
        Outcome::Fixed
    );
    assert_eq!(mapped_frames(&vm), [18]);
    vm.destroy();
}

#[test]
fn a_spurious_fault_maps_nothing_ahead() {
    let vm = Vm::new(npt(), 1);
    vm.map(0, fault(&vm, 18));
    let mut window = Window::new(16, 32);
    assert_eq!(
        vm.map_around(0, fault(&vm, 18), &mut window),
        Outcome::Spurious
    );
    assert_eq!(mapped_frames(&vm), [18]);
    vm.destroy();
}

#[test]
fn zapping_tells_used_pages_from_unused_ones() {
    for format in formats() {
        let vm = Vm::new(format, 1);
        vm.map_around(0, fault(&vm, 18), &mut Window::new(16, 32));
        for gfn in [16, 20, 31] {
            vm.host.access(0, Gfn(gfn), true, false);
        }
        assert_eq!(
            vm.tdp.ahead_in_use(&vm.host, vm.root(0), range(16, 32)),
            (4, 12)
        );
        vm.unmap(range(16, 24));
        assert_eq!(vm.host.ahead(), (2, 5));
        assert_eq!(
            vm.tdp.ahead_in_use(&vm.host, vm.root(0), range(16, 32)),
            (1, 7)
        );
        assert_eq!(vm.destroy_and(|host| host.ahead()), (3, 12));
    }
}

#[test]
fn aging_sees_idle_pages_as_idle_and_counts_each_page_once() {
    for format in formats() {
        let vm = Vm::new(format, 1);
        vm.map_around(0, fault(&vm, 18), &mut Window::new(16, 32));
        assert!(
            !vm.tdp.age(&vm.host, None, range(19, 32), true),
            "only looking"
        );
        assert_eq!(vm.host.ahead(), (0, 0));
        vm.host.access(0, Gfn(25), false, false);
        for gfn in 19..32 {
            let young = vm.tdp.age(&vm.host, None, range(gfn, gfn + 1), false);
            assert_eq!(young, gfn == 25, "{gfn}");
        }
        assert_eq!(vm.host.ahead(), (1, 12));
        assert!(!vm.tdp.age(&vm.host, None, range(19, 32), false));
        vm.unmap(range(19, 32));
        assert_eq!(vm.host.ahead(), (1, 12), "counted before");
        vm.destroy();
    }
}

#[test]
fn a_write_to_a_page_that_was_mapped_ahead_for_reading_is_a_use() {
    let vm = Vm::new(npt(), 1);
    let mut window = Window::new(16, 32);
    window.read_only = range(16, 32);
    vm.map_around(0, fault(&vm, 18), &mut window);
    let write = Fault {
        write: true,
        ..fault(&vm, 20)
    };
    assert_eq!(
        vm.host.access(0, Gfn(20), true, false),
        Access::Fault { present: true }
    );
    assert_eq!(vm.map(0, write), Outcome::Fixed);
    let entry = spte(&vm, 20).unwrap();
    assert!(entry.is_writable() && !entry.is_ahead());
    assert_eq!(vm.host.ahead(), (1, 0));
    vm.destroy();
}

#[test]
fn a_huge_page_in_its_place_ends_the_account_of_a_window() {
    let vm = Vm::new(npt(), 1);
    vm.map_around(0, fault(&vm, 18), &mut Window::new(16, 32));
    vm.host.access(0, Gfn(30), false, false);
    assert_eq!(vm.map(0, vm.fault(18, 512, Level::L2M)), Outcome::Fixed);
    assert_eq!(vm.host.ahead(), (1, 14));
    // Promotion makes a huge page out of a small one; the note must not come along.
    let format = *vm.host.format();
    let small = spte_ahead(&format);
    assert!(small.is_ahead());
    assert!(!small.huge_from_small(&format, Level::L2M, false).is_ahead());
    vm.destroy();
}

fn spte_ahead(format: &SpteFormat) -> Spte {
    let vm = Vm::new(*format, 1);
    vm.map_around(0, fault(&vm, 0), &mut Window::new(0, 2));
    let entry = spte(&vm, 1).unwrap();
    vm.destroy();
    entry
}

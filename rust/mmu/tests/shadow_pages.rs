// SPDX-License-Identifier: GPL-2.0

//! The life of pages: quota, floods of writes, roots, NX candidates, splitting, and
//! what the slots' owner asks for.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::{format, portion, Random};
use rmmu_engine::mmu::{
    shadow::{Counter, PageInfo, SplitError},
    Flush, Gfn, GfnRange, Level, Outcome, Spte,
};
use shadow::{
    cpu::{Hit, Kind},
    host::{Caches, Slot},
    paging::{Mode, Paging, FULL, PS},
    set, Touch, Vm,
};
use std::collections::BTreeMap;

const ROOT: u64 = 0x10;
const L3: u64 = 0x11;
const L2: u64 = 0x12;
const L1: u64 = 0x20;
const DATA: u64 = 0x200;
const END: u64 = 0x1000;

fn new_vm(mode: Mode) -> Vm {
    let slots = vec![Slot::new(0, END, false)];
    let vm = Vm::new(format::npt(), Paging::new(mode), slots, 1);
    vm.machine.recursive_zap.set(vm.paging.nested);
    vm.prefetch.set(false);
    set(&vm, ROOT, 0, L3 << 12 | FULL);
    set(&vm, L3, 0, L2 << 12 | FULL);
    vm
}

/// A VM with `tables` tables of the last level, one page of each in use.
fn with_tables(tables: u64) -> Vm {
    let mut vm = new_vm(Mode::Level4);
    for i in 0..tables {
        set(&vm, L2, i, (L1 + i) << 12 | FULL);
        set(&vm, L1 + i, 0, (DATA + i) << 12 | FULL);
        vm.watched.insert(i << 9);
    }
    vm.load_cr3(0, ROOT << 12, false);
    for i in 0..tables {
        read(&mut vm, i << 21);
    }
    vm
}

/// A VM with the roots of a guest without tables.
fn direct(format: rmmu_engine::mmu::SpteFormat, pae: bool) -> Vm {
    let slots = vec![Slot::new(0, END, false)];
    let mut vm = Vm::new(format, Paging::new(Mode::Level4), slots, 1);
    vm.prefetch.set(false);
    vm.load_direct(0, pae);
    vm
}

fn read(vm: &mut Vm, va: u64) {
    let touch = vm.touch(0, va, Kind::READ);
    assert!(matches!(touch, Touch::Memory(_)), "{touch:?} at {va:#x}");
}

fn pages_of(vm: &Vm, gfn: u64) -> Vec<PageInfo> {
    let mut pages = Vec::new();
    vm.visit(|page| {
        if page.gfn == Gfn(gfn) {
            pages.push(*page);
        }
    });
    pages
}

/// Leaves by address: frame, level, entry.
fn leaves(vm: &Vm) -> BTreeMap<u64, (u64, Level, Spte)> {
    let mut leaves = BTreeMap::new();
    vm.machine.write(|lock| {
        vm.shadow
            .visit_leaves(&vm.machine, lock, vm.root(0), |addr, gfn, level, spte| {
                leaves.insert(addr.0, (gfn.0, level, spte));
                true
            });
    });
    leaves
}

#[test]
fn the_oldest_pages_make_room_and_roots_stay() {
    let mut vm = with_tables(60);
    assert_eq!(vm.shadow.pages(), 63);
    vm.machine.write(|lock| {
        vm.shadow.set_max_pages(&vm.machine, lock, 66);
        vm.shadow.make_available(&vm.machine, lock).unwrap();
    });
    // 25 are free: 22 went, the oldest first, but for the root.
    assert_eq!(vm.shadow.pages(), 41);
    assert_eq!(vm.machine.counter(Counter::Recycled), 22);
    assert_eq!(pages_of(&vm, L3).len(), 0);
    assert_eq!(pages_of(&vm, L2).len(), 0);
    for i in 0..60 {
        assert_eq!(pages_of(&vm, L1 + i).len(), usize::from(i >= 20), "{i}");
    }
    vm.check();
    for i in 0..60 {
        read(&mut vm, i << 21);
        assert!(vm.shadow.pages() <= 66);
    }
    vm.check();
    vm.destroy();
}

#[test]
fn a_quota_of_less_than_the_roots_leaves_the_roots() {
    let vm = with_tables(4);
    vm.machine.write(|lock| {
        vm.shadow.set_max_pages(&vm.machine, lock, 0);
        assert_eq!(vm.shadow.max_pages(), 1);
        assert!(vm.shadow.make_available(&vm.machine, lock).is_err());
        vm.shadow.set_max_pages(&vm.machine, lock, 2);
        // One page is enough to try.
        vm.shadow.make_available(&vm.machine, lock).unwrap();
    });
    assert_eq!(vm.shadow.pages(), 1);
    vm.check();
    vm.destroy();
}

fn track(vm: &Vm, gpa: u64, bytes: usize) {
    vm.machine.write(|lock| {
        vm.shadow.track_write(&vm.machine, lock, gpa, bytes, true);
    });
}

#[test]
fn the_third_write_that_no_walk_came_between_is_a_flood() {
    let mut vm = with_tables(2);
    let gpa = (L2 << 12) + 800;
    track(&vm, gpa, 8);
    track(&vm, gpa, 8);
    vm.shadow.clear_flood(&vm.machine, vm.root(0), 0);
    track(&vm, gpa, 8);
    track(&vm, gpa, 8);
    assert_eq!(pages_of(&vm, L2).len(), 1);
    assert_eq!(vm.machine.counter(Counter::Flooded), 0);
    // A fault that comes by says that it is a table, too.
    set(&vm, L2, 1, (L1 + 1) << 12 | FULL);
    vm.invalidate(GfnRange::new(Gfn(DATA + 1), Gfn(DATA + 2)), |_| {});
    read(&mut vm, 1 << 21);
    track(&vm, gpa, 8);
    track(&vm, gpa, 8);
    assert_eq!(pages_of(&vm, L2).len(), 1);
    track(&vm, gpa, 8);
    assert_eq!(pages_of(&vm, L2).len(), 0);
    assert_eq!(vm.machine.counter(Counter::Flooded), 1);
    assert_eq!(vm.machine.counter(Counter::PdeZapped), 6);
    assert_eq!(vm.machine.counter(Counter::PteWrite), 7);
    // The last level becomes unsync instead.
    for _ in 0..10 {
        track(&vm, L1 << 12, 8);
    }
    assert_eq!(pages_of(&vm, L1).len(), 1);
    vm.check();
    vm.destroy();
}

#[test]
fn a_write_that_is_not_of_one_entry_zaps_the_page() {
    for (offset, bytes, zapped) in [
        (0, 8, false),
        (4, 4, false),
        (8, 1, false),
        (9, 1, true),
        (8, 2, true),
        (4, 8, true),
        (0, 16, true),
    ] {
        let vm = with_tables(1);
        track(&vm, (L1 << 12) + offset, bytes);
        let left = pages_of(&vm, L1).len();
        assert_eq!(left == 0, zapped, "{bytes} bytes at {offset}");
        vm.check();
        vm.destroy();
    }
}

#[test]
fn a_root_in_use_is_zapped_but_freed_by_its_last_user() {
    let mut vm = with_tables(1);
    let root = vm.vcpus[0].roots.clone().unwrap().pages(&vm.machine)[0];
    let helped = vm
        .machine
        .write(|lock| vm.shadow.unprotect_gfn(&vm.machine, lock, Gfn(ROOT)));
    assert!(!helped, "it is protected again at once");
    assert_eq!(vm.machine.roots_zapped.get(), 1);
    assert!(vm.shadow.is_obsolete(root));
    assert_eq!(pages_of(&vm, ROOT).len(), 0);
    vm.check();
    read(&mut vm, 0);
    let root = vm.vcpus[0].roots.clone().unwrap().pages(&vm.machine)[0];
    assert!(!vm.shadow.is_obsolete(root));
    assert_eq!(pages_of(&vm, ROOT).len(), 1);
    vm.check();
    vm.destroy();
}

#[test]
fn pages_of_the_last_generation_are_zapped_in_batches() {
    let mut vm = with_tables(40);
    vm.machine.break_every.set(1);
    vm.zap_fast();
    // One batch is ten pages, and the root is among them.
    assert_eq!(vm.machine.yields.get(), 4);
    assert_eq!(vm.shadow.pages(), 1, "the root is in use");
    for i in 0..40 {
        read(&mut vm, i << 21);
    }
    vm.check();
    vm.destroy();
}

#[test]
fn pages_of_a_slot_that_goes_are_zapped() {
    let mut vm = with_tables(40);
    let (machine, slot) = (&vm.machine, &vm.machine.slots[0]);
    machine.break_every.set(3);
    let range = GfnRange::new(Gfn(0), Gfn(END));
    machine.write(|lock| {
        let flush = vm
            .shadow
            .unmap_range(machine, lock, slot, range, true, Flush::none());
        vm.shadow.zap_slot_pages(machine, lock, slot, flush);
    });
    assert_eq!(vm.shadow.indirect_pages(), 0);
    vm.machine.slots[0].assert_unused();
    vm.drop_obsolete(0);
    assert_eq!(vm.shadow.pages(), 0);
    vm.destroy();
}

#[test]
fn a_fault_whose_walk_is_out_of_date_maps_nothing() {
    for (table, index) in [(ROOT, 0), (L3, 0), (L2, 1), (L1 + 1, 0)] {
        // The tables are there and shadowed, and then they are not.
        for fresh in [false, true] {
            let mut vm = with_tables(2);
            vm.invalidate(GfnRange::new(Gfn(DATA + 1), Gfn(DATA + 2)), |_| {});
            if fresh {
                vm.zap_fast();
                vm.ensure_roots(0);
            }
            let walked = vm.walk(0, 1 << 21, Kind::READ).unwrap();
            let gpa = vm.paging.entry_gpa(Gfn(table), index);
            let entry = vm.ram.load(gpa, vm.paging.width());
            let before = leaves(&vm);
            vm.ram.store(gpa, vm.paging.width(), entry & !4);
            let (outcome, _) = vm.map(0, 1 << 21, Kind::READ, &walked).unwrap();
            assert_eq!(outcome, Outcome::Retry, "{table:#x}");
            assert_eq!(leaves(&vm), before);
            vm.ram.store(gpa, vm.paging.width(), entry);
            let (outcome, _) = vm.map(0, 1 << 21, Kind::READ, &walked).unwrap();
            assert_eq!(outcome, Outcome::Fixed, "{table:#x}");
            vm.check();
            vm.destroy();
        }
    }
}

#[test]
fn huge_pages_are_mapped_where_guest_host_and_slot_allow_them() {
    let mut vm = new_vm(Mode::Level4);
    vm.ram.back_huge(Gfn(0x400));
    set(&vm, L2, 0, 0x400 << 12 | FULL | PS);
    set(&vm, L2, 1, 0x600 << 12 | FULL | PS);
    // The same memory by small pages.
    set(&vm, L2, 2, L1 << 12 | FULL);
    set(&vm, L1, 0, 0x405 << 12 | FULL);
    vm.watched.extend([0x7, 0x200 + 7, 0x400]);
    vm.load_cr3(0, ROOT << 12, false);
    for va in [0x7, 0x200 + 7, 0x400] {
        read(&mut vm, va << 12);
    }
    let found = leaves(&vm);
    assert_eq!(found[&0].1, Level::L2M);
    assert_eq!(found[&0x207].1, Level::L4K, "the host's pages are small");
    assert_eq!(found[&0x400].0, 0x405);
    // The guest uses a frame of the huge page as a table.
    set(&vm, L2, 3, 0x450 << 12 | FULL);
    set(&vm, 0x450, 0, DATA << 12 | FULL);
    vm.watched.insert(0x600);
    vm.ram.changed.set(true);
    vm.note_tables();
    read(&mut vm, 0x600 << 12);
    vm.check();
    vm.destroy();
}

#[test]
fn nx_candidates_are_recovered_oldest_first() {
    let mut vm = direct(format::npt(), false);
    vm.machine.nx.set(true);
    let exec = Kind {
        exec: true,
        ..Kind::READ
    };
    for i in 2..5 {
        vm.ram.back_huge(Gfn(i << 9));
        vm.touch_direct(0, i << 9, Kind::READ);
        assert_eq!(leaves(&vm)[&(i << 9)].1, Level::L2M);
        vm.touch_direct(0, i << 9 | 3, exec);
        // The huge page is not put back as long as there is the small one.
        vm.touch_direct(0, i << 9 | 4, Kind::READ);
        assert_eq!(leaves(&vm)[&(i << 9 | 4)].1, Level::L4K);
    }
    assert_eq!(vm.shadow.nx_candidates(), 3);
    let recover = |budget: u64, skip: bool| {
        vm.machine
            .write(|lock| vm.shadow.recover_nx(&vm.machine, lock, budget, |_, _| skip))
    };
    assert_eq!(recover(1, false), 1);
    assert_eq!(vm.shadow.nx_candidates(), 2);
    assert!(!leaves(&vm).contains_key(&(2 << 9 | 3)));
    assert!(leaves(&vm).contains_key(&(3 << 9 | 3)));
    assert_eq!(recover(1, true), 0, "a slot that logs");
    assert!(leaves(&vm).contains_key(&(3 << 9 | 3)));
    assert_eq!(recover(10, false), 1);
    assert_eq!(vm.shadow.nx_candidates(), 0);
    vm.touch_direct(0, 2 << 9 | 9, Kind::READ);
    assert_eq!(leaves(&vm)[&(2 << 9)].1, Level::L2M);
    vm.check();
    vm.destroy();
}

/// A nested guest with `pages` huge pages, `aliases` times each.
fn nested_huge(pages: u64, aliases: u64) -> Vm {
    let mut vm = new_vm(Mode::Level4By5);
    for i in 0..pages {
        let gfn = (i + 2) << 9;
        vm.ram.back_huge(Gfn(gfn));
        for alias in 0..aliases {
            let index = i * aliases + alias;
            // Aliases with other rights are not split into the same page.
            let rights = if alias % 2 == 0 { FULL } else { FULL & !2 };
            set(&vm, L2, index, gfn << 12 | rights | PS);
            vm.watched.insert(index << 9);
        }
    }
    vm.load_cr3(0, ROOT << 12, false);
    for index in 0..pages * aliases {
        read(&mut vm, index << 21);
        assert_eq!(leaves(&vm)[&(index << 9)].1, Level::L2M);
    }
    vm.check();
    vm
}

fn split(vm: &Vm, caches: &mut Caches<'_>) -> Result<(), SplitError> {
    let slot = &vm.machine.slots[0];
    vm.machine.write(|lock| {
        vm.shadow
            .split_huge(&vm.machine, lock, caches, slot, slot.range, Level::L4K)
    })
}

#[test]
fn nested_huge_pages_are_split_into_what_they_were() {
    for aliases in 1..4 {
        let vm = nested_huge(2, aliases);
        let huge = leaves(&vm);
        let mut caches = Caches {
            pages: 0,
            descs: 0,
            refill: Some((1, 513)),
            ..Caches::full(&vm.machine)
        };
        let flushes = vm.machine.flushes.get();
        split(&vm, &mut caches).unwrap();
        assert_eq!(vm.machine.flushes.get(), flushes, "nothing was unmapped");
        assert!(caches.fills >= 2 * aliases.min(2), "{}", caches.fills);
        let small = leaves(&vm);
        assert_eq!(small.len(), huge.len() * 512);
        for (addr, (gfn, level, spte)) in small {
            let (first, _, old) = huge[&(addr & !511)];
            assert_eq!(level, Level::L4K);
            assert_eq!(gfn, first | addr & 511);
            assert_eq!(spte.is_writable(), old.is_writable());
            assert_eq!(spte.raw() & 0xfff & !0x80, old.raw() & 0xfff & !0x80);
        }
        assert_eq!(vm.machine.counter(Counter::NestedSplit), 2 * aliases as i64);
        vm.check();
        vm.destroy();
    }
}

#[test]
fn splitting_stops_cleanly_when_memory_or_quota_ends() {
    let vm = nested_huge(3, 1);
    let mut caches = Caches {
        pages: 1,
        descs: 513,
        refill: None,
        ..Caches::full(&vm.machine)
    };
    assert_eq!(split(&vm, &mut caches), Err(SplitError::NoMemory));
    assert_eq!(vm.machine.counter(Counter::NestedSplit), 1);
    vm.check();
    vm.machine.write(|lock| {
        let pages = vm.shadow.pages();
        vm.shadow.set_max_pages(&vm.machine, lock, pages + 6);
    });
    caches.refill = Some((1, 513));
    assert_eq!(split(&vm, &mut caches), Err(SplitError::NoSpace));
    assert_eq!(vm.machine.counter(Counter::NestedSplit), 2);
    vm.check();
    vm.destroy();
}

#[test]
fn a_fast_fault_makes_writable_what_only_the_log_protects() {
    for pae in [false, true] {
        let mut vm = direct(format::npt(), pae);
        for gfn in [3, 4] {
            vm.touch_direct(0, gfn, Kind::WRITE);
        }
        vm.start_logging(0);
        assert_eq!(vm.hit_direct(0, 3, Kind::WRITE), Hit::Protected);
        vm.touch_direct(0, 3, Kind::WRITE);
        assert_eq!(vm.faults, 0);
        let slot = &vm.machine.slots[0];
        assert_eq!(slot.dirty.borrow().iter().copied().collect::<Vec<_>>(), [3]);
        // Protected for good: the slow path must be asked.
        vm.machine.write(|lock| {
            let flush = vm
                .shadow
                .write_protect_gfn(&vm.machine, lock, slot, Gfn(4), Level::L4K);
            assert!(flush.needed());
            rmmu_engine::mmu::Host::spend(&vm.machine, flush, lock);
        });
        let fast = vm.fast_direct(0, 4, Kind::WRITE);
        assert_eq!(fast, rmmu_engine::mmu::FastOutcome::Invalid);
        vm.harvest(0);
        vm.check();
        vm.destroy();
    }
}

#[test]
fn a_fast_fault_restores_what_aging_made_inaccessible() {
    let vm = direct(format::ept(false), false);
    let (machine, slot) = (&vm.machine, &vm.machine.slots[0]);
    assert_eq!(vm.map_direct(0, 5, Kind::READ), Outcome::Fixed);
    let range = GfnRange::new(Gfn(5), Gfn(6));
    let age = |test| machine.write(|lock| vm.shadow.age(machine, lock, slot, range, test));
    assert!(age(true));
    assert!(age(false));
    assert!(!age(false));
    let fast = vm.fast_direct(0, 5, Kind::READ);
    assert_eq!(fast, rmmu_engine::mmu::FastOutcome::Fixed);
    assert!(age(true));
    vm.destroy();
}

#[test]
fn random_operations_on_direct_pages() {
    for pae in [false, true] {
        let mut random = Random(21);
        let mut vm = direct(format::npt(), pae);
        for step in 0..portion(20_000) {
            vm.prefetch.set(random.once_in(2));
            let gfn = random.below(END);
            let gfn = if random.once_in(2) { gfn % 40 } else { gfn };
            match random.below(24) {
                0 => {
                    let range =
                        GfnRange::new(Gfn(gfn), Gfn((gfn + 1 + random.below(600)).min(END)));
                    vm.invalidate(range, |ram| {
                        for gfn in range.start.0..range.end.0 {
                            ram.huge.borrow_mut().remove(&(gfn >> 9));
                            ram.back(Gfn(gfn), true);
                        }
                    });
                }
                1 => {
                    let range = GfnRange::of(Gfn(gfn), Level::L2M);
                    vm.invalidate(range, |ram| ram.back_huge(range.start));
                }
                2 if random.once_in(8) => vm.start_logging(0),
                3 => {
                    vm.harvest(0);
                    if random.once_in(2) {
                        vm.machine.slots[0].logged.set(false);
                        let (machine, slot) = (&vm.machine, &vm.machine.slots[0]);
                        machine.write(|lock| {
                            let allowed = |gfn| vm.max_level(gfn);
                            vm.shadow.recover_huge(machine, lock, slot, allowed);
                        });
                    }
                }
                4 if random.once_in(20) => {
                    vm.zap_fast();
                    let old = vm.vcpus[0].roots.take().unwrap();
                    let pages = old.pages(&vm.machine);
                    vm.machine
                        .write(|lock| vm.shadow.put_roots(&vm.machine, lock, pages));
                    vm.load_direct(0, pae);
                }
                5 => {
                    let (machine, slot) = (&vm.machine, &vm.machine.slots[0]);
                    let range = GfnRange::new(Gfn(gfn), Gfn(END));
                    machine.write(|lock| vm.shadow.age(machine, lock, slot, range, false));
                }
                6 => vm.machine.break_every.set(random.below(3)),
                7 if random.once_in(50) => {
                    vm.invalidate(GfnRange::new(Gfn(0), Gfn(END)), |_| {});
                    let nx = vm.machine.nx.get();
                    vm.machine.nx.set(!nx);
                }
                _ => {
                    let kind = Kind {
                        write: random.once_in(3),
                        exec: false,
                        user: true,
                    };
                    let exec = !kind.write && random.once_in(3);
                    vm.touch_direct(0, gfn, Kind { exec, ..kind });
                }
            }
            if step % 64 == 0 {
                vm.check();
            }
        }
        vm.check();
        vm.destroy();
    }
}

#[test]
fn host_mmio_is_noted_in_the_root_or_with_the_vm() {
    for pae in [false, true] {
        let vm = direct(format::npt(), pae);
        vm.map_direct(0, 1, Kind::READ);
        assert_eq!(vm.machine.mmio_mapped.get(), 0);
        vm.machine.host_mmio.set(true);
        for gfn in 2..5 {
            vm.map_direct(0, gfn, Kind::READ);
        }
        let told = (
            vm.machine.mmio_mapped.get(),
            vm.machine.mmio_mapped_without_root.get(),
        );
        // A page's header says it once and for all. Where there is none, the host keeps it.
        assert_eq!(told, if pae { (0, 3) } else { (1, 0) });
    }
}

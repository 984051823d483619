// SPDX-License-Identifier: GPL-2.0

//! Unsync pages: the walk that finds them, against a brute-force search.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::{format, portion, Random};
use rmmu_engine::mmu::{
    shadow::{Counter, PageEvent, PageInfo},
    sync::atomic::Ordering,
    Gfn, Host, Hpa, Level, Spte,
};
use shadow::{
    cpu::Kind,
    host::{Machine, Slot},
    paging::{Mode, Paging, FULL, U, W},
    set, Touch, Vm,
};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

/// More than a walk hands out at a time.
const WIDE: u64 = 40;

const ROOT: u64 = 0x10;
const OTHER_ROOT: u64 = 0x11;
const L3: u64 = 0x20;
const L2: u64 = 0x40;
const L1: u64 = 0x80;
const DATA: u64 = 0x200;
const END: u64 = 0x300;

fn new_vm() -> Vm {
    let slots = vec![Slot::new(0, END, false)];
    let vm = Vm::new(format::npt(), Paging::new(Mode::Level4), slots, 1);
    vm.prefetch.set(false);
    vm.machine.write(|lock| {
        vm.shadow.set_max_pages(&vm.machine, lock, 4000);
    });
    vm.cache.set((100, 1000));
    vm
}

fn va(i4: u64, i3: u64, i2: u64, i1: u64) -> u64 {
    i4 << 39 | i3 << 30 | i2 << 21 | i1 << 12
}

/// All pages in use.
fn pages(vm: &Vm) -> BTreeMap<u64, PageInfo> {
    let mut pages = BTreeMap::new();
    vm.visit(|page| {
        pages.insert(page.hpa.0, *page);
    });
    pages
}

/// Unsync pages below one, by looking everywhere.
fn unsync_below(vm: &Vm, pages: &BTreeMap<u64, PageInfo>, from: u64) -> BTreeSet<u64> {
    let mut seen = BTreeSet::new();
    let mut todo = vec![from];
    while let Some(hpa) = todo.pop() {
        let Some(page) = pages.get(&hpa).filter(|_| seen.insert(hpa)) else {
            continue;
        };
        for index in 0..512 {
            let spte = Spte(vm.machine.entry(Hpa(hpa), index).load(Ordering::Relaxed));
            if spte.is_nonleaf(page.role.level()) {
                todo.push(spte.hpa(vm.machine.format()).0);
            }
        }
    }
    seen.retain(|hpa| pages[hpa].unsync);
    seen
}

fn all_unsync(vm: &Vm) -> BTreeSet<u64> {
    let pages = pages(vm);
    let unsync = pages.values().filter(|page| page.unsync);
    unsync.map(|page| page.hpa.0).collect()
}

fn root(vm: &Vm) -> u64 {
    vm.vcpus[0].roots.as_ref().unwrap().pages(&vm.machine)[0]
        .hpa()
        .0
}

/// The guest's write to a table becomes possible.
fn unsync(vm: &Vm, table: u64) {
    let slot = &vm.machine.slots[0];
    vm.machine.read(|lock| {
        vm.shadow
            .try_unsync(&vm.machine, lock, slot, Gfn(table), false)
            .unwrap();
    });
}

/// A random tree: tables are shared, also with other rights, which makes them
/// several pages.
fn random_tree(random: &mut Random) -> Vm {
    let mut vm = new_vm();
    let rights = |random: &mut Random| FULL & !(if random.once_in(3) { W } else { 0 });
    let tables = 4 + random.below(WIDE);
    for root in [ROOT, OTHER_ROOT] {
        for i in 0..3 {
            let value = (L3 + random.below(3)) << 12 | rights(random);
            set(&vm, root, i, value);
        }
    }
    for table in 0..3 {
        for i in 0..3 {
            let value = (L2 + random.below(4)) << 12 | rights(random);
            set(&vm, L3 + table, i, value);
        }
    }
    for table in 0..4 {
        for i in 0..12 {
            let value = (L1 + random.below(tables)) << 12 | rights(random);
            set(&vm, L2 + table, i, value);
        }
    }
    for table in 0..tables {
        for i in 0..2 {
            set(&vm, L1 + table, i, (DATA + random.below(8)) << 12 | FULL);
        }
    }
    for root in [OTHER_ROOT, ROOT] {
        vm.load_cr3(0, root << 12, true);
        for i4 in 0..3 {
            for i3 in 0..3 {
                for i2 in 0..12 {
                    let va = va(i4, i3, i2, random.below(2));
                    vm.watched.insert(va >> 12);
                    vm.ram.changed.set(true);
                    vm.note_tables();
                    if !random.once_in(4) {
                        assert!(matches!(vm.touch(0, va, Kind::READ), Touch::Memory(_)));
                    }
                }
            }
        }
    }
    vm.cache.set((5, 14));
    for table in 0..tables {
        if !random.once_in(3) {
            unsync(&vm, L1 + table);
        }
    }
    vm
}

#[test]
fn a_sync_brings_exactly_the_unsync_pages_below_up_to_date_and_each_once() {
    let mut random = Random(7);
    let mut most = 0;
    for round in 0..portion(60) {
        let mut vm = random_tree(&mut random);
        vm.check();
        let before = all_unsync(&vm);
        let expected = unsync_below(&vm, &pages(&vm), root(&vm));
        most = most.max(expected.len());
        vm.machine.break_every.set(round % 2);
        let synced = vm.machine.counter(Counter::Synced);
        vm.sync(0);
        let synced = vm.machine.counter(Counter::Synced) - synced;
        assert_eq!(synced, expected.len() as i64);
        let left: BTreeSet<u64> = before.difference(&expected).copied().collect();
        assert_eq!(all_unsync(&vm), left);
        // It yields between batches, and does not look again when it is done.
        let batches = expected.len().div_ceil(16).max(1) as u64;
        if round % 2 == 1 {
            assert!(vm.machine.yields.get() < batches.max(2));
        }
        assert!(!vm.shadow.is_unsync(vm.machine.page(Hpa(root(&vm)))));
        vm.check();
        vm.destroy();
    }
    assert!(most > 32, "the walk was hardly ever out of room: {most}");
}

#[test]
fn a_zapped_page_takes_the_unsync_pages_below_with_it() {
    let mut random = Random(8);
    let mut most = 0;
    for _ in 0..portion(60) {
        let vm = random_tree(&mut random);
        let table = Gfn(if random.once_in(2) { L3 } else { L2 } + random.below(3));
        let before = pages(&vm);
        let zapped: Vec<u64> = before
            .values()
            .filter(|page| page.gfn == table)
            .map(|page| page.hpa.0)
            .collect();
        let doomed: BTreeSet<u64> = zapped
            .iter()
            .flat_map(|&hpa| unsync_below(&vm, &before, hpa))
            .collect();
        most = most.max(doomed.len());
        vm.machine
            .write(|lock| vm.shadow.unprotect_gfn(&vm.machine, lock, table));
        let after = pages(&vm);
        for (hpa, page) in &before {
            let gone = doomed.contains(hpa) || zapped.contains(hpa);
            assert_eq!(!after.contains_key(hpa), gone, "{page:x?}");
        }
        vm.check();
        vm.destroy();
    }
    assert!(most > 16, "the walk was never out of room: {most}");
}

/// Whether the hardware comes from the page at `hpa` to one of `pages`.
fn reaches(machine: &Machine, hpa: u64, level: Level, pages: &BTreeSet<u64>) -> bool {
    if pages.contains(&hpa) {
        return true;
    }
    (0..512).any(|index| {
        let spte = Spte(machine.entry(Hpa(hpa), index).load(Ordering::Relaxed));
        match level.child() {
            Some(child) if spte.is_nonleaf(level) => {
                reaches(machine, spte.hpa(machine.format()).0, child, pages)
            }
            _ => false,
        }
    })
}

/// From now on, and whenever the engine lets anything be known, whoever asks without
/// the lock whether a root is unsync must hear that it is as long as one of `stale` can
/// be reached from it. Returns how often that was so.
fn watch(vm: &Vm, roots: &[u64], stale: &BTreeSet<u64>) -> Rc<Cell<u64>> {
    let asked = Rc::new(Cell::new(0));
    let (count, shadow) = (Rc::clone(&asked), Rc::clone(&vm.shadow));
    let (roots, stale) = (roots.to_vec(), stale.clone());
    *vm.machine.observer.borrow_mut() = Some(Rc::new(move |machine, _| {
        for &root in &roots {
            if !shadow.is_unsync(machine.page(Hpa(root))) {
                let late = reaches(machine, root, Level::L512G, &stale);
                assert!(
                    !late,
                    "what is stale can be reached, and a root is not unsync"
                );
            } else {
                count.set(count.get() + 1);
            }
        }
    }));
    asked
}

#[test]
fn a_root_is_unsync_until_a_zap_has_taken_what_is_stale_out_of_reach() {
    let mut random = Random(9);
    let mut asked = 0;
    for round in 0..60 {
        let mut vm = random_tree(&mut random);
        let table = match round % 3 {
            0 => ROOT,
            1 => L3 + random.below(3),
            _ => L2 + random.below(4),
        };
        vm.machine.recursive_zap.set(random.once_in(2));
        let roots: Vec<u64> = vm.held_roots().into_iter().collect();
        assert_eq!(roots.len(), 2);
        let watched = watch(&vm, &roots, &all_unsync(&vm));
        vm.machine
            .write(|lock| vm.shadow.unprotect_gfn(&vm.machine, lock, Gfn(table)));
        if random.once_in(3) {
            vm.machine
                .write(|lock| vm.shadow.zap_all(&vm.machine, lock));
        }
        *vm.machine.observer.borrow_mut() = None;
        asked += watched.get();
        vm.drop_obsolete(0);
        vm.check();
        vm.destroy();
    }
    assert!(
        asked > 1000,
        "a root was hardly ever unsync in a zap: {asked}"
    );
}

#[test]
fn a_root_is_unsync_before_an_unsync_page_that_is_linked_below_it_is_read() {
    let mut vm = new_vm();
    for (i, root) in [ROOT, OTHER_ROOT].into_iter().enumerate() {
        let i = i as u64;
        set(&vm, root, 0, (L3 + i) << 12 | FULL);
        set(&vm, L3 + i, 0, (L2 + i) << 12 | FULL);
        set(&vm, L2 + i, 0, L1 << 12 | FULL);
    }
    vm.load_cr3(0, ROOT << 12, false);
    for i in 0..2 {
        set(&vm, L1, i, DATA << 12 | FULL);
        vm.watched.insert(i);
        assert_eq!(vm.touch(0, i << 12, Kind::READ), Touch::Memory(Gfn(DATA)));
    }
    vm.load_cr3(0, OTHER_ROOT << 12, true);
    unsync(&vm, L1);
    // The other root's path leads to the table for the first time. When the table's
    // page has been brought up to date for that, another CPU of the guest, which runs
    // on the same root, writes to another entry of the table and flushes.
    let root = Hpa(root(&vm));
    let told = Rc::new(Cell::new(None));
    let (answer, shadow, ram) = (Rc::clone(&told), Rc::clone(&vm.shadow), Rc::clone(&vm.ram));
    let (gpa, width) = (vm.paging.entry_gpa(Gfn(L1), 1), vm.paging.width());
    *vm.machine.observer.borrow_mut() = Some(Rc::new(move |machine, event| {
        if matches!(event, Some(PageEvent::Found(page)) if page.gfn() == Gfn(L1)) {
            ram.store(gpa, width, (DATA + 1) << 12 | FULL);
            answer.set(Some(shadow.is_unsync(machine.page(root))));
        }
    }));
    vm.touch(0, 0, Kind::READ);
    *vm.machine.observer.borrow_mut() = None;
    let touch = vm.touch(0, 1 << 12, Kind::READ);
    assert!(
        told.get() == Some(true) || touch == Touch::Memory(Gfn(DATA + 1)),
        "{:?} was answered, but {touch:?} is stale",
        told.get()
    );
    vm.check();
    vm.destroy();
}

/// Many unsync tables below one of the second level.
fn wide_tree() -> Vm {
    let mut vm = new_vm();
    set(&vm, ROOT, 0, L3 << 12 | FULL);
    set(&vm, OTHER_ROOT, 0, L3 << 12 | FULL & !U);
    set(&vm, L3, 0, L2 << 12 | FULL);
    for i in 0..WIDE {
        set(&vm, L2, i, (L1 + i) << 12 | FULL);
        set(&vm, L1 + i, 0, DATA << 12 | FULL);
        vm.watched.insert(va(0, 0, i, 0) >> 12);
    }
    vm.load_cr3(0, ROOT << 12, false);
    for i in 0..WIDE {
        vm.touch(0, va(0, 0, i, 0), Kind::READ);
    }
    for i in 0..WIDE {
        unsync(&vm, L1 + i);
    }
    vm.cache.set((5, 14));
    vm
}

#[test]
fn a_fault_that_links_unsync_pages_is_interrupted_and_gets_on() {
    let mut vm = wide_tree();
    // Another entry leads to the table of the second level, with the same rights.
    set(&vm, L3, 1, L2 << 12 | FULL);
    vm.watched.insert(va(0, 1, 0, 0) >> 12);
    vm.ram.changed.set(true);
    vm.note_tables();
    vm.machine.break_every.set(1);
    assert_eq!(
        vm.touch(0, va(0, 1, 0, 0), Kind::READ),
        Touch::Memory(Gfn(DATA))
    );
    // Two of three batches were interrupted.
    assert_eq!(vm.sync_requests.get(), (WIDE.div_ceil(16)) - 1);
    assert_eq!(vm.machine.counter(Counter::Synced), WIDE as i64);
    assert_eq!(all_unsync(&vm), BTreeSet::new());
    vm.check();
    vm.destroy();
}

#[test]
fn a_page_that_cannot_be_synced_is_zapped() {
    let mut vm = wide_tree();
    vm.machine.slots[0].valid.set(false);
    let root = vm.vcpus[0].roots.clone().unwrap();
    let pages_before = vm.shadow.pages();
    vm.sync(0);
    vm.machine.slots[0].valid.set(true);
    assert_eq!(vm.shadow.pages(), pages_before - WIDE);
    assert_eq!(vm.vcpus[0].roots, Some(root));
    vm.check();
    assert_eq!(
        vm.touch(0, va(0, 0, 3, 0), Kind::READ),
        Touch::Memory(Gfn(DATA))
    );
    vm.destroy();
}

#[test]
fn a_page_of_another_mode_than_the_vcpus_is_zapped_with_a_warning() {
    let mut vm = wide_tree();
    let pages_before = vm.shadow.pages();
    // The vCPU would need roots of another role, but uses the old one.
    vm.paging.wp = !vm.paging.wp;
    vm.sync(0);
    vm.paging.wp = !vm.paging.wp;
    assert_eq!(vm.shadow.pages(), pages_before - WIDE);
    let warnings = vm.machine.warnings.take();
    assert_eq!(warnings.len(), WIDE as usize);
    vm.check();
    assert_eq!(
        vm.touch(0, va(0, 0, 3, 0), Kind::READ),
        Touch::Memory(Gfn(DATA))
    );
    vm.destroy();
}

#[test]
fn a_tracked_table_does_not_become_unsync() {
    let vm = wide_tree();
    let slot = &vm.machine.slots[0];
    for (table, prefetch, allowed) in [
        (L2, false, false),
        (L3, false, false),
        (ROOT, false, false),
        (L1, true, true),
        (DATA, true, true),
    ] {
        let result = vm.machine.read(|lock| {
            vm.shadow
                .try_unsync(&vm.machine, lock, slot, Gfn(table), prefetch)
        });
        assert_eq!(result.is_ok(), allowed, "{table:#x}");
    }
    let mut vm = vm;
    vm.sync(0);
    // Nobody wants to write: no reason to give the protection up.
    let prefetched = vm.machine.read(|lock| {
        vm.shadow
            .try_unsync(&vm.machine, lock, &vm.machine.slots[0], Gfn(L1), true)
    });
    assert!(prefetched.is_err());
    assert_eq!(all_unsync(&vm), BTreeSet::new());
    vm.destroy();
}

#[test]
fn invalidating_an_address_syncs_that_address_only() {
    let mut vm = wide_tree();
    for i in 0..2 {
        set(&vm, L1 + i, 0, (DATA + 1) << 12 | FULL);
    }
    vm.note_tables();
    vm.invlpg(0, va(0, 0, 1, 0));
    assert_eq!(
        vm.touch(0, va(0, 0, 1, 0), Kind::READ),
        Touch::Memory(Gfn(DATA + 1))
    );
    // Not flushed: the old translation may still be used, and is.
    assert_eq!(
        vm.touch(0, va(0, 0, 0, 0), Kind::READ),
        Touch::Memory(Gfn(DATA))
    );
    assert_eq!(all_unsync(&vm).len(), WIDE as usize);
    vm.destroy();
}

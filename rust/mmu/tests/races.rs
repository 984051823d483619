// SPDX-License-Identifier: GPL-2.0

//! Two at one entry: where the engine calls out in the middle of an operation,
//! another operation is run right there.

mod common;

use common::{
    format::npt,
    host::{Cache, FakeHost, Slot},
    range, Vm,
};
use rmmu_engine::mmu::{
    sync::atomic::Ordering, Fault, Gfn, Host, Level, MmuRead, Outcome, TablePtr, TableSource,
};

/// A cache of tables; something else happens while a table is taken from it.
struct Interrupted<'a, F: FnMut()> {
    host: &'a FakeHost,
    meanwhile: F,
}

// SAFETY: What the host allocates belongs to nobody else.
unsafe impl<F: FnMut()> TableSource for Interrupted<'_, F> {
    fn take(&mut self) -> Option<TablePtr> {
        (self.meanwhile)();
        self.host.alloc_table()
    }
}

/// Serves a fault, with `meanwhile` at each table that it takes.
fn map_while(vm: &Vm, mut fault: Fault<'_, Slot>, meanwhile: impl FnMut()) -> Outcome {
    let root = vm.root(0);
    let host = &vm.host;
    host.read(|lock| {
        let mut source = Interrupted { host, meanwhile };
        vm.tdp.map(host, lock, root, &mut fault, &mut source)
    })
}

/// The lock is held for read by the thread already, as by another one.
fn other_reader<R>(f: impl FnOnce(&mut MmuRead<'_>) -> R) -> R {
    // SAFETY: Called only from within `map_while`, which holds it.
    f(&mut unsafe { MmuRead::assume_held() })
}

#[test]
fn a_fault_on_its_way_into_a_removed_table_links_nothing_there() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(5, Level::L4K), Outcome::Fixed);
    // The fault has found the table of 2 MiB entries; now all of it becomes a page
    // of 1 GiB.
    let outcome = map_while(&vm, vm.fault(1024, 1024, Level::L4K), || {
        other_reader(|lock| {
            vm.tdp
                .recover_huge(&vm.host, lock, false, range(0, 1 << 18), |_| Level::L1G);
        });
    });
    assert_eq!(outcome, Outcome::Retry);
    assert_eq!(vm.counted(Level::L1G), 1);
    assert_eq!(vm.leaves(0).len(), 1);
    vm.destroy();
}

#[test]
fn of_two_faults_that_add_a_table_one_retries_and_both_are_served() {
    let vm = Vm::new(npt(), 1);
    let mut first = true;
    let outcome = map_while(&vm, vm.fault(1024, 1024, Level::L4K), || {
        if std::mem::take(&mut first) {
            let mut fault = vm.fault(1025, 1025, Level::L4K);
            let mut cache = Cache(&vm.host);
            let root = vm.root(0);
            let outcome =
                other_reader(|lock| vm.tdp.map(&vm.host, lock, root, &mut fault, &mut cache));
            assert_eq!(outcome, Outcome::Fixed);
        }
    });
    assert_eq!(outcome, Outcome::Retry);
    assert_eq!(vm.map(0, vm.fault(1024, 1024, Level::L4K)), Outcome::Fixed);
    assert_eq!(vm.leaves(0).into_keys().collect::<Vec<_>>(), [1024, 1025]);
    vm.destroy();
}

#[test]
fn a_split_that_finds_the_huge_page_changed_gives_its_table_back() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(0, Level::L2M), Outcome::Fixed);
    let outcome = map_while(&vm, vm.fault(3, 3, Level::L4K), || {
        other_reader(|lock| {
            vm.tdp
                .clear_dirty_range(&vm.host, lock, false, range(0, 512));
        });
    });
    assert_eq!(outcome, Outcome::Retry);
    let (level, spte) = vm.leaf(3).unwrap();
    assert_eq!(level, Level::L2M);
    assert!(!spte.is_dirty(vm.host.format()), "the change is not undone");
    vm.destroy();
}

#[test]
fn a_candidate_removed_during_recovery_is_neither_zapped_nor_lost() {
    let vm = Vm::new(npt(), 1);
    vm.host.nx.store(true, Ordering::Relaxed);
    for block in 0..3 {
        let exec = Fault {
            exec: true,
            huge_page_disallowed: true,
            nx_workaround: true,
            req_level: Level::L2M,
            ..vm.fault(block * 512, block * 512, Level::L4K)
        };
        assert_eq!(vm.map(0, exec), Outcome::Fixed);
    }
    let zapped = vm.host.read(|lock| {
        vm.tdp.recover_nx(&vm.host, lock, 10, |gfn, _| {
            // It is off the list already, and here somebody promotes it.
            if gfn.0 == 512 {
                other_reader(|lock| {
                    let level = |gfn: Gfn| if gfn.0 == 512 { Level::L2M } else { Level::L4K };
                    vm.tdp
                        .recover_huge(&vm.host, lock, false, range(512, 1024), level);
                });
            }
            false
        })
    });
    assert_eq!(zapped, 2);
    assert_eq!(vm.leaves(0).into_keys().collect::<Vec<_>>(), [512]);
    assert_eq!(vm.counted(Level::L2M), 1);
    vm.destroy();
}

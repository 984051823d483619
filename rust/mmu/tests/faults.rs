// SPDX-License-Identifier: GPL-2.0

//! Page faults, roots, and what takes mappings away: one behaviour a test.

mod common;

use common::{
    format::{ept, npt, root_role},
    host::{Cache, FilledCache},
    range,
    tlb::Access,
    Vm,
};
use rmmu_engine::mmu::{
    sync::atomic::Ordering, FastOutcome, Fault, Flush, Gfn, Host, Level, Outcome, Pfn, Spte,
};

#[test]
fn a_read_fault_maps_the_frame_and_the_second_is_spurious() {
    for format in [npt(), ept(true), ept(false)] {
        let vm = Vm::new(format, 1);
        assert_eq!(
            vm.host.access(0, Gfn(5), false, false),
            Access::Fault { present: false }
        );
        assert_eq!(vm.map(0, vm.fault(5, 77, Level::L4K)), Outcome::Fixed);
        assert_eq!(
            vm.host.access(0, Gfn(5), false, false),
            Access::Hit(Pfn(77))
        );
        assert_eq!(vm.map(0, vm.fault(5, 77, Level::L4K)), Outcome::Spurious);
        assert_eq!(vm.counted(Level::L4K), 1);
        // The root is not accounted: three tables below it are.
        assert_eq!(vm.host.tables.load(Ordering::Relaxed), 3);
        vm.destroy();
    }
}

#[test]
fn huge_pages_are_mapped_at_the_level_asked_for() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(512 * 3 + 7, Level::L2M), Outcome::Fixed);
    assert_eq!(vm.map_write((1 << 18) + 99, Level::L1G), Outcome::Fixed);
    assert_eq!(vm.leaf(512 * 3).map(|leaf| leaf.0), Some(Level::L2M));
    assert_eq!(vm.leaf(1 << 18).map(|leaf| leaf.0), Some(Level::L1G));
    for gfn in [512 * 3 + 500, (1 << 18) + 54_321] {
        assert_eq!(
            vm.host.access(0, Gfn(gfn), true, false),
            Access::Hit(Pfn(gfn))
        );
    }
    vm.destroy();
}

#[test]
fn a_small_fault_into_a_huge_page_splits_it_and_keeps_the_rest_mapped() {
    for format in [npt(), ept(true), ept(false)] {
        let vm = Vm::new(format, 1);
        assert_eq!(vm.map_write(0, Level::L1G), Outcome::Fixed);
        let fault = vm.fault(1000, 1000, Level::L4K);
        assert_eq!(
            vm.map(0, fault),
            Outcome::Spurious,
            "split, and mapped already"
        );
        assert_eq!(vm.counted(Level::L1G), 0);
        assert_eq!(vm.counted(Level::L2M), 511);
        assert_eq!(vm.counted(Level::L4K), 512);
        for gfn in [0, 512, 1000, 1023, 1024, (1 << 18) - 1] {
            assert_eq!(vm.pfn_of(gfn), Some(gfn));
        }
        vm.destroy();
    }
}

#[test]
fn a_huge_fault_replaces_the_small_pages_below_and_flushes_before_their_table_is_freed() {
    let vm = Vm::new(npt(), 2);
    for gfn in 0..20 {
        assert_eq!(vm.map_write(gfn, Level::L4K), Outcome::Fixed);
        // The hardware of both vCPUs now knows the table of small pages.
        vm.host.access(1, Gfn(gfn), true, false);
    }
    let tables = vm.host.tables_in_use();
    assert_eq!(vm.map_write(600, Level::L1G), Outcome::Fixed);
    assert_eq!(vm.host.tables_in_use(), tables - 2);
    assert_eq!((vm.counted(Level::L4K), vm.counted(Level::L1G)), (0, 1));
    vm.destroy();
}

#[test]
fn a_write_to_a_read_only_page_of_the_host_does_not_become_writable() {
    let vm = Vm::new(npt(), 1);
    let fault = vm.fault(1, 1, Level::L4K);
    let read_only = Fault {
        map_writable: false,
        ..fault
    };
    assert_eq!(vm.map(0, read_only), Outcome::Fixed);
    assert_eq!(
        vm.host.access(0, Gfn(1), true, false),
        Access::Fault { present: true }
    );
    assert_eq!(vm.fast(1, true, false), FastOutcome::Invalid);
    vm.destroy();
}

#[test]
fn a_write_to_a_tracked_page_is_reported_as_write_protected() {
    let vm = Vm::new(npt(), 1);
    let tracked = || Fault {
        write: true,
        write_tracked: true,
        ..vm.fault(1, 1, Level::L4K)
    };
    assert_eq!(vm.map(0, tracked()), Outcome::WriteProtected);
    assert_eq!(vm.map(0, tracked()), Outcome::WriteProtected, "every time");
    assert_eq!(vm.fast(1, true, false), FastOutcome::Invalid);
    assert_eq!(vm.host.access(0, Gfn(1), false, false), Access::Hit(Pfn(1)));
    vm.destroy();
}

#[test]
fn a_fault_without_a_slot_leaves_an_mmio_entry_with_the_generation() {
    for format in [npt(), ept(true)] {
        let vm = Vm::new(format, 1);
        let mmio = |generation| Fault {
            slot: None,
            mmio_generation: generation,
            ..vm.fault(0xfee00, 0, Level::L4K)
        };
        assert_eq!(vm.map(0, mmio(9)), Outcome::Emulate);
        assert_eq!(vm.host.access(0, Gfn(0xfee00), false, false), Access::Mmio);
        let leaves = vm.leaves(0);
        let (_, spte) = leaves[&0xfee00];
        assert_eq!(spte.mmio_generation(), 9);
        assert_eq!(spte.mmio_gfn(&format), Gfn(0xfee00));
        assert_eq!(vm.map(0, mmio(10)), Outcome::Emulate);
        assert_eq!(vm.leaves(0)[&0xfee00].1.mmio_generation(), 10);
        // Memory appears where MMIO was.
        assert_eq!(vm.map(0, vm.fault(0xfee00, 3, Level::L4K)), Outcome::Fixed);
        assert_eq!(
            vm.map(0, mmio(11)),
            Outcome::Retry,
            "look at the slots again"
        );
        assert_eq!(vm.pfn_of(0xfee00), Some(3));
        vm.destroy();
    }
}

#[test]
fn a_frame_beyond_the_root_is_emulated() {
    let vm = Vm::new(npt(), 1);
    let far = 1 << 36;
    assert_eq!(vm.map(0, vm.fault(far, 1, Level::L4K)), Outcome::Emulate);
    assert_eq!(vm.fast(far, true, false), FastOutcome::Invalid);
    let mut sptes = [Spte::NONPRESENT; 6];
    assert!(vm
        .tdp
        .walk(&vm.host, vm.root(0), Gfn(far), &mut sptes)
        .is_none());
    vm.unmap(range(far, far + 512));
    vm.destroy();
}

#[test]
fn an_exhausted_cache_is_reported_and_leaves_nothing_half_done() {
    let vm = Vm::new(npt(), 1);
    for left in 0..3 {
        vm.host.allocations_left.store(left, Ordering::Relaxed);
        let fault = vm.fault(9 << 18, 1, Level::L4K);
        assert_eq!(vm.map(0, fault), Outcome::OutOfMemory);
        vm.host.allocations_left.store(i64::MAX, Ordering::Relaxed);
        vm.invalidate();
        vm.load_root(0, vm.role);
        vm.host
            .read(|lock| vm.tdp.zap_invalidated_roots(&vm.host, lock));
    }
    assert_eq!(vm.map(0, vm.fault(9 << 18, 1, Level::L4K)), Outcome::Fixed);
    vm.destroy();
}

#[test]
fn filled_tables_are_used_as_they_are() {
    let vm = Vm::new(npt(), 1);
    let mut fault = vm.fault(3, 4, Level::L4K);
    let root = vm.root(0);
    let outcome = vm.host.read(|lock| {
        let mut cache = FilledCache(&vm.host);
        vm.tdp.map(&vm.host, lock, root, &mut fault, &mut cache)
    });
    assert_eq!(outcome, Outcome::Fixed);
    assert_eq!(vm.leaves(0).len(), 1);
    vm.destroy();
}

#[test]
fn another_page_under_a_present_entry_is_refused_and_breaks_the_vm() {
    let vm = Vm::new(npt(), 1);
    let read_only = |pfn| Fault {
        map_writable: false,
        ..vm.fault(1, pfn, Level::L4K)
    };
    assert_eq!(vm.map(0, read_only(7)), Outcome::Fixed);
    let other = Fault {
        write: true,
        ..vm.fault(1, 8, Level::L4K)
    };
    assert_eq!(vm.map(0, other), Outcome::Retry);
    assert_eq!(vm.pfn_of(1), Some(7), "the tables are as they were");
    assert_eq!(vm.host.bugs().len(), 1);
}

#[test]
fn reserved_bits_are_refused_and_break_the_vm() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map(0, vm.fault(1, 1 << 35, Level::L4K)), Outcome::Retry);
    assert!(vm.leaves(0).is_empty());
    assert_eq!(vm.host.bugs().len(), 1);
}

#[test]
fn the_first_host_mmio_mapping_marks_the_root() {
    let vm = Vm::new(npt(), 1);
    let root = vm.root(0);
    // SAFETY: The vCPU holds a reference.
    let table = unsafe { root.as_ref() };
    assert!(!table.has_host_mmio());
    let fault = Fault {
        is_host_mmio: true,
        ..vm.fault(1, 1, Level::L4K)
    };
    assert_eq!(vm.map(0, fault), Outcome::Fixed);
    assert!(table.has_host_mmio());
    // SAFETY: A header is larger than the offset; the byte is what KVM reads.
    let byte = unsafe { root.as_ptr().as_ptr().cast::<u8>().add(68).read() };
    assert_eq!(byte, 1);
    vm.destroy();
}

#[test]
fn vcpus_share_a_root_and_smm_has_its_own() {
    let vm = Vm::new(npt(), 3);
    assert_eq!(vm.root(0), vm.root(1));
    let smm = vm.load_root(2, root_role(vm.host.format(), true));
    assert_ne!(vm.root(0), smm);
    assert_eq!(vm.map(2, vm.fault(1, 1, Level::L4K)), Outcome::Fixed);
    assert!(
        vm.leaves(0).is_empty(),
        "the other address space has nothing"
    );
    let mut seen = Vec::new();
    vm.host.read(|lock| {
        vm.tdp.visit_roots(&vm.host, lock, |root, role, invalid| {
            seen.push((root, role.smm, invalid))
        });
    });
    seen.sort_by_key(|root| root.1);
    assert_eq!(seen, [(vm.root(0), false, false), (smm, true, false)]);
    vm.destroy();
}

#[test]
fn unmapping_one_address_space_leaves_the_other() {
    let vm = Vm::new(npt(), 2);
    vm.load_root(1, root_role(vm.host.format(), true));
    for vcpu in [0, 1] {
        assert_eq!(vm.map(vcpu, vm.fault(1, 1, Level::L4K)), Outcome::Fixed);
    }
    vm.host.write(|lock| {
        let flush = vm.tdp.unmap_range(
            &vm.host,
            lock,
            Some(true),
            range(0, 10),
            true,
            Flush::none(),
        );
        assert!(flush.needed());
        vm.host.spend(flush, lock);
    });
    assert_eq!((vm.leaves(0).len(), vm.leaves(1).len()), (1, 0));
    vm.unmap(range(0, 10));
    assert_eq!(vm.leaves(0).len(), 0);
    vm.destroy();
}

#[test]
fn an_unmap_owes_a_flush_only_if_something_was_mapped() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map(0, vm.fault(5, 5, Level::L4K)), Outcome::Fixed);
    vm.host.write(|lock| {
        let flush = vm
            .tdp
            .unmap_range(&vm.host, lock, None, range(6, 100), true, Flush::none());
        assert!(!flush.needed());
        let flush = vm
            .tdp
            .unmap_range(&vm.host, lock, None, range(6, 100), true, Flush::pending());
        assert!(flush.needed(), "what was owed before is still owed");
        let flush = vm.tdp.zap_leafs(&vm.host, lock, range(5, 6), Flush::none());
        assert!(flush.needed());
        vm.host.spend(flush, lock);
    });
    assert!(vm.leaves(0).is_empty());
    vm.destroy();
}

#[test]
fn a_walk_that_yields_flushes_first_and_goes_on_where_it_was() {
    let vm = Vm::new(npt(), 1);
    for gfn in 0..100 {
        assert_eq!(vm.map_write(gfn * 3, Level::L4K), Outcome::Fixed);
        vm.host.access(0, Gfn(gfn * 3), true, false);
    }
    vm.host.break_every.store(1, Ordering::Relaxed);
    let flushes = vm.host.flushes.load(Ordering::Relaxed);
    vm.unmap(range(0, 300));
    let yields = vm.host.yields.load(Ordering::Relaxed);
    assert!(yields >= 100, "{yields} yields");
    assert!(vm.host.flushes.load(Ordering::Relaxed) - flushes >= 100);
    assert!(vm.leaves(0).is_empty());
    vm.destroy();
}

#[test]
fn a_walk_that_must_not_yield_does_not() {
    let vm = Vm::new(npt(), 1);
    for gfn in 0..50 {
        assert_eq!(vm.map_write(gfn, Level::L4K), Outcome::Fixed);
    }
    vm.host.break_every.store(1, Ordering::Relaxed);
    vm.host.write(|lock| {
        let flush = vm
            .tdp
            .unmap_range(&vm.host, lock, None, range(0, 50), false, Flush::none());
        vm.host.spend(flush, lock);
    });
    assert_eq!(vm.host.yields.load(Ordering::Relaxed), 0);
    assert!(vm.leaves(0).is_empty());
    vm.destroy();
}

#[test]
fn an_invalidated_root_maps_nothing_more_and_is_freed_by_its_last_user() {
    let vm = Vm::new(npt(), 2);
    assert_eq!(vm.map_write(1, Level::L4K), Outcome::Fixed);
    let old = vm.root(0);
    vm.invalidate();
    assert_eq!(vm.map_write(2, Level::L4K), Outcome::Retry);
    assert_ne!(vm.load_root(0, vm.role), old);
    vm.host
        .read(|lock| vm.tdp.zap_invalidated_roots(&vm.host, lock));
    assert_eq!(vm.counted(Level::L4K), 0);
    assert_eq!(
        vm.host.tables_in_use(),
        2,
        "the second vCPU still has the old root"
    );
    assert_eq!(vm.root(1), old);
    vm.unload_root(1);
    assert_eq!(vm.host.tables_in_use(), 1);
    vm.load_root(1, vm.role);
    assert_eq!(vm.root(1), vm.root(0));
    vm.destroy();
}

#[test]
fn a_notifier_reaches_memory_below_an_invalid_root() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(1, Level::L4K), Outcome::Fixed);
    let old = vm.root(0);
    vm.invalidate();
    assert!(vm.tdp.get_root(old));
    vm.load_root(0, vm.role);
    vm.host.write(|lock| {
        let flush = vm
            .tdp
            .unmap_range(&vm.host, lock, None, range(0, 9), true, Flush::none());
        assert!(!flush.needed(), "no CPU uses an invalid root");
    });
    assert_eq!(vm.counted(Level::L4K), 0);
    vm.host
        .read(|lock| vm.tdp.zap_invalidated_roots(&vm.host, lock));
    vm.tdp.put_root(&vm.host, old);
    assert!(!vm.tdp.is_empty(), "the new root is there");
    vm.destroy();
}

#[test]
fn zap_all_empties_the_roots_and_keeps_them() {
    for levels in [Level::L4K, Level::L2M, Level::L1G] {
        let vm = Vm::new(ept(true), 1);
        for i in 0..5 {
            assert_eq!(vm.map_write(i << 18, levels), Outcome::Fixed);
        }
        vm.host.tlb(0).flush();
        vm.host.write(|lock| vm.tdp.zap_all(&vm.host, lock));
        assert!(vm.leaves(0).is_empty());
        assert_eq!(vm.host.tables_in_use(), 1, "only the root");
        vm.destroy();
    }
}

#[test]
fn five_levels_map_what_four_can_not_reach() {
    let format = npt();
    let vm = Vm::new(format, 1);
    let role = rmmu_engine::mmu::Role {
        level: Level::L256T,
        word: 0x785,
        ..root_role(&format, false)
    };
    vm.load_root(0, role);
    let gfn = (1 << 33) + 5;
    assert_eq!(vm.map(0, vm.fault(gfn, 5, Level::L4K)), Outcome::Fixed);
    assert_eq!(
        vm.host.access(0, Gfn(gfn), false, false),
        Access::Hit(Pfn(5))
    );
    let mut sptes = [Spte::NONPRESENT; 6];
    let walked = vm.tdp.walk(&vm.host, vm.root(0), Gfn(gfn), &mut sptes);
    assert_eq!(walked, Some((Level::L4K, Level::L256T)));
    assert!(sptes[2..].iter().all(|spte| spte.is_present()));
    vm.destroy();
}

#[test]
fn without_memory_there_is_no_root() {
    let vm = Vm::new(npt(), 0);
    vm.host.allocations_left.store(0, Ordering::Relaxed);
    let root = vm.host.read(|lock| {
        let mut cache = Cache(&vm.host);
        vm.tdp
            .find_or_alloc_root(&vm.host, lock, vm.role, &mut cache)
    });
    assert!(root.is_none() && vm.tdp.is_empty());
    vm.destroy();
}

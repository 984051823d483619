// SPDX-License-Identifier: GPL-2.0

//! Aging, dirty log, write tracking, splitting, promotion, NX: one behaviour a
//! test.

mod common;

use common::{
    format::{ept, npt, root_role},
    range,
    tlb::Access,
    Random, Vm,
};
use rmmu_engine::mmu::{
    sync::atomic::Ordering, FastOutcome, Fault, Gfn, GfnRange, Host, Level, Outcome, Pfn,
    SpteFormat,
};

fn all_formats() -> [SpteFormat; 3] {
    [npt(), ept(true), ept(false)]
}

fn write_protect(vm: &Vm, range: GfnRange, min_level: Level) -> bool {
    vm.host.read(|lock| {
        let flush = vm
            .tdp
            .write_protect_slot(&vm.host, lock, false, range, min_level);
        let needed = flush.needed();
        vm.host.spend(flush, lock);
        needed
    })
}

#[test]
fn aging_reports_a_young_page_once_until_it_is_accessed_again() {
    for format in all_formats() {
        let vm = Vm::new(format, 1);
        assert_eq!(vm.map_write(5, Level::L4K), Outcome::Fixed);
        let all = range(0, 512);
        assert!(
            vm.tdp.age(&vm.host, None, all, true),
            "test only: still young"
        );
        assert!(vm.tdp.age(&vm.host, None, all, false));
        assert!(!vm.tdp.age(&vm.host, None, all, false));
        assert!(
            !vm.tdp.age(&vm.host, Some(true), all, false),
            "the other address space"
        );
        vm.host.flush_all();
        if format.ad_enabled {
            assert_eq!(vm.host.access(0, Gfn(5), true, false), Access::Hit(Pfn(5)));
        } else {
            assert!(matches!(
                vm.host.access(0, Gfn(5), true, false),
                Access::Fault { .. }
            ));
            assert_eq!(vm.fast(5, true, false), FastOutcome::Fixed);
        }
        assert_eq!(vm.host.access(0, Gfn(5), true, false), Access::Hit(Pfn(5)));
        assert!(vm.tdp.age(&vm.host, None, range(5, 6), false));
        assert!(!vm.tdp.age(&vm.host, None, range(6, 500), false));
        vm.destroy();
    }
}

#[test]
fn a_fast_read_of_a_tracked_page_does_not_make_it_writable() {
    let vm = Vm::new(ept(false), 1);
    assert_eq!(vm.map_write(5, Level::L4K), Outcome::Fixed);
    assert!(vm.tdp.age(&vm.host, None, range(5, 6), false));
    assert_eq!(vm.fast(5, false, true), FastOutcome::Fixed);
    assert!(vm.slot.dirty.lock().unwrap().is_empty());
    assert_eq!(vm.host.access(0, Gfn(5), false, false), Access::Hit(Pfn(5)));
    assert_eq!(
        vm.host.access(0, Gfn(5), true, false),
        Access::Fault { present: true }
    );
    vm.destroy();
}

#[test]
fn a_write_protected_page_is_fixed_without_the_lock_and_becomes_dirty() {
    for format in all_formats() {
        let vm = Vm::new(format, 1);
        assert_eq!(vm.map_write(5, Level::L4K), Outcome::Fixed);
        vm.host.access(0, Gfn(5), true, false);
        assert!(write_protect(&vm, range(0, 100), Level::L4K));
        assert!(
            !write_protect(&vm, range(0, 100), Level::L4K),
            "no change, no flush"
        );
        assert_eq!(
            vm.host.access(0, Gfn(5), true, false),
            Access::Fault { present: true }
        );
        assert!(vm.slot.dirty.lock().unwrap().is_empty());
        assert_eq!(vm.fast(5, true, true), FastOutcome::Fixed);
        assert!(vm.slot.dirty.lock().unwrap().contains(&5));
        assert_eq!(vm.fast(5, true, true), FastOutcome::Spurious);
        assert_eq!(vm.host.access(0, Gfn(5), true, false), Access::Hit(Pfn(5)));
        assert_eq!(
            vm.fast(6, true, true),
            FastOutcome::Invalid,
            "not mapped at all"
        );
        vm.destroy();
    }
}

#[test]
fn a_huge_page_in_a_logging_slot_is_left_to_the_slow_path() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(0, Level::L2M), Outcome::Fixed);
    assert!(write_protect(&vm, range(0, 512), Level::L2M));
    assert_eq!(vm.fast(3, true, true), FastOutcome::Invalid);
    let fault = vm.fault(3, 3, Level::L4K);
    let small = Fault {
        write: true,
        dirty_track: true,
        ..fault
    };
    assert_eq!(vm.map(0, small), Outcome::Fixed);
    assert_eq!(
        vm.slot
            .dirty
            .lock()
            .unwrap()
            .iter()
            .copied()
            .collect::<Vec<_>>(),
        [3]
    );
    assert_eq!(vm.counted(Level::L4K), 512);
    assert_eq!(
        vm.host.access(0, Gfn(4), true, false),
        Access::Fault { present: true }
    );
    vm.destroy();
}

#[test]
fn write_protection_of_huge_pages_leaves_small_ones() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(0, Level::L2M), Outcome::Fixed);
    assert_eq!(vm.map_write(512, Level::L4K), Outcome::Fixed);
    assert!(write_protect(&vm, range(0, 1024), Level::L2M));
    assert!(!vm.leaf(0).unwrap().1.is_writable());
    assert!(vm.leaf(512).unwrap().1.is_writable());
    vm.destroy();
}

#[test]
fn write_tracking_can_not_be_undone_by_the_fast_path() {
    for format in all_formats() {
        let vm = Vm::new(format, 1);
        assert_eq!(vm.map_write(5, Level::L4K), Outcome::Fixed);
        vm.host.write(|lock| {
            let flush = vm
                .tdp
                .write_protect_gfn(&vm.host, lock, false, Gfn(5), Level::L4K);
            assert!(flush.needed());
            vm.host.spend(flush, lock);
            let again = vm
                .tdp
                .write_protect_gfn(&vm.host, lock, false, Gfn(5), Level::L4K);
            assert!(!again.needed());
        });
        assert_eq!(vm.fast(5, true, false), FastOutcome::Invalid);
        assert_eq!(
            vm.host.access(0, Gfn(5), true, false),
            Access::Fault { present: true }
        );
        vm.destroy();
    }
}

#[test]
fn masked_clearing_touches_exactly_the_frames_of_the_mask() {
    for (format, wrprot) in [
        (npt(), false),
        (npt(), true),
        (ept(true), false),
        (ept(false), false),
    ] {
        let vm = Vm::new(format, 1);
        for gfn in 64..192 {
            assert_eq!(vm.map_write(gfn, Level::L4K), Outcome::Fixed);
        }
        let mask = 0x8000_0000_0f00_0005;
        vm.host.write(|lock| {
            vm.tdp
                .clear_dirty_masked(&vm.host, lock, false, Gfn(64), mask, wrprot);
            vm.tdp
                .clear_dirty_masked(&vm.host, lock, false, Gfn(128), 0, wrprot);
        });
        let by_protection = wrprot || !format.ad_enabled;
        for (gfn, (_, spte)) in vm.leaves(0) {
            let cleared = gfn < 128 && (mask >> (gfn - 64)) & 1 != 0;
            assert_eq!(spte.is_writable(), !(cleared && by_protection), "{gfn}");
            assert_eq!(spte.is_dirty(&format), !cleared || by_protection, "{gfn}");
        }
        vm.destroy();
    }
}

#[test]
fn clearing_a_range_clears_what_the_format_tracks_writes_by() {
    for format in all_formats() {
        let vm = Vm::new(format, 1);
        assert_eq!(vm.map_write(3, Level::L4K), Outcome::Fixed);
        assert_eq!(vm.map_write(512, Level::L2M), Outcome::Fixed);
        vm.host.read(|lock| {
            vm.tdp
                .clear_dirty_range(&vm.host, lock, false, range(0, 1024))
        });
        for (_, (_, spte)) in vm.leaves(0) {
            assert_eq!(spte.is_writable(), format.ad_enabled);
            assert_eq!(spte.is_dirty(&format), !format.ad_enabled);
        }
        vm.destroy();
    }
}

#[test]
fn a_nested_tree_is_tracked_by_protection_when_the_cpu_logs() {
    let format = ept(true);
    let mut vm = Vm::new(format, 1);
    vm.host.pml = true;
    let role = rmmu_engine::mmu::Role {
        guest_mode: true,
        word: 1,
        ..root_role(&format, false)
    };
    vm.load_root(0, role);
    assert_eq!(vm.map_write(3, Level::L4K), Outcome::Fixed);
    vm.host.read(|lock| {
        vm.tdp
            .clear_dirty_range(&vm.host, lock, false, range(0, 1024))
    });
    let (_, spte) = vm.leaf(3).unwrap();
    assert!(!spte.is_writable() && spte.is_dirty(&format));
    vm.destroy();
}

#[test]
fn splitting_keeps_every_translation_and_stops_at_the_target() {
    for format in all_formats() {
        for (target, at_4k, at_2m) in [(Level::L4K, 512, 511), (Level::L2M, 0, 512)] {
            let vm = Vm::new(format, 1);
            assert_eq!(vm.map_write(0, Level::L1G), Outcome::Fixed);
            vm.host.break_every.store(3, Ordering::Relaxed);
            let split = vm.host.read(|lock| {
                vm.tdp
                    .split_huge(&vm.host, lock, false, range(100, 200), target)
            });
            assert_eq!(split, Ok(()));
            let counted = (vm.counted(Level::L4K), vm.counted(Level::L2M));
            assert_eq!(counted, (at_4k, at_2m));
            for gfn in [0, 100, 511, 512, (1 << 18) - 1] {
                assert_eq!(
                    vm.host.access(0, Gfn(gfn), true, false),
                    Access::Hit(Pfn(gfn))
                );
            }
            vm.destroy();
        }
    }
}

#[test]
fn splitting_under_the_write_lock_is_the_same() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(0, Level::L2M), Outcome::Fixed);
    let split = vm.host.write(|lock| {
        vm.tdp
            .split_huge(&vm.host, lock, false, range(0, 512), Level::L4K)
    });
    assert_eq!(split, Ok(()));
    assert_eq!((vm.counted(Level::L4K), vm.counted(Level::L2M)), (512, 0));
    vm.destroy();
}

#[test]
fn splitting_without_memory_fails_and_leaks_nothing() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(0, Level::L1G), Outcome::Fixed);
    for memory in 0..4 {
        vm.host.allocations_left.store(memory, Ordering::Relaxed);
        let split = vm.host.read(|lock| {
            vm.tdp
                .split_huge(&vm.host, lock, false, range(0, 1 << 18), Level::L4K)
        });
        assert!(split.is_err());
        assert_eq!(vm.pfn_of(12345), Some(12345));
    }
    vm.host.allocations_left.store(i64::MAX, Ordering::Relaxed);
    vm.destroy();
}

#[test]
fn promotion_puts_split_pages_together_and_flushes_before_tables_go() {
    for format in all_formats() {
        let vm = Vm::new(format, 2);
        for gfn in [512, 700, 1023, 1024 + 5] {
            assert_eq!(vm.map_write(gfn, Level::L4K), Outcome::Fixed);
            vm.host.access(1, Gfn(gfn), true, false);
        }
        vm.host.read(|lock| {
            let level = |gfn: Gfn| if gfn.0 == 512 { Level::L2M } else { Level::L4K };
            vm.tdp
                .recover_huge(&vm.host, lock, false, range(0, 4096), level);
        });
        assert_eq!(vm.leaf(600).map(|leaf| leaf.0), Some(Level::L2M));
        assert_eq!(vm.leaf(1029).map(|leaf| leaf.0), Some(Level::L4K));
        assert_eq!((vm.counted(Level::L4K), vm.counted(Level::L2M)), (1, 1));
        assert_eq!(
            vm.host.access(1, Gfn(513), true, false),
            Access::Hit(Pfn(513))
        );
        vm.destroy();
    }
}

#[test]
fn promotion_does_not_look_outside_its_range() {
    let vm = Vm::new(npt(), 1);
    assert_eq!(vm.map_write(600, Level::L4K), Outcome::Fixed);
    vm.host.read(|lock| {
        vm.tdp
            .recover_huge(&vm.host, lock, false, range(600, 1024), |gfn| {
                panic!("asked for {gfn:?}, which is not in the slot");
            });
    });
    assert_eq!(vm.counted(Level::L4K), 1);
    vm.destroy();
}

fn exec_fault(vm: &Vm, gfn: u64) -> Outcome {
    let fault = Fault {
        exec: true,
        huge_page_disallowed: true,
        nx_workaround: true,
        req_level: Level::L2M,
        ..vm.fault(gfn, gfn, Level::L4K)
    };
    vm.map(0, fault)
}

fn huge_nx_fault(vm: &Vm, gfn: u64, level: Level) -> Outcome {
    let fault = Fault {
        nx_workaround: true,
        write: true,
        ..vm.fault(gfn, gfn, level)
    };
    vm.map(0, fault)
}

#[test]
fn executing_a_huge_page_splits_it_and_makes_a_recovery_candidate() {
    for format in all_formats() {
        let vm = Vm::new(format, 1);
        vm.host.nx.store(true, Ordering::Relaxed);
        assert_eq!(huge_nx_fault(&vm, 0, Level::L2M), Outcome::Fixed);
        assert!(matches!(
            vm.host.access(0, Gfn(9), false, true),
            Access::Fault { .. }
        ));
        assert_eq!(
            exec_fault(&vm, 9),
            Outcome::Spurious,
            "the split made it executable"
        );
        vm.host.flush_all();
        assert_eq!(vm.host.access(0, Gfn(9), false, true), Access::Hit(Pfn(9)));
        assert_eq!(vm.tdp.nx_candidates(), 1);
        assert_eq!(vm.host.nx_splits.load(Ordering::Relaxed), 1);

        // A later data fault must not bring the huge page back.
        vm.unmap(range(0, 10));
        assert_eq!(huge_nx_fault(&vm, 3, Level::L2M), Outcome::Fixed);
        assert_eq!(vm.leaf(3).map(|leaf| leaf.0), Some(Level::L4K));
        assert_eq!(vm.pfn_of(3), Some(3));

        // Recovery does.
        let zapped = vm
            .host
            .read(|lock| vm.tdp.recover_nx(&vm.host, lock, 10, |_, _| false));
        assert_eq!((zapped, vm.tdp.nx_candidates()), (1, 0));
        assert_eq!(vm.counted(Level::L4K), 0);
        assert_eq!(huge_nx_fault(&vm, 3, Level::L2M), Outcome::Fixed);
        assert_eq!(vm.leaf(3).map(|leaf| leaf.0), Some(Level::L2M));
        vm.destroy();
    }
}

#[test]
fn recovery_keeps_to_its_budget_oldest_first_and_skips_logging_slots() {
    let vm = Vm::new(npt(), 1);
    vm.host.nx.store(true, Ordering::Relaxed);
    for block in 0..6 {
        assert_eq!(exec_fault(&vm, block * 512), Outcome::Fixed);
        vm.host.access(0, Gfn(block * 512), false, true);
    }
    assert_eq!(vm.tdp.nx_candidates(), 6);
    vm.host.break_every.store(2, Ordering::Relaxed);
    let mut asked = Vec::new();
    let zapped = vm.host.read(|lock| {
        vm.tdp.recover_nx(&vm.host, lock, 4, |gfn, smm| {
            asked.push((gfn.0, smm));
            gfn.0 == 512
        })
    });
    assert_eq!(zapped, 3);
    assert_eq!(
        asked,
        [(0, false), (512, false), (1024, false), (1536, false)]
    );
    assert_eq!(vm.tdp.nx_candidates(), 2);
    let left: Vec<u64> = vm.leaves(0).into_keys().collect();
    assert_eq!(left, [512, 2048, 2560]);
    vm.destroy();
}

#[test]
fn a_candidate_that_is_zapped_otherwise_leaves_the_list() {
    let vm = Vm::new(npt(), 1);
    vm.host.nx.store(true, Ordering::Relaxed);
    for block in 0..5 {
        assert_eq!(exec_fault(&vm, block * 512), Outcome::Fixed);
    }
    // A table above them all goes, in the middle of the list of others.
    assert_eq!(exec_fault(&vm, 1 << 18), Outcome::Fixed);
    assert_eq!(vm.tdp.nx_candidates(), 6);
    vm.host.read(|lock| {
        let level = |gfn: Gfn| {
            if gfn.0 == 1024 {
                Level::L2M
            } else {
                Level::L4K
            }
        };
        vm.tdp
            .recover_huge(&vm.host, lock, false, range(0, 1 << 19), level);
    });
    assert_eq!(vm.tdp.nx_candidates(), 5);
    let zapped = vm
        .host
        .read(|lock| vm.tdp.recover_nx(&vm.host, lock, 100, |_, _| false));
    assert_eq!(zapped, 5);
    vm.destroy();
}

#[test]
fn prefetched_pages_are_old_and_never_downgrade_a_mapping() {
    for format in all_formats() {
        let vm = Vm::new(format, 1);
        let prefetch = |gfn| Fault {
            prefetch: true,
            ..vm.fault(gfn, gfn, Level::L4K)
        };
        assert_eq!(vm.map(0, prefetch(7)), Outcome::Fixed);
        assert!(!vm.tdp.age(&vm.host, None, range(7, 8), false));
        assert_eq!(vm.map(0, prefetch(7)), Outcome::Spurious);
        if !format.ad_enabled {
            assert_eq!(vm.fast(7, false, false), FastOutcome::Fixed);
        }
        assert_eq!(vm.host.access(0, Gfn(7), false, false), Access::Hit(Pfn(7)));
        vm.destroy();
    }
}

/// Copies memory by the log while the guest writes, as live migration does. A
/// write is a new number in a frame's cell.
#[test]
fn the_dirty_log_loses_no_write() {
    const FRAMES: u64 = 1024;
    for (format, pml) in [(npt(), false), (ept(true), true), (ept(false), false)] {
        let vm = Vm::new(format, 2);
        let mut random = Random(0x5eed);
        let mut memory = vec![0u64; FRAMES as usize];
        let mut copy = memory.clone();
        // The log begins with everything protected and not dirty.
        for round in 0..200u64 {
            for step in 0..100 {
                let gfn = random.below(FRAMES);
                let vcpu = random.below(2) as usize;
                let mut tries = 0;
                while !matches!(vm.host.access(vcpu, Gfn(gfn), true, false), Access::Hit(_)) {
                    let write = Fault {
                        write: true,
                        dirty_track: true,
                        ..vm.fault(gfn, gfn, Level::L4K)
                    };
                    if vm.fast(gfn, true, true) == FastOutcome::Invalid {
                        vm.map(vcpu, write);
                    }
                    tries += 1;
                    assert!(tries < 5, "the fault on {gfn} is never fixed");
                }
                memory[gfn as usize] = round * 1000 + step;
                for gfn in vm.host.tlb(vcpu).pml.drain(..) {
                    vm.slot.dirty.lock().unwrap().insert(gfn.0);
                }
                if random.once_in(30) {
                    vm.tdp.age(&vm.host, None, range(0, FRAMES), false);
                }
            }
            // Harvest: by words of the bitmap, under the write lock, then flush,
            // then copy.
            let log = std::mem::take(&mut *vm.slot.dirty.lock().unwrap());
            vm.host.write(|lock| {
                for word in 0..FRAMES / 64 {
                    let base = word * 64;
                    let mask = log
                        .range(base..base + 64)
                        .fold(0, |mask, gfn| mask | 1 << (gfn - base));
                    vm.tdp
                        .clear_dirty_masked(&vm.host, lock, false, Gfn(base), mask, !pml);
                }
            });
            vm.host.flush_all();
            for gfn in log {
                copy[gfn as usize] = memory[gfn as usize];
            }
        }
        assert_eq!(copy, memory);
        vm.destroy();
    }
}

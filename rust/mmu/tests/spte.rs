// SPDX-License-Identifier: GPL-2.0

//! The formats of entries: EPT and NPT, with and without hardware's A/D bits.

mod common;

use common::format::{ept, npt, write_back};
use rmmu_engine::mmu::{
    spte::leaf_change_needs_flush, types::*, AdMode, Gfn, Hpa, LeafArgs, Level, Pfn, Spte,
    SpteFormat,
};

fn args(format: &SpteFormat) -> LeafArgs {
    LeafArgs {
        gfn: Gfn(0x1234),
        pfn: Pfn(0x5678),
        level: Level::L4K,
        access: ACC_ALL,
        host_writable: true,
        prefetch: false,
        write_protect: false,
        nx_huge_page: false,
        memtype: write_back(format),
        is_host_mmio: false,
        ad: if format.ad_enabled {
            AdMode::Enabled
        } else {
            AdMode::Disabled
        },
    }
}

fn all_formats() -> [SpteFormat; 3] {
    [npt(), ept(true), ept(false)]
}

#[test]
fn a_writable_npt_leaf_has_exactly_kvms_bits() {
    let f = npt();
    let spte = Spte::leaf(&f, &args(&f)).unwrap();
    // present, writable, user, accessed, dirty, host-writable, MMU-writable, present to the MMU
    assert_eq!(spte.raw(), 0x0567_8000 | 0b1110_0110_0111 | 1 << 11);
}

#[test]
fn a_writable_ept_leaf_has_exactly_kvms_bits() {
    let f = ept(true);
    let spte = Spte::leaf(&f, &args(&f)).unwrap();
    let rwx = 0b111 | 1 << 10;
    let software = 1 << 63 | 1 << 55 | 1 << 53 | 1 << 11;
    assert_eq!(
        spte.raw(),
        0x0567_8000 | rwx | 6 << 3 | 1 << 6 | 1 << 8 | 1 << 9 | software
    );
}

#[test]
fn without_ad_bits_the_leaf_says_so_in_bits_60_and_61() {
    let f = ept(false);
    let spte = Spte::leaf(&f, &args(&f)).unwrap();
    assert_eq!((spte.raw() >> 60) & 3, 1);
    let protect_only = LeafArgs {
        ad: AdMode::WriteProtectOnly,
        ..args(&f)
    };
    let spte = Spte::leaf(&f, &protect_only).unwrap();
    assert_eq!((spte.raw() >> 60) & 3, 2);
}

#[test]
fn a_page_the_host_maps_read_only_is_not_writable_in_any_way() {
    for f in all_formats() {
        let spte = Spte::leaf(
            &f,
            &LeafArgs {
                host_writable: false,
                ..args(&f)
            },
        )
        .unwrap();
        assert!(!spte.is_writable() && !spte.is_mmu_writable(&f) && !spte.is_host_writable(&f));
        assert!(!spte.access_allowed(&f, true, false) && spte.access_allowed(&f, false, false));
    }
}

#[test]
fn a_tracked_page_is_host_writable_but_not_mmu_writable() {
    for f in all_formats() {
        let tracked = LeafArgs {
            write_protect: true,
            ..args(&f)
        };
        let spte = Spte::leaf(&f, &tracked).unwrap();
        assert!(!spte.is_writable() && !spte.is_mmu_writable(&f) && spte.is_host_writable(&f));
        assert!(tracked.loses_write_access());
        assert!(!args(&f).loses_write_access());
    }
}

#[test]
fn huge_leaves_are_not_executable_under_the_nx_mitigation_but_small_ones_are() {
    for f in all_formats() {
        for (level, nx, executable) in [
            (Level::L2M, true, false),
            (Level::L1G, true, false),
            (Level::L4K, true, true),
            (Level::L2M, false, true),
        ] {
            let spte = Spte::leaf(
                &f,
                &LeafArgs {
                    level,
                    nx_huge_page: nx,
                    pfn: Pfn(0),
                    ..args(&f)
                },
            )
            .unwrap();
            assert_eq!(spte.is_executable(&f), executable);
            assert_eq!(spte.access_allowed(&f, false, true), executable);
            assert!(spte.is_leaf(level));
        }
    }
}

#[test]
fn a_frame_with_reserved_address_bits_is_refused() {
    for f in all_formats() {
        let too_high = LeafArgs {
            pfn: Pfn(1 << (47 - 12)),
            ..args(&f)
        };
        let refused = Spte::leaf(&f, &too_high).unwrap_err();
        assert_eq!(refused.bits, 1 << 47);
        let misaligned = LeafArgs {
            pfn: Pfn(0x5600 | 1 << 3),
            level: Level::L2M,
            ..args(&f)
        };
        assert!(Spte::leaf(&f, &misaligned).is_err());
    }
}

#[test]
fn ept_refuses_write_without_read_and_bad_memory_types() {
    let f = ept(true);
    let write_only = LeafArgs {
        access: ACC_WRITE,
        ..args(&f)
    };
    assert!(Spte::leaf(&f, &write_only).is_err());
    let bad_type = LeafArgs {
        memtype: 7 << 3,
        ..args(&f)
    };
    assert!(Spte::leaf(&f, &bad_type).is_err());
}

#[test]
fn encryption_covers_ram_and_tables_but_not_host_mmio() {
    let mut f = npt();
    let c_bit = 1 << 47;
    f.me_value = c_bit;
    f.me_mask = c_bit;
    for row in &mut f.rsvd {
        for mask in row {
            *mask &= !c_bit;
        }
    }
    let ram = Spte::leaf(&f, &args(&f)).unwrap();
    let mmio = Spte::leaf(
        &f,
        &LeafArgs {
            is_host_mmio: true,
            ..args(&f)
        },
    )
    .unwrap();
    assert_ne!(ram.raw() & c_bit, 0);
    assert_eq!(mmio.raw() & c_bit, 0);
    assert_eq!(ram.pfn(&f), Pfn(0x5678));
    let table = Spte::nonleaf(&f, Hpa(0x9000), false);
    assert_ne!(table.raw() & c_bit, 0);
    assert_eq!(table.hpa(&f), Hpa(0x9000));
}

#[test]
fn frozen_and_nonpresent_are_present_to_nobody() {
    for f in all_formats() {
        for spte in [Spte::NONPRESENT, Spte::FROZEN] {
            assert!(!spte.is_present() && !spte.is_mmio(&f));
            assert_eq!(spte.raw() & 0b111, 0, "hardware must not use it");
        }
        assert!(Spte::FROZEN.is_frozen() && !Spte::NONPRESENT.is_frozen());
    }
}

#[test]
fn a_table_entry_allows_everything_and_is_no_leaf() {
    for f in all_formats() {
        let spte = Spte::nonleaf(&f, Hpa(0x1_2345_6000), !f.ad_enabled);
        for level in [Level::L2M, Level::L1G, Level::L512G, Level::L256T] {
            assert!(spte.is_nonleaf(level) && !spte.is_leaf(level));
            assert_eq!(f.reserved(spte.raw(), level), 0);
        }
        assert!(!spte.is_nonleaf(Level::L4K), "nothing is below 4 KiB");
        assert_eq!(spte.hpa(&f), Hpa(0x1_2345_6000));
        assert!(spte.is_writable() && spte.is_executable(&f));
        assert_eq!(spte.is_accessed(&f), f.ad_enabled);
    }
}

#[test]
fn with_ad_bits_an_old_page_only_loses_its_accessed_bit() {
    for f in [npt(), ept(true)] {
        let young = Spte::leaf(&f, &args(&f)).unwrap();
        let old = young.mark_old(&f);
        assert!(young.is_accessed(&f) && !old.is_accessed(&f));
        assert_eq!(old.raw(), young.raw() & !f.accessed);
        assert!(!old.is_access_tracked(&f));
    }
}

#[test]
fn without_ad_bits_an_old_page_is_inaccessible_and_gets_back_all_but_write() {
    let f = ept(false);
    let young = Spte::leaf(&f, &args(&f)).unwrap();
    let old = young.mark_old(&f);
    assert_eq!(old.raw() & f.acc_track, 0);
    assert!(old.is_access_tracked(&f) && old.is_present() && !old.is_accessed(&f));
    assert_eq!(old.mark_old(&f), old, "old stays old");
    assert_eq!(old.pfn(&f), young.pfn(&f));

    let again = old.mark_young(&f);
    assert_eq!(again.raw(), young.without(Spte::WRITABLE_MASK).raw());
    assert!(
        again.is_mmu_writable(&f),
        "the next write is fixed without a lock"
    );
    assert_eq!(again.make_writable(), young);
}

#[test]
fn a_prefetched_page_is_not_young() {
    for f in all_formats() {
        let spte = Spte::leaf(
            &f,
            &LeafArgs {
                prefetch: true,
                ..args(&f)
            },
        )
        .unwrap();
        assert!(!spte.is_accessed(&f));
        assert_eq!(spte.is_access_tracked(&f), !f.ad_enabled);
    }
}

#[test]
fn entries_that_others_may_change_need_an_atomic_update() {
    for f in [npt(), ept(true)] {
        let dirty = Spte::leaf(&f, &args(&f)).unwrap();
        assert!(!dirty.needs_atomic_update(&f), "nothing left to be set");
        assert!(dirty.without(f.dirty).needs_atomic_update(&f));
        assert!(dirty.without(Spte::WRITABLE_MASK).needs_atomic_update(&f));
        let tracked = dirty.without(Spte::WRITABLE_MASK | f.mmu_writable);
        assert!(!tracked.needs_atomic_update(&f), "nobody makes it writable");
    }
    let f = ept(false);
    let spte = Spte::leaf(&f, &args(&f)).unwrap();
    assert!(spte.needs_atomic_update(&f), "aging may hit any time");
}

#[test]
fn only_the_loss_of_mmu_writable_needs_a_flush() {
    for f in all_formats() {
        let spte = Spte::leaf(&f, &args(&f)).unwrap();
        let wp = spte.without(Spte::WRITABLE_MASK);
        assert!(!leaf_change_needs_flush(&f, spte, wp));
        assert!(!leaf_change_needs_flush(&f, spte, spte.mark_old(&f)));
        assert!(leaf_change_needs_flush(&f, wp, wp.without(f.mmu_writable)));
    }
}

#[test]
fn splitting_and_joining_give_back_the_same_leaf() {
    for f in all_formats() {
        for (huge_level, small_level) in [(Level::L2M, Level::L4K), (Level::L1G, Level::L2M)] {
            let huge = Spte::leaf(
                &f,
                &LeafArgs {
                    pfn: Pfn(3 << 18),
                    level: huge_level,
                    ..args(&f)
                },
            )
            .unwrap();
            for index in [0, 1, 511] {
                let small = huge.small_from_huge(&f, small_level, ACC_ALL, index, false);
                let pages = index as u64 * small_level.pages();
                assert_eq!(small.pfn(&f), Pfn((3 << 18) + pages));
                assert_eq!(small.is_large(), small_level != Level::L4K);
                assert_eq!(f.reserved(small.raw(), small_level), 0);
                assert_eq!(small.huge_from_small(&f, huge_level, false), huge);
            }
        }
    }
}

#[test]
fn under_the_nx_mitigation_split_pages_execute_and_joined_ones_do_not() {
    for f in all_formats() {
        let huge = Spte::leaf(
            &f,
            &LeafArgs {
                pfn: Pfn(512),
                level: Level::L2M,
                nx_huge_page: true,
                ..args(&f)
            },
        )
        .unwrap();
        for huge in [huge, huge.mark_old(&f)] {
            let small = huge.small_from_huge(&f, Level::L4K, ACC_ALL, 7, true);
            assert_eq!(small.is_access_tracked(&f), huge.is_access_tracked(&f));
            let accessible = if small.is_access_tracked(&f) {
                small.restore_access(&f)
            } else {
                small
            };
            assert!(accessible.is_executable(&f));
            assert_eq!(small.huge_from_small(&f, Level::L2M, true), huge);
        }
    }
}

#[test]
fn an_mmio_entry_gives_back_frame_access_and_generation() {
    for f in all_formats() {
        let mut gfn = 1;
        while gfn < f.max_gfn.0 {
            for generation in [0, 1, 0x7f, 0x80, 0x2_a55a, 0x3_ffff] {
                let spte = Spte::mmio(&f, Gfn(gfn), ACC_ALL, generation);
                assert!(spte.is_mmio(&f) && !spte.is_present());
                assert_eq!(spte.mmio_gfn(&f), Gfn(gfn));
                assert_eq!(spte.mmio_generation(), generation);
                assert_eq!(
                    spte.mmio_access(&f),
                    u64::from(ACC_ALL) & f.mmio_access_mask
                );
            }
            gfn = gfn * 3 + 1;
        }
        let wrapped = Spte::mmio(&f, Gfn(1), ACC_ALL, 1 << 18 | 5);
        assert_eq!(wrapped.mmio_generation(), 5);
    }
}

#[test]
fn an_mmio_entry_has_the_address_bits_set_that_hide_it_from_l1tf() {
    // A load that goes on with the address of an entry that is not present finds no memory: the highest bits of what
    // is an address to the processor's caches are set, and what they would have held is above them.
    for f in [ept(true), ept(false)] {
        let stolen = f.nonpresent_or_rsvd;
        for gfn in [0, 1, 0x1234, stolen >> 12, f.max_gfn.0] {
            let gpa = gfn << 12;
            let moved = (gpa & stolen) << 5;
            let spte = Spte::mmio(&f, Gfn(gfn), ACC_ALL, 0);
            assert_eq!(spte.raw(), f.mmio_value | gpa & !stolen | stolen | moved);
            assert_eq!(spte.mmio_gfn(&f), Gfn(gfn));
        }
    }
}

#[test]
fn without_mmio_caching_nothing_is_mmio() {
    let mut f = npt();
    f.mmio_caching = false;
    assert!(!Spte::mmio(&f, Gfn(1), ACC_ALL, 0).is_mmio(&f));
}

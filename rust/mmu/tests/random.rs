// SPDX-License-Identifier: GPL-2.0

//! Random operations on the engine and on a model of plain maps, side by side.
//!
//! Two vCPUs, one in each address space, whose hardware caches all it may. After
//! each operation the results are compared, and every now and then everything
//! that is mapped, every counter, and the tables that are reachable.

mod common;

use common::{
    format::{ept, ept_of, npt, npt_of, root_role},
    model::{Backing, Leaf, Request, Space},
    portion, range,
    tlb::Access,
    Random, Vm,
};
use rmmu_engine::mmu::{
    sync::atomic::Ordering, Fault, Flush, Gfn, GfnRange, Host, Level, Spte, SpteFormat, Table,
};
use std::collections::BTreeMap;

const LEVELS: [Level; 3] = [Level::L4K, Level::L2M, Level::L1G];

struct Test {
    vm: Vm,
    spaces: [Space; 2],
    backing: Backing,
    random: Random,
    ad: bool,
}

/// Tables below a table.
fn tables_below(vm: &Vm, table: &Table) -> i64 {
    let mut count = 0;
    for cell in table.entries() {
        let spte = Spte(cell.load(Ordering::Relaxed));
        assert!(
            !spte.is_frozen(),
            "a table that is in use has a frozen entry"
        );
        if spte.is_nonleaf(table.level()) {
            // SAFETY: Only this thread uses the tables.
            let child = unsafe { vm.host.table_of(spte.hpa(vm.host.format())).as_ref() };
            assert_eq!(Some(child.level()), table.level().child());
            count += 1 + tables_below(vm, child);
        }
    }
    count
}

impl Test {
    fn new(format: SpteFormat, seed: u64) -> Test {
        let vm = Vm::new(format, 2);
        vm.load_root(1, root_role(&format, true));
        vm.host.break_every.store(5, Ordering::Relaxed);
        Test {
            vm,
            spaces: Default::default(),
            backing: Backing::default(),
            random: Random(seed),
            ad: format.ad_enabled,
        }
    }

    /// A frame: in eight huge pages at the start, or sparse in the first two GiB.
    fn gfn(&mut self) -> u64 {
        if self.random.once_in(4) {
            self.random.below(1 << 10) * 512 + self.random.below(3)
        } else {
            self.random.below(8) * 512 + self.random.below(24)
        }
    }

    /// Mostly something small; sometimes huge pages, sometimes a lot.
    fn range(&mut self) -> GfnRange {
        let start = self.gfn();
        let pages = match self.random.below(20) {
            0 => 1 << 18,
            1..=3 => 1024,
            4..=8 => 512,
            _ => 1 + self.random.below(40),
        };
        let level = match pages {
            512.. if self.random.once_in(2) => Level::L2M,
            _ => Level::L4K,
        };
        let start = Gfn(start).round_down(level);
        GfnRange::new(start, Gfn((start.0 + pages).min(1 << 19)))
    }

    fn flush(&self, flush: Flush) {
        // Also where nothing is owed: the model knows no stale translations.
        drop(flush);
        self.vm.host.flush_all();
    }

    fn step(&mut self, op: u64) -> &'static str {
        let (as_id, smm) = if self.random.once_in(4) {
            (1, true)
        } else {
            (0, false)
        };
        let range = self.range();
        let host = &self.vm.host;
        let tdp = &self.vm.tdp;
        let space = &mut self.spaces[as_id];
        match op {
            0..=39 => self.fault(as_id),
            40..=54 => self.access(as_id),
            55..=63 => {
                let gfn = self.gfn();
                let write = self.random.once_in(2);
                let log = self.random.once_in(2);
                let root = self.vm.root(as_id);
                let slot = Some(&self.vm.slot);
                let tdp = &self.vm.tdp;
                let got = tdp.fast_fault(
                    &self.vm.host,
                    root,
                    Gfn(gfn),
                    write,
                    false,
                    slot,
                    log,
                    |_, _, _| {},
                );
                let expected = self.spaces[as_id].fast(gfn, write, log, self.ad);
                assert_eq!(got, expected, "fast fault at {gfn:x}");
                "fast fault"
            }
            64..=69 => {
                self.unmap(range);
                "unmap"
            }
            70..=72 => {
                let flush = host.write(|lock| tdp.zap_leafs(host, lock, range, Flush::none()));
                // What it yielded for it flushed; what is left says it itself.
                host.write(|lock| host.spend(flush, lock));
                for space in &mut self.spaces {
                    space.zap(range);
                }
                "zap"
            }
            73..=77 => {
                let min_level = LEVELS[self.random.below(2) as usize];
                let flush =
                    host.read(|lock| tdp.write_protect_slot(host, lock, smm, range, min_level));
                let expected = space.protect(range, min_level, false);
                assert_eq!(flush.needed(), expected, "write protection of {range:x?}");
                self.flush(flush);
                "write protect"
            }
            78..=79 => {
                self.track(as_id, smm);
                "track"
            }
            80..=82 => {
                host.read(|lock| tdp.clear_dirty_range(host, lock, smm, range));
                space.clear_dirty(range, Level::L1G, !self.ad);
                self.flush(Flush::pending());
                "clear dirty"
            }
            83..=86 => {
                self.clear_masked(as_id, smm);
                "clear dirty by mask"
            }
            87..=90 => {
                let test_only = self.random.once_in(3);
                let got = tdp.age(host, Some(smm), range, test_only);
                assert_eq!(got, space.age(range, test_only, self.ad));
                self.flush(Flush::pending());
                "age"
            }
            91..=94 => {
                let target = LEVELS[self.random.below(2) as usize];
                let split = if self.random.once_in(2) {
                    host.read(|lock| tdp.split_huge(host, lock, smm, range, target))
                } else {
                    host.write(|lock| tdp.split_huge(host, lock, smm, range, target))
                };
                assert_eq!(split, Ok(()));
                space.split(range, target);
                "split"
            }
            95..=98 => {
                self.recover(as_id, smm, range);
                "promote"
            }
            _ => {
                self.invalidate();
                "invalidate"
            }
        }
    }

    fn fault(&mut self, as_id: usize) -> &'static str {
        let gfn = self.gfn();
        let allowed = self.backing.level(gfn);
        let level = LEVELS[self.random.below(3) as usize].min(allowed);
        let host_writable = self.backing.writable(gfn);
        let prefetch = self.random.once_in(8);
        let request = Request {
            gfn,
            level,
            pfn: self.backing.pfn(gfn),
            write: host_writable && !prefetch && self.random.once_in(2),
            prefetch,
            host_writable,
            tracked: self.backing.tracked.contains(&gfn),
        };
        let fault = Fault {
            write: request.write,
            prefetch,
            map_writable: host_writable,
            write_tracked: request.tracked,
            ..self.vm.fault(gfn, request.pfn, level)
        };
        let got = self.vm.map(as_id, fault);
        let expected = self.spaces[as_id].map(request, self.ad);
        assert_eq!(got, expected, "{request:x?}");
        "fault"
    }

    fn access(&mut self, as_id: usize) -> &'static str {
        let gfn = self.gfn();
        let write = self.random.once_in(2);
        let got = match self.vm.host.access(as_id, Gfn(gfn), write, false) {
            Access::Hit(pfn) => Some(pfn.0),
            _ => None,
        };
        let expected = self.spaces[as_id].access(gfn, write, self.ad);
        assert_eq!(got, expected, "access to {gfn:x}, write: {write}");
        "access"
    }

    /// The host takes memory away, and uses it for something else at once.
    fn unmap(&mut self, range: GfnRange) {
        let may_yield = self.random.once_in(2);
        let owed = Flush::when(self.random.once_in(10));
        let host = &self.vm.host;
        host.write(|lock| {
            let tdp = &self.vm.tdp;
            let flush = tdp.unmap_range(host, lock, None, range, may_yield, owed);
            host.spend(flush, lock);
        });
        for (as_id, space) in self.spaces.iter_mut().enumerate() {
            space.zap(range);
            for cached in host.tlb(as_id).all() {
                let stale = GfnRange::of(cached.gfn, cached.level).intersect(range);
                assert!(stale.is_empty(), "a TLB still uses {cached:x?}");
            }
        }
        self.backing.replace(range);
    }

    fn track(&mut self, as_id: usize, smm: bool) {
        let gfn = self.random.below(8) * 512 + self.random.below(24);
        if !self.backing.tracked.insert(gfn) {
            self.backing.tracked.remove(&gfn);
            return;
        }
        let host = &self.vm.host;
        host.write(|lock| {
            let tdp = &self.vm.tdp;
            let flush = tdp.write_protect_gfn(host, lock, smm, Gfn(gfn), Level::L4K);
            let expected = self.spaces[as_id].protect(range(gfn, gfn + 1), Level::L4K, true);
            assert_eq!(flush.needed(), expected);
            host.spend(flush, lock);
        });
        assert!(host
            .tlb(as_id)
            .cached(Gfn(gfn))
            .is_none_or(|cached| !cached.spte.is_writable()));
    }

    fn clear_masked(&mut self, as_id: usize, smm: bool) {
        let base = self.random.below(8) * 512;
        let mask = self.random.below(1 << 31) << self.random.below(33);
        let wrprot = self.random.once_in(2);
        let host = &self.vm.host;
        host.write(|lock| {
            let tdp = &self.vm.tdp;
            tdp.clear_dirty_masked(host, lock, smm, Gfn(base), mask, wrprot);
        });
        for bit in (0..64).filter(|bit| (mask >> bit) & 1 != 0) {
            let one = range(base + bit, base + bit + 1);
            self.spaces[as_id].clear_dirty(one, Level::L4K, wrprot || !self.ad);
        }
        self.flush(Flush::pending());
    }

    fn recover(&mut self, as_id: usize, smm: bool, range: GfnRange) {
        let host = &self.vm.host;
        let backing = &self.backing;
        let allowed = |gfn: Gfn| {
            let mut level = backing.level(gfn.0);
            while !within(range, GfnRange::of(gfn, level)) {
                level = level.child().unwrap();
            }
            level
        };
        host.read(|lock| self.vm.tdp.recover_huge(host, lock, smm, range, allowed));
        for level in [Level::L1G, Level::L2M] {
            let mut gfn = range.start.0.next_multiple_of(level.pages());
            while gfn < range.end.0 {
                if allowed(Gfn(gfn)) >= level {
                    self.spaces[as_id].join(gfn, level);
                }
                gfn += level.pages();
            }
        }
        self.flush(Flush::none());
    }

    fn invalidate(&mut self) {
        let old = self.vm.root(0);
        let keep = self.random.once_in(2) && self.vm.tdp.get_root(old);
        self.vm.invalidate();
        let format = *self.vm.host.format();
        for (as_id, space) in self.spaces.iter_mut().enumerate() {
            space.leaves.clear();
            self.vm.load_root(as_id, root_role(&format, as_id == 1));
        }
        let (host, tdp) = (&self.vm.host, &self.vm.tdp);
        if self.random.once_in(2) {
            host.read(|lock| tdp.zap_invalidated_roots(host, lock));
        } else {
            host.write(|lock| tdp.zap_invalidated_roots(host, lock));
        }
        if keep {
            host.read(|_| tdp.put_root(host, old));
        }
    }

    fn compare(&self) {
        let format = self.vm.host.format();
        let mut tables = 0;
        let mut counted = [0; 5];
        for (as_id, space) in self.spaces.iter().enumerate() {
            let leaves: BTreeMap<u64, Leaf> = self
                .vm
                .leaves(as_id)
                .into_iter()
                .map(|(gfn, (level, spte))| (gfn, Leaf::of(format, level, spte)))
                .collect();
            for leaf in leaves.values() {
                counted[leaf.level.slot()] += 1;
            }
            if leaves != space.leaves {
                let wrong = leaves
                    .keys()
                    .chain(space.leaves.keys())
                    .find(|gfn| leaves.get(gfn) != space.leaves.get(gfn))
                    .unwrap();
                panic!(
                    "at {wrong:x} in {as_id}: is {:x?}, should be {:x?}",
                    leaves.get(wrong),
                    space.leaves.get(wrong)
                );
            }
            // SAFETY: The vCPU holds a reference.
            tables += tables_below(&self.vm, unsafe { self.vm.root(as_id).as_ref() });
        }
        let host = &self.vm.host;
        let accounted: Vec<i64> = LEVELS.iter().map(|level| self.vm.counted(*level)).collect();
        assert_eq!(accounted, counted[..3], "leaves accounted by level");
        assert_eq!(host.tables.load(Ordering::Relaxed), tables);
        assert_eq!(host.tables_in_use(), tables as u64 + 2);
        assert_eq!(host.bugs(), Vec::<&str>::new());
    }
}

fn within(outer: GfnRange, inner: GfnRange) -> bool {
    outer.intersect(inner) == inner
}

fn run(format: SpteFormat, seed: u64, operations: u64) {
    run_test(Test::new(format, seed), seed, operations);
}

fn run_test(mut test: Test, seed: u64, operations: u64) {
    let operations = portion(operations);
    let mut done: BTreeMap<&str, u64> = BTreeMap::new();
    for i in 0..operations {
        let kind = test.random.below(1000);
        // Invalidation leaves little to look at, so it is rare.
        let op = if kind == 0 { 99 } else { kind % 99 };
        *done.entry(test.step(op)).or_default() += 1;
        if i < 200 || i % 256 == 0 {
            test.vm.assert_audit();
        }
        if i % 64 == 0 || op >= 91 {
            test.compare();
        }
    }
    test.compare();
    println!("seed {seed:x}: {done:?}");
    assert_eq!(done.len(), 13, "every kind of operation was done: {done:?}");
    assert!(test.vm.host.yields.load(Ordering::Relaxed) > operations / 20);
    test.vm.destroy();
}

#[test]
fn npt_does_what_the_model_does() {
    run(npt(), 0x1234_5678_9abc, 100_000);
}

#[test]
fn ept_does_what_the_model_does() {
    run(ept(true), 0xfeed_beef, 100_000);
}

#[test]
fn ept_without_ad_bits_does_what_the_model_does() {
    run(ept(false), 0xc0ff_ee00, 100_000);
}

#[test]
fn npt_with_52_bits_of_an_address_does_what_the_model_does() {
    run(npt_of(52), 0x5252_5252, 10_000);
}

#[test]
fn ept_with_48_bits_of_an_address_and_a_log_does_what_the_model_does() {
    let seed = 0x4848_4848;
    let mut test = Test::new(ept_of(48, true), seed);
    test.vm.host.pml = true;
    run_test(test, seed, 10_000);
}

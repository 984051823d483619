// SPDX-License-Identifier: GPL-2.0

//! Everything at once, on threads: vCPUs that fault and run, a notifier that takes
//! their memory, a log that protects and splits and promotes, aging, recovery of
//! NX pages, invalidation of roots.
//!
//! What must hold: no vCPU reaches memory that was taken away, hardware never walks
//! a freed table, and in the end nothing is left. Every thread does a fixed amount of
//! work and goes on until all have; nothing depends on time.

mod common;

use common::{
    format::{ept, npt},
    host::Cache,
    model::Backing,
    range,
    tlb::Access,
    Random, Vm,
};
use rmmu_engine::mmu::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    Around, FastOutcome, Fault, Flush, Gfn, GfnRange, Host, Level, Neighbour, Outcome, Pfn,
    SpteFormat,
};
use std::{sync::Mutex, thread};

const FRAMES: u64 = 4 * 512;
const VCPUS: usize = 3;
/// How much each thread does at least; all go on until all are there.
const ACCESSES: u64 = 100_000;
const OTHER_WORK: u64 = 1_500;

struct Shared {
    vm: Vm,
    backing: Mutex<Backing>,
    /// Counts notifications; odd while one is going on.
    sequence: AtomicU64,
    /// One notification at a time.
    notifying: Mutex<()>,
    /// Threads that have not done their share yet.
    threads_left: AtomicU64,
    faults: AtomicU64,
    fast: AtomicU64,
    ahead: AtomicU64,
    nx: bool,
}

/// The host's memory around a frame, without what is huge or for reading only.
struct Window<'s> {
    shared: &'s Shared,
    range: GfnRange,
}

impl Around for Window<'_> {
    fn range(&self) -> GfnRange {
        self.range
    }

    fn page(&self, gfn: Gfn) -> Option<Neighbour> {
        let backing = self.shared.backing.lock().unwrap();
        (backing.level(gfn.0) == Level::L4K).then(|| Neighbour {
            pfn: Pfn(backing.pfn(gfn.0)),
            writable: !gfn.0.is_multiple_of(5),
        })
    }

    fn mapped(&mut self, pages: u64) {
        self.shared.ahead.fetch_add(pages, Ordering::Relaxed);
    }
}

impl Shared {
    /// Works until all threads have done their share, or one failed.
    fn work(&self, share: u64, failed: &AtomicBool, mut one: impl FnMut()) {
        let mut done = 0;
        while self.threads_left.load(Ordering::Acquire) != 0 && !failed.load(Ordering::Acquire) {
            one();
            done += 1;
            if done == share {
                self.threads_left.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// One access of the guest, with all the faults it takes.
    fn guest_access(&self, vcpu: usize, random: &mut Random) {
        let gfn = random.below(FRAMES);
        let (write, exec) = match random.below(if self.nx { 6 } else { 2 }) {
            0 => (false, true),
            odd if odd % 2 == 1 => (true, false),
            _ => (false, false),
        };
        loop {
            if self.vm.host.tlb(vcpu).obsolete {
                self.vm.load_root(vcpu, self.vm.role);
                continue;
            }
            let access = {
                // The guest's use of a page and the flush that takes it away can
                // not overlap: a flush waits for the guest to leave.
                let mut tlb = self.vm.host.tlb(vcpu);
                if tlb.obsolete {
                    continue;
                }
                let access = tlb.access(&self.vm.host, Gfn(gfn), write, exec);
                if let Access::Hit(pfn) = access {
                    self.check(gfn, pfn);
                }
                access
            };
            match access {
                Access::Hit(_) => return,
                Access::Fault { .. } => self.fault(vcpu, gfn, write, exec),
                Access::Mmio => panic!("nothing here is MMIO"),
            }
        }
    }

    /// The frame is the one the host has there, now or until the notification that
    /// is going on has flushed.
    fn check(&self, gfn: u64, pfn: Pfn) {
        assert_eq!(
            pfn.0,
            self.backing.lock().unwrap().pfn(gfn),
            "the guest reached memory that was taken away"
        );
    }

    fn fault(&self, vcpu: usize, gfn: u64, write: bool, exec: bool) {
        let (host, tdp) = (&self.vm.host, &self.vm.tdp);
        let root = self.vm.root(vcpu);
        let slot = Some(&self.vm.slot);
        if tdp.fast_fault(host, root, Gfn(gfn), write, exec, slot, false, |_, _, _| {})
            != FastOutcome::Invalid
        {
            self.fast.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let sequence = self.sequence.load(Ordering::Acquire);
        if sequence % 2 == 1 {
            thread::yield_now();
            return;
        }
        let (pfn, level) = {
            let backing = self.backing.lock().unwrap();
            (backing.pfn(gfn), backing.level(gfn).min(Level::L2M))
        };
        let disallowed = exec && self.nx;
        let goal = if disallowed { Level::L4K } else { level };
        let mut fault = Fault {
            write,
            exec,
            huge_page_disallowed: disallowed,
            nx_workaround: self.nx,
            req_level: level,
            ..self.vm.fault(gfn, pfn, goal)
        };
        let outcome = host.read(|lock| {
            if self.sequence.load(Ordering::Acquire) != sequence {
                return Outcome::Retry;
            }
            let mut cache = Cache(host);
            // No notification can begin now, so the window is as true as the page.
            let window = 16 >> (gfn % 3);
            let start = gfn & !(window - 1);
            let mut around = Window {
                shared: self,
                range: range(start, start + window),
            };
            tdp.map_around(host, lock, root, &mut fault, &mut cache, &mut around)
        });
        assert!(
            matches!(outcome, Outcome::Fixed | Outcome::Spurious | Outcome::Retry),
            "{outcome:?}"
        );
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// A range; huge pages as a whole half of the time, so that there are some.
    fn range(random: &mut Random) -> GfnRange {
        let start = random.below(FRAMES);
        if random.once_in(2) {
            GfnRange::of(Gfn(start), Level::L2M)
        } else {
            range(start, (start + 1 + random.below(64)).min(FRAMES))
        }
    }

    fn notifier(&self, random: &mut Random) {
        let range = Shared::range(random);
        let may_yield = random.once_in(2);
        let host = &self.vm.host;
        let _one = self.notifying.lock().unwrap();
        host.write(|_| self.sequence.fetch_add(1, Ordering::AcqRel));
        host.write(|lock| {
            let tdp = &self.vm.tdp;
            let flush = tdp.unmap_range(host, lock, None, range, may_yield, Flush::none());
            host.spend(flush, lock);
        });
        // From here on the memory belongs to somebody else.
        self.backing.lock().unwrap().replace(range);
        host.write(|_| self.sequence.fetch_add(1, Ordering::AcqRel));
    }

    fn log(&self, random: &mut Random) {
        let range = Shared::range(random);
        let (host, tdp) = (&self.vm.host, &self.vm.tdp);
        match random.below(5) {
            0 => host.read(|lock| {
                let flush = tdp.write_protect_slot(host, lock, false, range, Level::L4K);
                host.spend(flush, lock);
            }),
            1 => host.read(|lock| tdp.clear_dirty_range(host, lock, false, range)),
            2 => {
                let base = range.start.0 & !63;
                let mask = random.below(1 << 31) << random.below(33);
                host.write(|lock| {
                    tdp.clear_dirty_masked(host, lock, false, Gfn(base), mask, true);
                });
            }
            3 => {
                let split = host.read(|lock| tdp.split_huge(host, lock, false, range, Level::L4K));
                assert_eq!(split, Ok(()));
            }
            _ => {
                // Promotion asks the host for the size of its pages under the read
                // lock, where no notification can be going on unnoticed.
                host.read(|lock| {
                    let sequence = self.sequence.load(Ordering::Acquire);
                    tdp.recover_huge(host, lock, false, range, |gfn| {
                        if sequence % 2 == 1 || self.sequence.load(Ordering::Acquire) != sequence {
                            return Level::L4K;
                        }
                        self.backing.lock().unwrap().level(gfn.0).min(Level::L2M)
                    });
                });
            }
        }
    }

    fn background(&self, random: &mut Random) {
        let (host, tdp) = (&self.vm.host, &self.vm.tdp);
        match random.below(40) {
            0 => {
                self.vm.invalidate();
                if random.once_in(2) {
                    host.read(|lock| tdp.zap_invalidated_roots(host, lock));
                } else {
                    host.write(|lock| tdp.zap_invalidated_roots(host, lock));
                }
            }
            1..=4 => {
                host.read(|lock| tdp.recover_nx(host, lock, 3, |gfn, _| gfn.0 == 512));
            }
            5..=8 => host.read(|lock| {
                tdp.visit_roots(host, lock, |root, _, _| {
                    tdp.visit_leaves(host, root, Gfn(0), 300, |gfn, level, spte| {
                        assert!(spte.is_leaf(level), "{gfn:?} {level:?} {spte:x?}");
                    });
                });
            }),
            _ => {
                tdp.age(host, None, Shared::range(random), random.once_in(4));
            }
        }
    }
}

fn stress(format: SpteFormat, nx: bool, seed: u64) {
    let vm = Vm::new(format, VCPUS);
    vm.host.nx.store(nx, Ordering::Relaxed);
    vm.host.break_every.store(50, Ordering::Relaxed);
    let shared = Shared {
        vm,
        backing: Mutex::default(),
        sequence: AtomicU64::new(0),
        notifying: Mutex::default(),
        threads_left: AtomicU64::new(VCPUS as u64 + 3),
        faults: AtomicU64::new(0),
        fast: AtomicU64::new(0),
        ahead: AtomicU64::new(0),
        nx,
    };
    let failed = AtomicBool::new(false);
    /// Lets the other threads end when one fails.
    struct Alarm<'a>(&'a AtomicBool);
    impl Drop for Alarm<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.store(true, Ordering::Release);
            }
        }
    }
    thread::scope(|scope| {
        let (shared, failed) = (&shared, &failed);
        for vcpu in 0..VCPUS {
            scope.spawn(move || {
                let _alarm = Alarm(failed);
                let mut random = Random(seed + vcpu as u64);
                shared.work(ACCESSES, failed, || {
                    shared.guest_access(vcpu, &mut random);
                });
            });
        }
        let others: [fn(&Shared, &mut Random); 3] =
            [Shared::notifier, Shared::log, Shared::background];
        for (i, work) in others.into_iter().enumerate() {
            scope.spawn(move || {
                let _alarm = Alarm(failed);
                let mut random = Random(seed ^ (i as u64 + 77));
                shared.work(OTHER_WORK, failed, || work(shared, &mut random));
            });
        }
    });
    println!(
        "{} slow faults, {} fast, {} yields",
        shared.faults.load(Ordering::Relaxed),
        shared.fast.load(Ordering::Relaxed),
        shared.vm.host.yields.load(Ordering::Relaxed)
    );
    assert!(shared.faults.load(Ordering::Relaxed) > 0);
    let ahead = shared.ahead.load(Ordering::Relaxed) as i64;
    assert_eq!(ahead > 0, format.ad_enabled, "{ahead} pages mapped ahead");
    // Every page that was mapped ahead is counted once, as used or as unused.
    let counted = shared.vm.destroy_and(|host| host.ahead());
    assert_eq!(counted.0 + counted.1, ahead, "{counted:?}");
}

#[test]
fn nothing_stale_is_reached_with_npt() {
    stress(npt(), false, 0xabc1);
}

#[test]
fn nothing_stale_is_reached_with_ept_and_the_nx_mitigation() {
    stress(ept(true), true, 0xabc2);
}

#[test]
fn nothing_stale_is_reached_without_ad_bits() {
    stress(ept(false), true, 0xabc3);
}

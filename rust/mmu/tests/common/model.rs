// SPDX-License-Identifier: GPL-2.0

//! What the engine should be doing, on plain maps.
//!
//! A [`Space`] is an address space: a map from frames to leaves. [`Backing`] is the
//! host's memory behind it: which frame backs which, and how large the pages are.

use rmmu_engine::mmu::{FastOutcome, GfnRange, Level, Outcome, Spte, SpteFormat};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A mapping, in the model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    pub level: Level,
    pub pfn: u64,
    pub host_writable: bool,
    pub mmu_writable: bool,
    pub writable: bool,
    pub young: bool,
    pub dirty: bool,
}

impl Leaf {
    /// The leaf that an entry is.
    pub fn of(format: &SpteFormat, level: Level, spte: Spte) -> Leaf {
        assert_eq!(
            spte.is_access_tracked(format),
            !format.ad_enabled && !spte.is_accessed(format),
            "an old page is inaccessible exactly without A/D bits: {spte:x?}"
        );
        Leaf {
            level,
            pfn: spte.pfn(format).0,
            host_writable: spte.is_host_writable(format),
            mmu_writable: spte.is_mmu_writable(format),
            writable: spte.is_writable(),
            young: spte.is_accessed(format),
            dirty: spte.is_dirty(format),
        }
    }
}

/// A fault, for the model.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub gfn: u64,
    pub level: Level,
    pub pfn: u64,
    pub write: bool,
    pub prefetch: bool,
    pub host_writable: bool,
    pub tracked: bool,
}

/// An address space.
#[derive(Default)]
pub struct Space {
    pub leaves: BTreeMap<u64, Leaf>,
}

impl Space {
    /// The leaf that maps a frame, and where it begins.
    pub fn find(&self, gfn: u64) -> Option<(u64, Leaf)> {
        let (&start, &leaf) = self.leaves.range(..=gfn).next_back()?;
        (gfn < start + leaf.level.pages()).then_some((start, leaf))
    }

    /// Where the leaves begin that overlap the range.
    fn overlapping(&self, range: GfnRange) -> Vec<u64> {
        let first = self.find(range.start.0).map_or(range.start.0, |at| at.0);
        let end = range.end.0.max(first);
        self.leaves.range(first..end).map(|at| *at.0).collect()
    }

    pub fn zap(&mut self, range: GfnRange) {
        for start in self.overlapping(range) {
            self.leaves.remove(&start);
        }
    }

    fn change(&mut self, range: GfnRange, mut f: impl FnMut(&mut Leaf)) {
        for start in self.overlapping(range) {
            f(self.leaves.get_mut(&start).unwrap());
        }
    }

    /// Takes the writable bit, with `tracked` for good.
    pub fn protect(&mut self, range: GfnRange, min_level: Level, tracked: bool) -> bool {
        let mut changed = false;
        self.change(range, |leaf| {
            if leaf.level >= min_level {
                changed |= leaf.writable | (tracked & leaf.mmu_writable);
                leaf.writable = false;
                leaf.mmu_writable &= !tracked;
            }
        });
        changed
    }

    pub fn clear_dirty(&mut self, range: GfnRange, max_level: Level, by_protection: bool) {
        self.change(range, |leaf| {
            if leaf.level > max_level {
            } else if by_protection {
                leaf.writable = false;
            } else {
                leaf.dirty = false;
            }
        });
    }

    pub fn age(&mut self, range: GfnRange, test_only: bool, ad_enabled: bool) -> bool {
        let mut young = false;
        self.change(range, |leaf| {
            if !leaf.young {
                return;
            }
            young = true;
            if !test_only {
                leaf.young = false;
                leaf.writable &= ad_enabled;
            }
        });
        young
    }

    pub fn split(&mut self, range: GfnRange, target: Level) {
        for start in self.overlapping(range) {
            let leaf = self.leaves[&start];
            if leaf.level <= target {
                continue;
            }
            let level = leaf.level.child().unwrap();
            self.leaves.remove(&start);
            for i in 0..512 {
                let offset = i * level.pages();
                let pfn = leaf.pfn + offset;
                self.leaves
                    .insert(start + offset, Leaf { level, pfn, ..leaf });
            }
            self.split(range, target);
        }
    }

    /// Puts the leaves of a block together if there are any and all are smaller.
    pub fn join(&mut self, start: u64, level: Level) {
        let block = GfnRange::new(
            rmmu_engine::mmu::Gfn(start),
            rmmu_engine::mmu::Gfn(start + level.pages()),
        );
        let inside = self.overlapping(block);
        let Some(first) = inside.first().map(|first| self.leaves[first]) else {
            return;
        };
        if first.level >= level {
            return;
        }
        self.zap(block);
        let pfn = first.pfn & !level.gfn_mask();
        self.leaves.insert(
            start,
            Leaf {
                level,
                pfn,
                ..first
            },
        );
    }

    pub fn map(&mut self, request: Request, ad_enabled: bool) -> Outcome {
        let level = request.level;
        let start = request.gfn & !level.gfn_mask();
        let one = GfnRange::of(rmmu_engine::mmu::Gfn(request.gfn), Level::L4K);
        self.split(one, level);
        let old = self
            .find(request.gfn)
            .map(|at| at.1)
            .filter(|leaf| leaf.level == level);
        if let Some(old) = old {
            let allowed = if request.write {
                old.writable
            } else {
                old.young || ad_enabled
            };
            if request.prefetch || allowed {
                return Outcome::Spurious;
            }
        }
        let writable = request.host_writable && !request.tracked;
        let new = Leaf {
            level,
            pfn: request.pfn & !level.gfn_mask(),
            host_writable: request.host_writable,
            mmu_writable: writable,
            writable: writable && (ad_enabled || !request.prefetch),
            young: !request.prefetch,
            dirty: writable,
        };
        self.zap(GfnRange::of(rmmu_engine::mmu::Gfn(start), level));
        self.leaves.insert(start, new);
        if request.tracked && request.write && request.host_writable {
            Outcome::WriteProtected
        } else if old == Some(new) {
            Outcome::Spurious
        } else {
            Outcome::Fixed
        }
    }

    pub fn fast(&mut self, gfn: u64, write: bool, log: bool, ad_enabled: bool) -> FastOutcome {
        let Some((start, leaf)) = self.find(gfn) else {
            return FastOutcome::Invalid;
        };
        let accessible = ad_enabled || leaf.young;
        if if write { leaf.writable } else { accessible } {
            return FastOutcome::Spurious;
        }
        let mut new = leaf;
        new.young |= !accessible;
        if write {
            if !leaf.mmu_writable || log && leaf.level > Level::L4K {
                return FastOutcome::Invalid;
            }
            new.writable = true;
        }
        self.leaves.insert(start, new);
        FastOutcome::Fixed
    }

    /// What the guest's access comes to: the frame, or a fault.
    pub fn access(&mut self, gfn: u64, write: bool, ad_enabled: bool) -> Option<u64> {
        let (start, mut leaf) = self.find(gfn)?;
        let accessible = ad_enabled || leaf.young;
        if !accessible || write && !leaf.writable {
            return None;
        }
        if ad_enabled {
            leaf.young = true;
            leaf.dirty |= write;
            self.leaves.insert(start, leaf);
        }
        Some(leaf.pfn + (gfn - start))
    }
}

/// The host's memory.
#[derive(Default)]
pub struct Backing {
    blocks: HashMap<u64, u64>,
    pages: BTreeMap<u64, u64>,
    /// Frames that are write-tracked.
    pub tracked: BTreeSet<u64>,
    last: u64,
}

const STRIDE: u64 = 1 << 19;
const VERSIONS: u64 = 1 << 14;

impl Backing {
    fn version(&self, gfn: u64) -> u64 {
        let block = self.blocks.get(&(gfn / 512)).copied().unwrap_or(0);
        self.pages.get(&gfn).copied().unwrap_or(block)
    }

    /// The frame behind a frame.
    pub fn pfn(&self, gfn: u64) -> u64 {
        gfn + self.version(gfn) * STRIDE
    }

    /// The host maps this frame writable.
    pub fn writable(&self, gfn: u64) -> bool {
        self.version(gfn) % 5 != 3
    }

    /// Everything in the range is backed by other frames from now on.
    pub fn replace(&mut self, range: GfnRange) {
        self.last = (self.last + 1) % VERSIONS;
        let (mut gfn, end) = (range.start.0, range.end.0);
        while gfn < end {
            if gfn % 512 == 0 && end - gfn >= 512 {
                self.blocks.insert(gfn / 512, self.last);
                let inside: Vec<u64> = self.pages.range(gfn..gfn + 512).map(|at| *at.0).collect();
                for page in inside {
                    self.pages.remove(&page);
                }
                gfn += 512;
            } else {
                self.pages.insert(gfn, self.last);
                gfn += 1;
            }
        }
    }

    /// The largest level at which the host can map what is around a frame.
    pub fn level(&self, gfn: u64) -> Level {
        let mut best = Level::L4K;
        for level in [Level::L2M, Level::L1G] {
            let start = gfn & !level.gfn_mask();
            let block = start..start + level.pages();
            let version = self.blocks.get(&(start / 512)).copied().unwrap_or(0);
            let same = (start / 512..block.end / 512)
                .all(|block| self.blocks.get(&block).copied().unwrap_or(0) == version);
            if !same
                || self.pages.range(block.clone()).next().is_some()
                || self.tracked.range(block).next().is_some()
            {
                break;
            }
            best = level;
        }
        best
    }
}

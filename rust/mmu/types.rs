// SPDX-License-Identifier: GPL-2.0

//! Frame numbers, levels and ranges: the engine's units.
//!
//! A [`Level`] is always one of the five that exist, so that a shift by it never
//! overflows. Arithmetic on frame numbers, which the guest can choose, wraps.

/// Size of a page as a shift.
pub const PAGE_SHIFT: u32 = 12;
/// How many bits of a frame number are the index into a table of a level. With
/// loom, which tries all that can happen, tables are small.
pub const INDEX_BITS: u32 = if cfg!(feature = "loom") { 1 } else { 9 };
/// How many entries a table has.
pub const ENTRIES: usize = 1 << INDEX_BITS;
/// The access bits of a role: read.
pub const ACC_READ: u8 = 1;
/// The access bits of a role: write.
pub const ACC_WRITE: u8 = 2;
/// The access bits of a role: user mode (with EPT: execute in user mode).
pub const ACC_USER: u8 = 4;
/// The access bits of a role: execute.
pub const ACC_EXEC: u8 = 8;
/// All access bits.
pub const ACC_ALL: u8 = ACC_READ | ACC_WRITE | ACC_USER | ACC_EXEC;

/// A guest frame number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Gfn(pub u64);

/// A host frame number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Pfn(pub u64);

/// A host physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Hpa(pub u64);

impl Gfn {
    /// The guest physical address of the frame.
    #[inline]
    pub const fn to_gpa(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The first frame of the entry of `level` that covers this frame.
    #[inline]
    pub const fn round_down(self, level: Level) -> Gfn {
        Gfn(self.0 & !level.gfn_mask())
    }

    /// The index of this frame's entry in a table of `level`.
    #[inline]
    pub const fn index(self, level: Level) -> usize {
        (self.0 >> level.gfn_shift()) as usize & (ENTRIES - 1)
    }

    /// The frame `pages` further on.
    #[inline]
    #[allow(clippy::should_implement_trait)]
    pub const fn add(self, pages: u64) -> Gfn {
        Gfn(self.0.wrapping_add(pages))
    }
}

impl Pfn {
    /// The address of the frame.
    #[inline]
    pub const fn to_hpa(self) -> Hpa {
        Hpa(self.0 << PAGE_SHIFT)
    }
}

impl Hpa {
    /// The frame the address is in.
    #[inline]
    pub const fn to_pfn(self) -> Pfn {
        Pfn(self.0 >> PAGE_SHIFT)
    }
}

/// A level of the page tables, 1 (4 KiB) to 5.
///
/// # Invariants
///
/// The number is in `1..=5`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Level(u8);

impl Level {
    /// Entries map 4 KiB.
    pub const L4K: Level = Level(1);
    /// Entries map 2 MiB.
    pub const L2M: Level = Level(2);
    /// Entries map 1 GiB.
    pub const L1G: Level = Level(3);
    /// Entries cover 512 GiB: the root of four-level paging.
    pub const L512G: Level = Level(4);
    /// Entries cover 256 TiB: the root of five-level paging.
    pub const L256T: Level = Level(5);
    /// The highest level at which an entry can map memory.
    pub const MAX_HUGE: Level = Level::L1G;

    /// The level numbered `n` as KVM numbers them.
    #[inline]
    pub const fn new(n: u8) -> Option<Level> {
        if n >= 1 && n <= 5 {
            Some(Level(n))
        } else {
            None
        }
    }

    /// KVM's number of the level.
    #[inline]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Position in an array that has a place for each level: `0..=4`.
    #[inline]
    pub const fn slot(self) -> usize {
        self.0.wrapping_sub(1) as usize
    }

    /// Shift from a frame number to the index at this level.
    #[inline]
    pub const fn gfn_shift(self) -> u32 {
        // The mask is no restriction: the level is in 1..=5. It tells the
        // compiler that no shift by the result overflows.
        ((self.0.wrapping_sub(1) & 7) as u32).wrapping_mul(INDEX_BITS) & 63
    }

    /// Shift from an address to the index at this level.
    #[inline]
    pub const fn shift(self) -> u32 {
        self.gfn_shift().wrapping_add(PAGE_SHIFT) & 63
    }

    /// How many 4 KiB frames an entry covers.
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << self.gfn_shift()
    }

    /// The bits of a frame number below the index of this level.
    #[inline]
    pub const fn gfn_mask(self) -> u64 {
        self.pages().wrapping_sub(1)
    }

    /// The level below, if there is one.
    #[inline]
    pub const fn child(self) -> Option<Level> {
        Level::new(self.0.wrapping_sub(1))
    }

    /// The level above, if there is one.
    #[inline]
    pub const fn parent(self) -> Option<Level> {
        Level::new(self.0.wrapping_add(1))
    }

    /// The first frame number that a root of this level can not translate.
    #[inline]
    pub const fn root_end(self) -> Gfn {
        Gfn((ENTRIES as u64) << self.gfn_shift())
    }
}

/// Frames from `start` up to, not including, `end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GfnRange {
    /// First frame.
    pub start: Gfn,
    /// First frame behind the range.
    pub end: Gfn,
}

impl GfnRange {
    /// The range from `start` up to `end`.
    #[inline]
    pub const fn new(start: Gfn, end: Gfn) -> GfnRange {
        GfnRange { start, end }
    }

    /// What one entry of `level` that covers `gfn` maps.
    #[inline]
    pub const fn of(gfn: Gfn, level: Level) -> GfnRange {
        let start = gfn.round_down(level);
        GfnRange {
            start,
            end: start.add(level.pages()),
        }
    }

    /// No frame is in the range.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }

    /// The number of frames.
    #[inline]
    pub const fn pages(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether `gfn` is in the range.
    #[inline]
    pub const fn contains(self, gfn: Gfn) -> bool {
        self.start.0 <= gfn.0 && gfn.0 < self.end.0
    }

    /// What is in both ranges.
    #[inline]
    pub fn intersect(self, other: GfnRange) -> GfnRange {
        GfnRange {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        }
    }
}

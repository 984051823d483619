// SPDX-License-Identifier: GPL-2.0

//! What the bits of the guest's entries mean.

use super::GuestContext;
use crate::mmu::types::{Gfn, Level, ACC_EXEC, ACC_READ, ACC_USER, ACC_WRITE, PAGE_SHIFT};

/// The entry maps a page, at the levels that have large pages. In all formats.
pub(super) const LARGE: u64 = 1 << 7;

/// Bits 51:12, where the address is in entries of 8 bytes.
const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;

const EPT_READ: u64 = 1 << 0;
const EPT_WRITE: u64 = 1 << 1;
const EPT_EXECUTE: u64 = 1 << 2;
const EPT_EXECUTE_USER: u64 = 1 << 10;

/// How wide an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    /// 4 bytes.
    Four,
    /// 8 bytes.
    Eight,
}

impl Width {
    /// The width in bytes.
    #[inline]
    pub const fn bytes(self) -> u16 {
        match self {
            Width::Four => 4,
            Width::Eight => 8,
        }
    }
}

/// A format of the guest's tables. Entries are held in 64 bits, whatever their width.
pub trait GuestFormat {
    /// The width of an entry.
    const WIDTH: Width;
    /// How many bits of the address choose an entry of a table.
    const INDEX_BITS: u32;
    /// Where an entry, or the root's register, has its address.
    const ADDRESS: u64;
    /// The accessed bit.
    const ACCESSED: u64;
    /// The dirty bit.
    const DIRTY: u64;
    /// The CPU reports what it found by an exit qualification.
    const EPT: bool = false;

    /// Whether the walk goes on with this entry.
    fn is_present(context: &GuestContext, entry: u64) -> bool;

    /// What the entry allows, as `ACC_` bits.
    fn access(entry: u64) -> u8;

    /// The protection key of a leaf.
    #[inline]
    fn key(_entry: u64) -> u32 {
        0
    }

    /// Whether bits that are not reserved one by one are so together.
    #[inline]
    fn is_bad_combination(_context: &GuestContext, _entry: u64) -> bool {
        false
    }

    /// Whether bit 7 says at this level that the entry maps a page.
    #[inline]
    fn has_large(_context: &GuestContext, _level: Level) -> bool {
        true
    }

    /// Bits of a large page's address that are not where the others are.
    #[inline]
    fn high_address(_entry: u64) -> u64 {
        0
    }

    /// The frames that an entry of `level` covers, as a shift.
    #[inline]
    fn shift(level: Level) -> u32 {
        let below = u32::from(level.get()).wrapping_sub(1);
        below.wrapping_mul(Self::INDEX_BITS) & 63
    }

    /// The offset of the entry for `address` in a table of `level`.
    #[inline]
    fn offset(address: u64, level: Level) -> u16 {
        let shift = Self::shift(level).wrapping_add(PAGE_SHIFT) & 63;
        let index = address >> shift & (1u64 << Self::INDEX_BITS).wrapping_sub(1);
        (index as u16).wrapping_mul(Self::WIDTH.bytes())
    }

    /// The frame that an entry of `level` points to, or the first one it maps.
    #[inline]
    fn frame(entry: u64, level: Level, is_leaf: bool) -> Gfn {
        let mut address = entry & Self::ADDRESS;
        if is_leaf {
            let covered = (1u64 << Self::shift(level)).wrapping_sub(1);
            address &= !(covered << PAGE_SHIFT);
            if level > Level::L4K {
                address |= Self::high_address(entry);
            }
        }
        Gfn(address >> PAGE_SHIFT)
    }

    /// The entry ends the walk.
    #[inline]
    fn is_leaf(context: &GuestContext, entry: u64, level: Level) -> bool {
        level == Level::L4K || entry & LARGE != 0 && Self::has_large(context, level)
    }
}

/// Entries of 4 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Paging32;

/// Entries of 8 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Paging64;

/// Entries of EPT.
#[derive(Clone, Copy, Debug)]
pub struct PagingEpt;

#[inline]
fn access_of(entry: u64) -> u8 {
    let mut access = 0;
    for (bit, right) in [(PRESENT, ACC_READ), (WRITABLE, ACC_WRITE), (USER, ACC_USER)] {
        if entry & bit != 0 {
            access |= right;
        }
    }
    // Clear in entries of 4 bytes.
    if entry & NO_EXECUTE == 0 {
        access |= ACC_EXEC;
    }
    access
}

impl GuestFormat for Paging32 {
    const WIDTH: Width = Width::Four;
    const INDEX_BITS: u32 = 10;
    const ADDRESS: u64 = 0xffff_f000;
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;

    #[inline]
    fn is_present(_context: &GuestContext, entry: u64) -> bool {
        entry & PRESENT != 0
    }

    #[inline]
    fn access(entry: u64) -> u8 {
        access_of(entry)
    }

    #[inline]
    fn has_large(context: &GuestContext, _level: Level) -> bool {
        context.pse
    }

    /// Bits 39:32 are in bits 20:13. Those the CPU does not have are reserved.
    #[inline]
    fn high_address(entry: u64) -> u64 {
        (entry >> 13 & 0xff) << 32
    }
}

impl GuestFormat for Paging64 {
    const WIDTH: Width = Width::Eight;
    const INDEX_BITS: u32 = 9;
    const ADDRESS: u64 = ADDRESS;
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;

    #[inline]
    fn is_present(_context: &GuestContext, entry: u64) -> bool {
        entry & PRESENT != 0
    }

    #[inline]
    fn access(entry: u64) -> u8 {
        access_of(entry)
    }

    #[inline]
    fn key(entry: u64) -> u32 {
        (entry >> 59 & 15) as u32
    }
}

impl GuestFormat for PagingEpt {
    const WIDTH: Width = Width::Eight;
    const INDEX_BITS: u32 = 9;
    const ADDRESS: u64 = ADDRESS;
    const ACCESSED: u64 = 1 << 8;
    const DIRTY: u64 = 1 << 9;
    const EPT: bool = true;

    #[inline]
    fn is_present(context: &GuestContext, entry: u64) -> bool {
        let user = if context.mbec { EPT_EXECUTE_USER } else { 0 };
        entry & (EPT_READ | EPT_WRITE | EPT_EXECUTE | user) != 0
    }

    #[inline]
    fn access(entry: u64) -> u8 {
        let mut access = 0;
        for (bit, right) in [
            (EPT_READ, ACC_READ),
            (EPT_WRITE, ACC_WRITE),
            (EPT_EXECUTE, ACC_EXEC),
            (EPT_EXECUTE_USER, ACC_USER),
        ] {
            if entry & bit != 0 {
                access |= right;
            }
        }
        access
    }

    /// Execution in user mode alone is judged as execution.
    #[inline]
    fn is_bad_combination(context: &GuestContext, entry: u64) -> bool {
        let execute = if entry & EPT_EXECUTE_USER != 0 {
            EPT_EXECUTE
        } else {
            0
        };
        context.bad_mt_xwr >> ((entry | execute) & 0x3f) & 1 != 0
    }
}

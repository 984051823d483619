// SPDX-License-Identifier: GPL-2.0

//! The guest's own page tables, as its CPU would walk them.
//!
//! The shadow MMU translates with tables that it makes from the guest's. To know
//! what these say about an address it does what the CPU would: [`walk`] reads the
//! entries from the root down, checks reserved bits and permissions, sets accessed
//! and dirty bits, and ends with a [`GuestWalk`], or with the [`GuestFault`] that
//! the guest gets. There is one walker, compiled once for each [`GuestFormat`]:
//!
//! - [`Paging32`]: two levels of 4-byte entries, with 4 MiB pages (PSE);
//! - [`Paging64`]: 8-byte entries, three (PAE), four and five levels, nested page
//!   tables of AMD included;
//! - [`PagingEpt`]: extended page tables that a guest hypervisor made.
//!
//! What the guest's control registers mean is KVM's: it arrives as values, in a
//! [`GuestContext`]. The guest's memory is reached through [`GuestMemory`].
//!
//! # What may change under a walk
//!
//! Other CPUs of the guest write to the tables at any time. A walk reads each entry
//! once. A bit is set by compare-exchange with the value that was read, and when
//! that fails everything is read again. The entries of the walk are kept: under
//! `mmu_lock`, once a table is write-protected or known as out of sync, the shadow
//! MMU reads its entry again through [`GuestTables`]. From then on a change is
//! noticed.
//!
//! # Clean pages
//!
//! A CPU sets the dirty bit of the guest's entry when it writes. Behind a writable
//! shadow entry it would not, so a leaf whose dirty bit is clear is shadowed
//! read-only, and the write that follows comes here and sets the bit.

mod fault;
mod format;
mod tables;
mod walk;

pub use fault::{ErrorCode, GuestFault};
pub use format::{GuestFormat, Paging32, Paging64, PagingEpt, Width};
pub use tables::{Guest, GuestTables, GROUP};
pub use walk::{walk, GuestWalk, Stop};
#[cfg(not(MODULE))]
pub use {tables::GuestLeaf, walk::GuestTable};

use crate::mmu::types::{Gfn, Level, ACC_USER};

/// How the guest pages: what its control registers come to.
#[derive(Clone, Copy, Debug)]
pub struct GuestContext {
    /// The level of the root. `Level::L1G`, three, is PAE.
    pub level: Level,
    /// The register that points to the root: CR3, nested CR3, or the EPT pointer.
    pub root: u64,
    /// The four page-directory pointers that the vCPU loaded; used by PAE only.
    pub pdptrs: [u64; 4],
    /// `CR4.PSE`: entries of 4 bytes can map 4 MiB.
    pub pse: bool,
    /// Accessed and dirty bits are in use. They always are, but for EPT.
    pub accessed_dirty: bool,
    /// EPT: user-mode execution has a bit of its own.
    pub mbec: bool,
    /// A fault's error code tells fetches apart: no-execute or SMEP is on.
    pub reports_fetch: bool,
    /// The tables are those of a guest hypervisor for its guest.
    pub nested: bool,
    /// Reserved bits, by bit 7 of the entry and level.
    pub rsvd: [[u64; 5]; 2],
    /// EPT: combinations of memory type and permissions that must not be.
    pub bad_mt_xwr: u64,
    /// Which of the 16 combinations of `ACC_` bits an access faults on. The index
    /// is the access's error code without its lowest bit, with [`ErrorCode::RSVD`]
    /// for an access that SMAP does not apply to.
    pub permissions: [u16; 16],
    /// Which bits of a protection key count, by the access; zero without keys.
    pub pkru_mask: u32,
    /// The rights of the 16 protection keys.
    pub pkru: u32,
    /// The access is free of SMAP: `EFLAGS.AC` is set.
    pub ac: bool,
}

/// What became of a compare-exchange in guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exchange {
    /// The new value is there.
    Done,
    /// Another value was there.
    Changed,
    /// The memory can not be reached.
    Unreachable,
}

/// What an observer may want to know of a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalkEvent {
    /// It begins, for this kind of access.
    Begins {
        /// The address to be translated.
        address: u64,
        /// The kind of access.
        kind: ErrorCode,
    },
    /// An entry was read.
    Entry {
        /// The entry.
        entry: u64,
        /// The level of its table.
        level: Level,
    },
    /// An accessed bit is to be set.
    SetsAccessed {
        /// The table.
        table: Gfn,
        /// The offset of the entry in it.
        offset: u16,
    },
    /// A dirty bit is to be set.
    SetsDirty {
        /// The table.
        table: Gfn,
        /// The offset of the entry in it.
        offset: u16,
    },
    /// It ended with a fault.
    Faults(ErrorCode),
}

/// The guest's memory.
///
/// An entry is read and written by a single access of its width. Its offset in the
/// table, in bytes, is a multiple of that.
pub trait GuestMemory {
    /// A page that was found, so that the walk looks it up once.
    type Page: Copy;

    /// The page of a table; nothing if no slot that the guest sees backs it.
    fn page(&self, table: Gfn) -> Option<Self::Page>;

    /// Whether the guest may write to the page; not so in a read-only slot.
    fn is_writable(&self, page: Self::Page) -> bool;

    /// Reads an entry. May sleep. Nothing if the host can not reach it.
    fn read(&self, page: Self::Page, offset: u16, width: Width) -> Option<u64>;

    /// Replaces an entry, and marks the page dirty if it did. May sleep.
    fn compare_exchange(
        &self,
        page: Self::Page,
        offset: u16,
        width: Width,
        old: u64,
        new: u64,
    ) -> Exchange;

    /// Reads an entry without sleeping.
    fn read_now(&self, gpa: u64, width: Width) -> Option<u64>;

    /// Reads the aligned group of entries at `gpa` without sleeping, each of them
    /// whole; false if it did not get all.
    fn read_group_now(&self, gpa: u64, width: Width, group: &mut [u64; GROUP]) -> bool;

    /// A leaf of EPT is about to become dirty: the guest hypervisor's log wants
    /// `address`. False if that log is full, which it has to be told first.
    fn log_dirty(&self, _address: u64) -> bool {
        true
    }

    /// Something happened in a walk.
    #[inline]
    fn trace(&self, _event: WalkEvent) {}
}

impl GuestContext {
    /// Whether the entry has a bit set that must be clear.
    #[inline]
    pub(super) fn is_reserved<F: GuestFormat>(&self, entry: u64, level: Level) -> bool {
        let large = entry & format::LARGE != 0;
        let mask = self
            .rsvd
            .get(usize::from(large))
            .and_then(|by_level| by_level.get(level.slot()));
        // There is no page above 1 GiB, whatever the masks say.
        let too_large = large && level > Level::MAX_HUGE;
        match mask {
            Some(mask) => entry & mask != 0 || too_large || F::is_bad_combination(self, entry),
            None => true,
        }
    }

    /// The error code of a kind of access that the `ACC_` bits of the path forbid.
    #[inline]
    pub(super) fn permission_fault(
        &self,
        access: u8,
        key: u32,
        kind: ErrorCode,
    ) -> Option<ErrorCode> {
        let flags = kind.bits() & (ErrorCode::WRITE | ErrorCode::USER | ErrorCode::FETCH).bits();
        let no_smap = self.ac && !kind.contains(ErrorCode::IMPLICIT);
        let index = (flags | if no_smap { ErrorCode::RSVD.bits() } else { 0 }) >> 1;
        let faults_on = self.permissions.get(index as usize).copied();
        let mut fault = match faults_on {
            Some(faults_on) => faults_on >> (access & 15) & 1 != 0,
            None => true,
        };
        let mut code = ErrorCode::PRESENT;
        if self.pkru_mask != 0 {
            let user_page = access & ACC_USER != 0;
            let shift = flags | if user_page { ErrorCode::RSVD.bits() } else { 0 };
            let counts = self.pkru_mask >> (shift & 31);
            if self.pkru >> (key.wrapping_mul(2) & 31) & counts & 3 != 0 {
                code = code | ErrorCode::PK;
                fault = true;
            }
        }
        fault.then_some(code)
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Single entries of the guest, for a shadow MMU that holds `mmu_lock`.

use super::{
    format::{GuestFormat, Width},
    GuestContext, GuestMemory,
};
use crate::mmu::types::{Gfn, Level, ACC_WRITE, ENTRIES};
use core::marker::PhantomData;

/// How many entries a prefetch looks at: an aligned group around the fault.
pub const GROUP: usize = if ENTRIES < 8 { ENTRIES } else { 8 };

/// What the guest's last-level entry maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestLeaf {
    /// The frame.
    pub gfn: Gfn,
    /// What this entry allows, as `ACC_` bits; the entries above count too.
    pub access: u8,
}

/// The guest's tables, entry by entry. Nothing here sleeps.
pub trait GuestTables {
    /// The size of an entry.
    const ENTRY_BYTES: u64;

    /// The entry at `gpa`.
    fn read_entry(&self, gpa: u64) -> Option<u64>;

    /// The group of entries at `gpa`, which is aligned to its size.
    fn read_group(&self, gpa: u64, group: &mut [u64; GROUP]) -> bool;

    /// What a shadow entry made of this last-level entry may map although no access
    /// asked for it. Nothing if the guest's CPU would not have cached it: not
    /// present, a reserved bit set, or never accessed. Setting the accessed bit
    /// takes an access. Writing is left out as long as the entry is clean.
    fn leaf_4k(&self, entry: u64) -> Option<GuestLeaf>;
}

/// The guest's tables, of a vCPU that pages in format `F`.
pub struct Guest<'a, F, M> {
    /// How the guest pages.
    pub context: &'a GuestContext,
    /// Its memory.
    pub memory: &'a M,
    format: PhantomData<F>,
}

impl<'a, F: GuestFormat, M: GuestMemory> Guest<'a, F, M> {
    /// The tables in `memory` that `context` describes.
    #[inline]
    pub fn new(context: &'a GuestContext, memory: &'a M) -> Self {
        Guest {
            context,
            memory,
            format: PhantomData,
        }
    }
}

impl<F: GuestFormat, M: GuestMemory> GuestTables for Guest<'_, F, M> {
    const ENTRY_BYTES: u64 = match F::WIDTH {
        Width::Four => 4,
        Width::Eight => 8,
    };

    #[inline]
    fn read_entry(&self, gpa: u64) -> Option<u64> {
        self.memory.read_now(gpa, F::WIDTH)
    }

    #[inline]
    fn read_group(&self, gpa: u64, group: &mut [u64; GROUP]) -> bool {
        self.memory.read_group_now(gpa, F::WIDTH, group)
    }

    #[inline]
    fn leaf_4k(&self, entry: u64) -> Option<GuestLeaf> {
        let context = self.context;
        let accessed = !context.accessed_dirty || entry & F::ACCESSED != 0;
        if !F::is_present(context, entry)
            || !accessed
            || context.is_reserved::<F>(entry, Level::L4K)
        {
            return None;
        }
        Some(GuestLeaf {
            gfn: F::frame(entry, Level::L4K, true),
            access: protect_clean::<F>(context, entry, F::access(entry)),
        })
    }
}

/// Takes the right to write as long as the guest's leaf is clean.
#[inline]
pub(super) fn protect_clean<F: GuestFormat>(context: &GuestContext, entry: u64, access: u8) -> u8 {
    if context.accessed_dirty && entry & F::DIRTY == 0 {
        access & !ACC_WRITE
    } else {
        access
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Roots, as a context of a vCPU has them: by their address.
//!
//! A root's address leads to its header, and the header to the engine. Only addresses that our own code stored in a context
//! lead there, so they have a type, which nothing else can be made into by safe code.

use crate::{
    kvm::{bindings, shadow::is_shadow, table},
    mmu::{
        shadow::PagePtr,
        table::TablePtr,
        types::{Hpa, PAGE_SHIFT},
    },
};
use core::ptr::NonNull;

/// What KVM has for the address of no root.
pub(super) const INVALID_PAGE: u64 = bindings::RMMU_INVALID_PAGE as u64;

/// The address of a root.
///
/// # Invariants
///
/// What it is the address of lives: a table of the TDP MMU, or a shadow page, on which the context that the root is in has a
/// reference; the page of a context's four PAE entries, or one above it; or the dummy root.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RootHpa(Hpa);

/// What a root's address leads to.
#[derive(Clone, Copy)]
pub enum RootKind {
    /// A table of the TDP MMU.
    Tdp(TablePtr),
    /// A shadow page.
    Shadow(PagePtr),
    /// The page of four PAE entries, or one above it.
    Special,
    /// Stands for a guest's root that is no memory.
    Dummy,
}

impl RootHpa {
    /// Takes an address for that of a root.
    ///
    /// # Safety
    ///
    /// As the type's invariants say.
    #[inline]
    pub unsafe fn new(hpa: Hpa) -> Self {
        // INVARIANT: the caller's promise.
        RootHpa(hpa)
    }

    /// The root in one of a context's fields, if there is one.
    pub(super) fn of_field(info: &bindings::kvm_mmu_root_info) -> Option<Self> {
        // INVARIANT: only `Mmu::set_root` puts roots there, and KVM moves them from one field to another.
        (info.hpa != INVALID_PAGE).then_some(RootHpa(Hpa(info.hpa)))
    }

    /// The root of a guest whose own root is no memory.
    pub fn dummy() -> Self {
        // INVARIANT: the dummy root is one.
        RootHpa(table::dummy_root())
    }

    /// The address of a table on which the caller has a reference, for a context that takes it over.
    pub fn of_table(root: TablePtr) -> Self {
        // INVARIANT: a table lives as long as there is a reference.
        RootHpa(root.hpa())
    }

    /// The address of a shadow page on which the caller has a reference, for a context that takes it over.
    pub fn of_page(root: PagePtr) -> Self {
        // INVARIANT: a page lives as long as there is a reference.
        RootHpa(root.hpa())
    }

    /// The address.
    #[inline]
    pub fn get(self) -> Hpa {
        self.0
    }

    /// The table behind a root of the TDP MMU. None if there is no header, as with PAE entries.
    #[inline]
    pub fn table(self) -> Option<TablePtr> {
        // SAFETY: memory that lives, by the invariants. The private word of a root's page is the header that made it one,
        // or null.
        let header = NonNull::new(unsafe { table::header_at(self.0) })?;
        // SAFETY: the header of a root that lives.
        Some(unsafe { TablePtr::from_raw(header.cast()) })
    }

    /// Tells what the root is.
    #[inline]
    pub fn kind(self) -> RootKind {
        if self == Self::dummy() {
            return RootKind::Dummy;
        }
        let Some(root) = self.table() else {
            return RootKind::Special;
        };
        let header = root.as_ptr();
        // SAFETY: the header of a root that lives, of one kind or the other.
        if unsafe { is_shadow(header.cast()) } {
            // SAFETY: as it says, the header of a shadow page.
            RootKind::Shadow(unsafe { PagePtr::from_raw(header.cast()) })
        } else {
            RootKind::Tdp(root)
        }
    }
}

/// One of a context's four PAE entries.
///
/// # Invariants
///
/// Zero, or the address, and some bits, of a shadow page on which the context has a reference.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct PaeEntry(u64);

impl PaeEntry {
    /// An entry that leads nowhere.
    pub const NONE: PaeEntry = PaeEntry(0);

    /// An entry for a page on which the caller has a reference, for a context that takes it over. `bits` are what it needs
    /// besides an address.
    pub fn new(root: PagePtr, bits: u64) -> Self {
        // INVARIANT: the address of a page that lives.
        PaeEntry(root.hpa().0 | bits)
    }

    /// Takes a word for an entry.
    ///
    /// # Safety
    ///
    /// As the type's invariants say.
    pub(super) unsafe fn from_raw(word: u64) -> Self {
        // INVARIANT: the caller's promise.
        PaeEntry(word)
    }

    /// What the hardware reads.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The shadow page behind the entry; none if it leads nowhere.
    pub fn root(self) -> Option<PagePtr> {
        const ADDRESS: u64 = ((1 << 52) - 1) & !((1 << PAGE_SHIFT) - 1);
        if self.0 == 0 {
            return None;
        }
        // INVARIANT: the page lives, and so does the context's reference, as long as the entry is one.
        match RootHpa(Hpa(self.0 & ADDRESS)).kind() {
            RootKind::Shadow(page) => Some(page),
            _ => None,
        }
    }
}

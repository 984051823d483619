// SPDX-License-Identifier: GPL-2.0

//! Lists through the headers of pages.
//!
//! The head is one pointer, so that a zeroed array of heads is a hash table. The
//! first page's back link leads to the last page; the last one's forward link is
//! null. A page leaves its lists before it is freed.

use super::page::{Page, PagePtr};
use crate::mmu::sync::{MmuLocked, MmuWrite};
use core::{cell::Cell, marker::PhantomData, ptr::NonNull};

type Pointer = Cell<Option<NonNull<Page>>>;

/// A page's place in a list.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Link {
    next: Pointer,
    prev: Pointer,
}

/// Which of a page's links a list uses.
pub(super) trait Through {
    fn link(page: &Page) -> &Link;
}

/// Pages in use, oldest last; or zapped pages.
#[derive(Debug)]
pub(super) struct InUse;
/// Pages with the same hash.
#[derive(Debug)]
pub(super) struct ByHash;
/// Pages that stand in the way of an NX huge page, oldest last.
#[derive(Debug)]
pub(super) struct NxCandidates;

impl Through for InUse {
    #[inline]
    fn link(page: &Page) -> &Link {
        &page.link
    }
}

impl Through for ByHash {
    #[inline]
    fn link(page: &Page) -> &Link {
        &page.hash_link
    }
}

impl Through for NxCandidates {
    #[inline]
    fn link(page: &Page) -> &Link {
        &page.nx_link
    }
}

/// A list of pages, guarded by `mmu_lock`.
///
/// # Invariants
///
/// All pages in it are alive.
#[repr(transparent)]
#[derive(Debug)]
pub(super) struct List<T> {
    first: Pointer,
    _through: PhantomData<T>,
}

// SAFETY: A pointer. Everything that looks at it or at what is linked takes the
// proof that the lock is held, and what changes it that it is held for write.
unsafe impl<T> Sync for List<T> {}
// SAFETY: As above.
unsafe impl<T> Send for List<T> {}

impl<T: Through> List<T> {
    pub(super) const fn new() -> List<T> {
        List {
            first: Cell::new(None),
            _through: PhantomData,
        }
    }

    fn get<'l, L: MmuLocked>(&self, page: Option<NonNull<Page>>, lock: &'l L) -> Option<&'l Page> {
        // SAFETY: A page in a list is alive by the invariants, and came from
        // `Page::as_ptr`.
        Some(unsafe { PagePtr::from_raw(page?) }.page(lock))
    }

    #[inline]
    pub(super) fn is_empty<L: MmuLocked>(&self, _lock: &L) -> bool {
        self.first.get().is_none()
    }

    #[inline]
    pub(super) fn first<'l, L: MmuLocked>(&self, lock: &'l L) -> Option<&'l Page> {
        self.get(self.first.get(), lock)
    }

    #[inline]
    pub(super) fn last<'l, L: MmuLocked>(&self, lock: &'l L) -> Option<&'l Page> {
        let first = self.first(lock)?;
        self.get(T::link(first).prev.get(), lock)
    }

    #[inline]
    pub(super) fn after<'l, L: MmuLocked>(&self, page: &Page, lock: &'l L) -> Option<&'l Page> {
        self.get(T::link(page).next.get(), lock)
    }

    /// The page before `page`, if it is not the first.
    #[inline]
    pub(super) fn before<'l, L: MmuLocked>(&self, page: &Page, lock: &'l L) -> Option<&'l Page> {
        if self.first.get() == Some(NonNull::from(page)) {
            return None;
        }
        self.get(T::link(page).prev.get(), lock)
    }

    /// Puts a page in front. It must be in no other list through this link.
    pub(super) fn push(&self, page: &Page, lock: &MmuWrite<'_>) {
        let this = Some(NonNull::from(page));
        let link = T::link(page);
        link.next.set(self.first.get());
        match self.first(lock) {
            Some(first) => {
                let first = T::link(first);
                link.prev.set(first.prev.get());
                first.prev.set(this);
            }
            None => link.prev.set(this),
        }
        // INVARIANT: There is a reference to the page, so it is alive.
        self.first.set(this);
    }

    /// Takes a page out, which is in the list.
    pub(super) fn remove(&self, page: &Page, lock: &MmuWrite<'_>) {
        let link = T::link(page);
        let next = link.next.replace(None);
        let prev = link.prev.replace(None);
        let is_first = self.first.get() == Some(NonNull::from(page));
        match self.get(next, lock) {
            Some(next) => T::link(next).prev.set(prev),
            // The last one went, which the first one's back link must know.
            None => {
                if let (false, Some(first)) = (is_first, self.first(lock)) {
                    T::link(first).prev.set(prev);
                }
            }
        }
        if is_first {
            self.first.set(next);
        } else if let Some(prev) = self.get(prev, lock) {
            T::link(prev).next.set(next);
        }
    }
}

/// How many buckets the hash table has.
const BUCKETS: usize = 1 << BUCKETS_SHIFT;
pub(crate) const BUCKETS_SHIFT: u32 = 12;

/// The hash table of a VM's pages, by frame number. Zeroes are an empty one.
#[repr(transparent)]
#[derive(Debug)]
pub struct Buckets([List<ByHash>; BUCKETS]);

impl Buckets {
    /// How many there are.
    pub(super) const COUNT: usize = BUCKETS;

    /// The number of the bucket for a frame.
    #[inline]
    pub(super) fn number_of(gfn: u64) -> usize {
        // Fibonacci hashing: the high bits of the product are the best mixed.
        (gfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BUCKETS_SHIFT)) as usize
    }

    /// The pages that may be for this frame.
    #[inline]
    pub(super) fn of(&self, gfn: u64) -> Option<&List<ByHash>> {
        self.get(Self::number_of(gfn))
    }

    /// The pages of a bucket.
    #[inline]
    pub(super) fn get(&self, number: usize) -> Option<&List<ByHash>> {
        self.0.get(number)
    }
}

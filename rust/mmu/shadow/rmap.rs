// SPDX-License-Identifier: GPL-2.0

//! Reverse maps: which entries map a frame, or point to a page.
//!
//! A map is one word. Zero is empty; the address of an entry is a map of one
//! entry, which most are; otherwise bit 0 is set and the rest is the address of a
//! descriptor, which holds entries and leads to the next descriptor. All but the
//! first descriptor are full.
//!
//! Word and descriptors have KVM's layout: the objects come from its caches, and
//! its debugfs counts entries of the maps of a slot.

use super::{
    host::{PageSource, ShadowHost},
    page::Entry,
};
use crate::mmu::{
    sync::{
        atomic::{AtomicU64, Ordering},
        MmuLocked, MmuWrite,
    },
    table::{Entries, ENTRIES},
};
use core::{cell::Cell, mem, ptr, ptr::NonNull};

const MANY: u64 = 1;
const PER_DESC: usize = 14;

/// The address of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct EntryPtr(u64);

impl EntryPtr {
    #[inline]
    pub(super) fn new(cell: &AtomicU64) -> EntryPtr {
        EntryPtr(ptr::from_ref(cell).expose_provenance() as u64)
    }

    /// The address of the page of entries that it is in, and the number there.
    #[inline]
    pub(super) fn place(self) -> (u64, usize) {
        const BYTES: u64 = mem::size_of::<Entries>() as u64;
        const { assert!(BYTES.is_power_of_two(), "entries are aligned to their size") };
        let first = self.0 & !(BYTES - 1);
        let index = (self.0 & (BYTES - 1)) as usize / mem::size_of::<AtomicU64>();
        (first, index % ENTRIES)
    }

    /// The entry. The page it is in is alive: an entry leaves all maps before its
    /// page is freed.
    #[inline]
    pub(super) fn entry<'l, H: ShadowHost, L: MmuLocked>(self, host: &H, lock: &'l L) -> Entry<'l> {
        let (first, index) = self.place();
        let entries = ptr::with_exposed_provenance_mut::<Entries>(first as usize);
        // SAFETY: The address of an entry, rounded down to its page, is not null.
        let entries = unsafe { NonNull::new_unchecked(entries) };
        Entry::new(host.page_at(entries).page(lock), index)
    }
}

/// A descriptor: KVM's `struct pte_list_desc`.
#[repr(C)]
#[derive(Debug)]
pub struct Desc {
    more: Cell<u64>,
    /// Entries in this descriptor.
    count: Cell<u32>,
    /// Entries in the descriptors behind.
    behind: Cell<u32>,
    entries: [Cell<u64>; PER_DESC],
}

const _: () = assert!(mem::size_of::<Desc>() == 128);

/// A pointer to a descriptor.
///
/// # Invariants
///
/// Points to a descriptor that belongs to the map it is in, or to the holder.
#[derive(Debug)]
pub struct DescPtr(NonNull<Desc>);

impl DescPtr {
    /// Takes in a new descriptor.
    ///
    /// # Safety
    ///
    /// `desc` points to zeroed memory that nobody else uses and that lives until
    /// the host's `free_desc`.
    #[inline]
    pub unsafe fn adopt(desc: NonNull<Desc>) -> DescPtr {
        // INVARIANT: By the contract of this function.
        DescPtr(desc)
    }

    /// The descriptor's address.
    #[inline]
    pub fn as_ptr(&self) -> NonNull<Desc> {
        self.0
    }
}

/// No descriptor was to be had.
#[derive(Debug)]
pub(super) struct NoDesc;

/// A map, guarded by `mmu_lock`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rmap<'a>(&'a AtomicU64);

impl<'a> Rmap<'a> {
    #[inline]
    pub(super) fn new(head: &'a AtomicU64) -> Rmap<'a> {
        Rmap(head)
    }

    #[inline]
    fn head(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    #[inline]
    fn set_head(&self, head: u64) {
        self.0.store(head, Ordering::Relaxed);
    }

    /// The descriptor that a head or a `more` points to.
    #[inline]
    fn desc<L: MmuLocked>(at: u64, _lock: &L) -> Option<&Desc> {
        let desc = ptr::with_exposed_provenance::<Desc>((at & !MANY) as usize);
        // SAFETY: Null, or a descriptor of this map. It leaves the map before it is
        // freed, and no function of this file uses it after that.
        unsafe { desc.as_ref() }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.head() == 0
    }

    /// How many entries there are.
    #[inline]
    pub(super) fn count<L: MmuLocked>(&self, lock: &L) -> u64 {
        match self.head() {
            0 => 0,
            one if one & MANY == 0 => 1,
            many => Self::desc(many, lock).map_or(0, |desc| {
                u64::from(desc.count.get()).wrapping_add(desc.behind.get().into())
            }),
        }
    }

    /// Adds an entry.
    pub(super) fn add<S: PageSource>(
        &self,
        entry: EntryPtr,
        source: &mut S,
        lock: &MmuWrite<'_>,
    ) -> Result<(), NoDesc> {
        let head = self.head();
        if head == 0 {
            self.set_head(entry.0);
            return Ok(());
        }
        if head & MANY == 0 {
            let desc = self.prepend(0, 0, source, lock)?;
            desc.append(EntryPtr(head));
            desc.append(entry);
            return Ok(());
        }
        let Some(mut desc) = Self::desc(head, lock) else {
            return Err(NoDesc);
        };
        if desc.count.get() as usize >= PER_DESC {
            let behind = desc.behind.get().wrapping_add(desc.count.get());
            desc = self.prepend(head & !MANY, behind, source, lock)?;
        }
        desc.append(entry);
        Ok(())
    }

    /// Puts a new descriptor in front.
    fn prepend<'l, S: PageSource>(
        &self,
        more: u64,
        behind: u32,
        source: &mut S,
        lock: &'l MmuWrite<'_>,
    ) -> Result<&'l Desc, NoDesc> {
        let desc = source.take_desc().ok_or(NoDesc)?;
        let at = desc.0.as_ptr().expose_provenance() as u64;
        let desc = Self::desc(at, lock).ok_or(NoDesc)?;
        desc.more.set(more);
        desc.behind.set(behind);
        desc.count.set(0);
        self.set_head(at | MANY);
        Ok(desc)
    }

    /// Removes an entry; false if it is not there.
    pub(super) fn remove<H: ShadowHost>(
        &self,
        host: &H,
        entry: EntryPtr,
        lock: &MmuWrite<'_>,
    ) -> bool {
        let head = self.head();
        if head & MANY == 0 {
            let there = head == entry.0 && head != 0;
            if there {
                self.set_head(0);
            }
            return there;
        }
        let Some(first) = Self::desc(head, lock) else {
            return false;
        };
        let mut at = Some(first);
        while let Some(desc) = at {
            if let Some(place) = desc.used().iter().find(|one| one.get() == entry.0) {
                // The last entry of the first descriptor fills the gap.
                place.set(first.pop());
                if first.count.get() == 0 {
                    self.drop_first(host, first, lock);
                }
                return true;
            }
            at = Self::desc(desc.more.get(), lock);
        }
        false
    }

    /// Frees the first descriptor, which is empty.
    fn drop_first<H: ShadowHost>(&self, host: &H, first: &Desc, _lock: &MmuWrite<'_>) {
        let more = first.more.get();
        self.set_head(if more == 0 { 0 } else { more | MANY });
        // INVARIANT: It is in no map any more.
        host.free_desc(DescPtr(NonNull::from(first)));
    }

    /// Takes an entry out of the map; none if it is empty.
    pub(super) fn pop<H: ShadowHost>(&self, host: &H, lock: &MmuWrite<'_>) -> Option<EntryPtr> {
        let head = self.head();
        if head == 0 {
            return None;
        }
        if head & MANY == 0 {
            self.set_head(0);
            return Some(EntryPtr(head));
        }
        let first = Self::desc(head, lock)?;
        let entry = first.pop();
        if first.count.get() == 0 {
            self.drop_first(host, first, lock);
        }
        Some(EntryPtr(entry))
    }

    /// The first entry for which `f` returns true. `f` must not change the map.
    #[inline]
    pub(super) fn find<'l, H: ShadowHost, L: MmuLocked>(
        &self,
        host: &H,
        lock: &'l L,
        mut f: impl FnMut(Entry<'l>) -> bool,
    ) -> Option<Entry<'l>> {
        let mut test = |at: u64| {
            let entry = EntryPtr(at).entry(host, lock);
            f(entry).then_some(entry)
        };
        let head = self.head();
        if head == 0 {
            return None;
        }
        if head & MANY == 0 {
            return test(head);
        }
        let mut at = Self::desc(head, lock);
        while let Some(desc) = at {
            for one in desc.used() {
                if let Some(entry) = test(one.get()) {
                    return Some(entry);
                }
            }
            at = Self::desc(desc.more.get(), lock);
        }
        None
    }

    /// Calls `f` with the address of every entry, none of which is followed. False if
    /// the descriptors do not fit together.
    pub(super) fn for_each_pointer<L: MmuLocked>(
        &self,
        lock: &L,
        mut f: impl FnMut(EntryPtr),
    ) -> bool {
        let head = self.head();
        if head & MANY == 0 {
            if head != 0 {
                f(EntryPtr(head));
            }
            return true;
        }
        let Some(first) = Self::desc(head, lock) else {
            return false;
        };
        let mut behind = u64::from(first.count.get()).wrapping_add(first.behind.get().into());
        let mut at = Some(first);
        while let Some(desc) = at {
            let count = desc.count.get() as usize;
            let full = count == PER_DESC || ptr::eq(desc, first);
            let Some(left) = behind.checked_sub(count as u64) else {
                return false;
            };
            behind = left;
            if !full || count == 0 || count > PER_DESC || u64::from(desc.behind.get()) != behind {
                return false;
            }
            for one in desc.used() {
                f(EntryPtr(one.get()));
            }
            at = Self::desc(desc.more.get(), lock);
        }
        behind == 0
    }

    /// Calls `f` for every entry. `f` must not change the map.
    #[inline]
    pub(super) fn for_each<'l, H: ShadowHost, L: MmuLocked>(
        &self,
        host: &H,
        lock: &'l L,
        mut f: impl FnMut(Entry<'l>),
    ) {
        self.find(host, lock, |entry| {
            f(entry);
            false
        });
    }
}

impl Desc {
    #[inline]
    fn used(&self) -> &[Cell<u64>] {
        self.entries
            .get(..self.count.get() as usize)
            .unwrap_or(&self.entries)
    }

    /// There is room.
    #[inline]
    fn append(&self, entry: EntryPtr) {
        let count = self.count.get();
        if let Some(place) = self.entries.get(count as usize) {
            place.set(entry.0);
            self.count.set(count.wrapping_add(1));
        }
    }

    /// Takes the last entry; there is one.
    #[inline]
    fn pop(&self) -> u64 {
        let last = self.count.get().wrapping_sub(1);
        self.count.set(last);
        self.entries
            .get(last as usize)
            .map_or(0, |place| place.replace(0))
    }
}

// SPDX-License-Identifier: GPL-2.0

//! A shadow page and its header.
//!
//! The header lives in an object of KVM's own cache for `struct kvm_mmu_page`, as
//! that of a TDP table does; a byte tells the two apart.
//!
//! # Who may look
//!
//! A `&Page` comes from the proof that `mmu_lock` is held, and borrows it. A page
//! is freed, and the lock yielded, only by a function that takes the proof of the
//! write lock as `&mut`. So while there is a `&Page`, the page is alive, and
//! whoever has it holds the lock.
//!
//! Everything in the header changes under the write lock only, with these
//! exceptions, which are atomics for that reason: what [`Shadow::try_unsync`]
//! marks under the read lock and the unsync lock, and the count of writes, which
//! the lockless walk resets.
//!
//! [`Shadow::try_unsync`]: super::Shadow::try_unsync

use super::{
    list::Link,
    rmap::{EntryPtr, Rmap},
    role::PageRole,
};
use crate::mmu::{
    spte::Spte,
    sync::{
        atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering},
        cell::Cell,
        MmuLocked,
    },
    table::{Entries, ENTRIES},
    types::{Gfn, Hpa, Level},
};
use core::{mem, ptr, ptr::NonNull};

/// What each entry of a page translates to: frame number and, in the low 12 bits,
/// what the guest's tables grant.
pub type Translations = [Cell<u64>; ENTRIES];

/// Where a header has the marks about unsync pages below its page.
#[cfg(not(MODULE))]
pub const UNSYNC_BITS_OFFSET: usize = mem::offset_of!(Page, unsync_bits);

/// The value of a shadow page's byte at [`offset::KIND`](crate::mmu::table::offset::KIND).
pub const KIND_SHADOW: u8 = 0;

/// What the NX mitigation has to do with a page.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Nx {
    /// Nothing. The value of a zeroed header.
    Free = 0,
    /// There is no huge page in its place because of the mitigation.
    Disallowed,
    /// And for no other reason, so that it is in the list of candidates.
    Candidate,
}

/// The header of a shadow page.
#[repr(C)]
#[derive(Debug)]
pub struct Page {
    /// The list of pages in use, or of zapped pages.
    pub(super) link: Link,
    pub(super) hash_link: Link,
    kind: Cell<u8>,
    /// The guest may have changed the table without our knowledge.
    unsync: AtomicBool,
    generation: AtomicU8,
    pub(super) nx: Cell<Nx>,
    role: AtomicU32,
    gfn: Cell<u64>,
    entries: *mut Entries,
    translations: *const Translations,
    /// vCPUs that use the page as a root; changes under the write lock.
    pub(super) roots: Cell<u32>,
    host_mmio: AtomicBool,
    /// Writes to the table since a walk came by.
    floods: AtomicU8,
    unsync_children: AtomicU16,
    hpa: u64,
    parents: AtomicU64,
    unsync_bits: [Cell<u64>; ENTRIES.div_ceil(64)],
    pub(super) nx_link: Link,
}

// The atomics of loom have another layout.
#[cfg(not(feature = "loom"))]
const _: () = {
    use crate::mmu::table::{offset, HEADER_SIZE};
    assert!(mem::size_of::<Page>() == HEADER_SIZE);
    assert!(mem::offset_of!(Page, kind) == offset::KIND);
    assert!(mem::offset_of!(Page, role) == offset::ROLE);
    assert!(mem::offset_of!(Page, gfn) == offset::GFN);
    assert!(mem::offset_of!(Page, entries) == offset::ENTRIES);
    assert!(mem::offset_of!(Page, roots) == offset::ROOT_COUNT);
    assert!(mem::offset_of!(Page, host_mmio) == offset::HOST_MMIO);
};

impl Page {
    /// What zeroes are, of which the atomics of loom are not made.
    #[cfg(feature = "loom")]
    fn zeroed() -> Page {
        Page {
            link: Link::default(),
            hash_link: Link::default(),
            entries: ptr::null_mut(),
            hpa: 0,
            gfn: Cell::new(0),
            translations: ptr::null(),
            role: AtomicU32::new(0),
            host_mmio: AtomicBool::new(false),
            kind: Cell::new(0),
            generation: AtomicU8::new(0),
            unsync: AtomicBool::new(false),
            roots: Cell::new(0),
            unsync_children: AtomicU16::new(0),
            floods: AtomicU8::new(0),
            nx: Cell::new(Nx::Free),
            parents: AtomicU64::new(0),
            unsync_bits: core::array::from_fn(|_| Cell::new(0)),
            nx_link: Link::default(),
        }
    }

    /// Says what a page is for, before anybody can find it.
    pub(super) fn prepare(&self, role: PageRole, gfn: Gfn, generation: u8) {
        self.kind.set(KIND_SHADOW);
        self.role.store(role.0, Ordering::Relaxed);
        self.gfn.set(gfn.0);
        self.generation.store(generation, Ordering::Relaxed);
    }

    /// The page's role.
    #[inline]
    pub fn role(&self) -> PageRole {
        PageRole(self.role.load(Ordering::Relaxed))
    }

    #[inline]
    pub(super) fn invalidate(&self) {
        self.role
            .store(self.role().invalidated().0, Ordering::Relaxed);
    }

    /// The page's level.
    #[inline]
    pub fn level(&self) -> Level {
        self.role().level()
    }

    /// The frame of the table the page shadows; if it is direct, the first frame
    /// it maps.
    #[inline]
    pub fn gfn(&self) -> Gfn {
        Gfn(self.gfn.get())
    }

    /// The address of the entries.
    #[inline]
    pub fn hpa(&self) -> Hpa {
        Hpa(self.hpa)
    }

    /// The entries.
    #[inline]
    pub fn entries(&self) -> &Entries {
        // SAFETY: `adopt` stored a valid pointer, and entries live as long as
        // their header, by its contract.
        unsafe { &*self.entries }
    }

    #[inline]
    fn translations(&self) -> Option<&Translations> {
        // SAFETY: As for the entries; only holders of the write lock use it.
        unsafe { self.translations.as_ref() }
    }

    /// The pointer by which the page's owner holds it.
    #[inline]
    pub(super) fn as_ptr(&self) -> PagePtr {
        // INVARIANT: What the reference points to was adopted.
        PagePtr(NonNull::from(self))
    }

    /// The generation of the VM's pages when this page was made.
    #[inline]
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Relaxed)
    }

    /// How many vCPUs use the page as a root.
    #[inline]
    pub fn root_count(&self) -> u32 {
        self.roots.get()
    }

    /// The frame that entry number `index` maps or would map.
    #[inline]
    pub(super) fn gfn_of(&self, index: usize) -> Gfn {
        let role = self.role();
        if role.is_passthrough() {
            return self.gfn();
        }
        match self.translations().and_then(|all| all.get(index)) {
            Some(one) => Gfn(one.get() >> 12),
            None => self.gfn().add((index as u64) << role.level().gfn_shift()),
        }
    }

    /// What the guest's tables grant at entry number `index`.
    #[inline]
    pub(super) fn access_of(&self, index: usize) -> u8 {
        match self.translations().and_then(|all| all.get(index)) {
            Some(one) => (one.get() & 0xf) as u8,
            None => self.role().access(),
        }
    }

    /// Notes what entry number `index` translates to. False if the page's role
    /// says something else.
    #[inline]
    pub(super) fn set_translation(&self, index: usize, gfn: Gfn, access: u8) -> bool {
        if let Some(one) = self.translations().and_then(|all| all.get(index)) {
            one.set(gfn.to_gpa() | u64::from(access));
            return true;
        }
        self.gfn_of(index) == gfn && self.access_of(index) == access
    }

    /// The entries that point to this page.
    #[inline]
    pub(super) fn parents(&self) -> Rmap<'_> {
        Rmap::new(&self.parents)
    }

    /// See [`Page`].
    #[inline]
    pub fn is_unsync(&self) -> bool {
        self.unsync.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn set_unsync(&self, unsync: bool) {
        self.unsync.store(unsync, Ordering::Release);
    }

    /// Some page below this one may be unsync.
    #[inline]
    pub(super) fn has_unsync_children(&self) -> bool {
        self.unsync_children.load(Ordering::Relaxed) != 0
    }

    /// How many pages below are noted as unsync, or as having such below them.
    pub(super) fn unsync_count(&self) -> u32 {
        self.unsync_children.load(Ordering::Relaxed).into()
    }

    /// How many marks there are.
    pub(super) fn unsync_marks(&self) -> u32 {
        let marks = self.unsync_bits.iter().map(|word| word.get().count_ones());
        marks.fold(0, u32::wrapping_add)
    }

    /// There is a mark for entry number `index`.
    pub(super) fn has_unsync_mark(&self, index: usize) -> bool {
        let word = self.unsync_bits.get(index / 64);
        word.is_some_and(|word| word.get() & 1 << (index % 64) != 0)
    }

    /// Notes that the page below entry number `index` is unsync or has such
    /// below it; true if that is the first.
    pub(super) fn mark_unsync_child(&self, index: usize) -> bool {
        let Some(word) = self.unsync_bits.get(index / 64) else {
            return false;
        };
        let bit = 1u64 << (index % 64);
        if word.get() & bit != 0 {
            return false;
        }
        word.set(word.get() | bit);
        let before = self.unsync_children.load(Ordering::Relaxed);
        self.unsync_children
            .store(before.wrapping_add(1), Ordering::Relaxed);
        before == 0
    }

    /// Takes back what [`mark_unsync_child`](Page::mark_unsync_child) noted.
    pub(super) fn clear_unsync_child(&self, index: usize) {
        let Some(word) = self.unsync_bits.get(index / 64) else {
            return;
        };
        let bit = 1u64 << (index % 64);
        if word.get() & bit != 0 {
            word.set(word.get() & !bit);
            let before = self.unsync_children.load(Ordering::Relaxed);
            self.unsync_children
                .store(before.wrapping_sub(1), Ordering::Release);
        }
    }

    /// The first entry, from number `from` on, with an unsync page below.
    #[inline]
    pub(super) fn next_unsync_child(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut mask = u64::MAX.wrapping_shl((from % 64) as u32);
        while let Some(bits) = self.unsync_bits.get(word) {
            let found = bits.get() & mask;
            if found != 0 {
                return Some(word.wrapping_mul(64) | found.trailing_zeros() as usize);
            }
            mask = u64::MAX;
            word = word.wrapping_add(1);
        }
        None
    }

    /// Counts a write to the table; returns how many there were since a walk.
    #[inline]
    pub(super) fn count_write(&self) -> u8 {
        let writes = self.floods.load(Ordering::Relaxed).saturating_add(1);
        self.floods.store(writes, Ordering::Relaxed);
        writes
    }

    /// A walk used the page, so it is a table still.
    #[inline]
    pub(super) fn clear_writes(&self) {
        if self.floods.load(Ordering::Relaxed) != 0 {
            self.floods.store(0, Ordering::Relaxed);
        }
    }

    /// Notes that host MMIO is mapped below this root; true the first time.
    #[inline]
    pub(super) fn note_host_mmio(&self) -> bool {
        !self.host_mmio.swap(true, Ordering::AcqRel)
    }
}

/// A pointer to a shadow page's header.
///
/// # Invariants
///
/// Points to a page that [`adopt`](PagePtr::adopt) set up. A copy that is used to
/// get at the page is held by whoever keeps the page alive: it is not linked yet,
/// or it is a root to which the holder has a reference, or it was looked up in
/// the tables under the lock that the result borrows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct PagePtr(NonNull<Page>);

// SAFETY: A pointer; what it points to is guarded as the module says.
unsafe impl Send for PagePtr {}
// SAFETY: As above.
unsafe impl Sync for PagePtr {}

impl PagePtr {
    /// Takes in a new page.
    ///
    /// # Safety
    ///
    /// `header` points to [`Page`]'s size of zeroed memory, `entries`, whose
    /// physical address is `hpa`, to a page full of [`Spte::NONPRESENT`], and
    /// `translations` to a page. Nobody else uses any of them. All live until the
    /// page is freed by the host's functions.
    #[inline]
    pub unsafe fn adopt(
        header: NonNull<Page>,
        entries: NonNull<Entries>,
        hpa: Hpa,
        translations: Option<NonNull<Translations>>,
    ) -> PagePtr {
        let raw = header.as_ptr();
        #[cfg(feature = "loom")]
        // SAFETY: As below.
        unsafe {
            raw.write(Page::zeroed());
        }
        let translations = translations.map_or(ptr::null(), |all| all.as_ptr().cast_const());
        // SAFETY: The header is ours alone, and zeroes are valid in all fields.
        unsafe {
            ptr::addr_of_mut!((*raw).entries).write(entries.as_ptr());
            ptr::addr_of_mut!((*raw).hpa).write(hpa.0);
            ptr::addr_of_mut!((*raw).translations).write(translations);
        }
        // INVARIANT: By the contract of this function.
        PagePtr(header)
    }

    /// The page with this header.
    ///
    /// # Safety
    ///
    /// `header` comes from [`as_ptr`](PagePtr::as_ptr), and the type's invariants
    /// hold for every copy of the result.
    #[inline]
    pub unsafe fn from_raw(header: NonNull<Page>) -> PagePtr {
        // INVARIANT: By the contract of this function.
        PagePtr(header)
    }

    /// The header.
    #[inline]
    pub fn as_ptr(self) -> NonNull<Page> {
        self.0
    }

    /// The page, under the lock.
    #[inline]
    pub(super) fn page<L: MmuLocked>(self, _lock: &L) -> &Page {
        // SAFETY: Alive by the type's invariants, and until the lock is borrowed
        // exclusively, as the module's text says.
        unsafe { self.0.as_ref() }
    }

    /// The address of the entries.
    #[inline]
    pub fn hpa(self) -> Hpa {
        // SAFETY: Alive by the invariants; constant after `adopt`.
        Hpa(unsafe { ptr::addr_of!((*self.0.as_ptr()).hpa).read() })
    }

    /// The entries.
    #[inline]
    pub fn entries(self) -> NonNull<Entries> {
        // SAFETY: As for `hpa`; `adopt` stored a pointer that is not null.
        unsafe { NonNull::new_unchecked(ptr::addr_of!((*self.0.as_ptr()).entries).read()) }
    }

    /// What the entries translate to; not for direct pages.
    #[inline]
    pub fn translations(self) -> Option<NonNull<Translations>> {
        // SAFETY: As for `hpa`.
        let raw = unsafe { ptr::addr_of!((*self.0.as_ptr()).translations).read() };
        NonNull::new(raw.cast_mut())
    }

    /// The role, without a lock.
    #[inline]
    pub fn role(self) -> PageRole {
        // SAFETY: Alive by the invariants; an atomic.
        let word = unsafe { &*ptr::addr_of!((*self.0.as_ptr()).role) };
        PageRole(word.load(Ordering::Acquire))
    }

    /// The generation, without a lock.
    #[inline]
    pub(super) fn generation(self) -> u8 {
        // SAFETY: As for `role`.
        unsafe { &*ptr::addr_of!((*self.0.as_ptr()).generation) }.load(Ordering::Relaxed)
    }

    /// The page or one below it is unsync, without a lock.
    #[inline]
    pub(super) fn any_unsync(self) -> bool {
        // SAFETY: As for `role`.
        let (this, below) = unsafe {
            (
                &*ptr::addr_of!((*self.0.as_ptr()).unsync),
                &*ptr::addr_of!((*self.0.as_ptr()).unsync_children),
            )
        };
        // Whoever sees that a mark is gone sees that a sync is under way, too.
        this.load(Ordering::Acquire) || below.load(Ordering::Acquire) != 0
    }

    /// See [`Page::clear_writes`]; without a lock, under RCU.
    #[inline]
    pub(super) fn clear_writes(self) {
        // SAFETY: As for `role`.
        let floods = unsafe { &*ptr::addr_of!((*self.0.as_ptr()).floods) };
        floods.store(0, Ordering::Relaxed);
    }
}

/// An entry of a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'l> {
    pub(super) page: &'l Page,
    pub(super) index: usize,
    cell: &'l AtomicU64,
}

impl<'l> Entry<'l> {
    /// Entry number `index`, modulo the size of a page.
    #[inline]
    pub(super) fn new(page: &'l Page, index: usize) -> Entry<'l> {
        let index = index % ENTRIES;
        Entry {
            page,
            index,
            cell: &page.entries()[index],
        }
    }

    /// The entry of `page` for an address.
    #[inline]
    pub(super) fn at(page: &'l Page, addr: u64) -> Entry<'l> {
        Entry::new(page, (addr >> page.level().shift()) as usize)
    }

    #[inline]
    pub(super) fn level(&self) -> Level {
        self.page.level()
    }

    /// The entry's value.
    #[inline]
    pub(super) fn spte(&self) -> Spte {
        Spte(self.cell.load(Ordering::Acquire))
    }

    /// Stores a value in place of one that nobody changes without the lock.
    #[inline]
    pub(super) fn store(&self, new: Spte) {
        self.cell.store(new.0, Ordering::Release);
    }

    /// Stores a value in place of one that may change at any time.
    #[inline]
    pub(super) fn swap(&self, new: Spte) -> Spte {
        Spte(self.cell.swap(new.0, Ordering::AcqRel))
    }

    /// Stores a value if nobody changed the entry.
    #[inline]
    pub(super) fn replace(&self, old: Spte, new: Spte) -> bool {
        self.cell
            .compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Clears bits of a value that may change at any time; returns what it was.
    #[inline]
    pub(super) fn clear(&self, bits: u64) -> Spte {
        Spte(self.cell.fetch_and(!bits, Ordering::AcqRel))
    }

    /// The frame the entry maps or would map.
    #[inline]
    pub(super) fn gfn(&self) -> Gfn {
        self.page.gfn_of(self.index)
    }

    /// Where the entry is.
    #[inline]
    pub(super) fn cell(&self) -> &'l AtomicU64 {
        self.cell
    }

    /// How rmaps refer to the entry.
    #[inline]
    pub(super) fn as_ptr(&self) -> EntryPtr {
        EntryPtr::new(self.cell)
    }
}

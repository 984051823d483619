// SPDX-License-Identifier: GPL-2.0

//! A host for the shadow MMU: slots, pages, descriptors, and vCPUs' TLBs, all of
//! them watched.
//!
//! Pages live in one arena that is never given back, so that a use after free is no
//! undefined behaviour here: a freed page is full of entries that lead nowhere, and
//! looking it up panics.

use super::cpu::Tlb;
use crate::common::format::physical_bits;
use rmmu_engine::mmu::{
    shadow::{
        page::UNSYNC_BITS_OFFSET, AuditHost, Counter, Desc, DescPtr, Maximum, Page, PageEvent,
        PagePtr, PageSource, ShadowHost, SplitCaches, Translations,
    },
    sync::atomic::{AtomicU64, Ordering},
    table::{offset, Entries},
    Flush, Gfn, GfnRange, Host, Hpa, Level, MmuRead, MmuWrite, RcuRead, Spte, SpteFormat, TablePtr,
};
use std::{
    alloc::{alloc_zeroed, dealloc, Layout},
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap},
    ptr::NonNull,
    rc::Rc,
};

const PAGES: usize = 1 << 12;
const HEADER: usize = 184;
/// Present, and leads to a page that never was.
const POISON: u64 = 1 << 11 | 3 | 1 << 44;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    Live,
    Dying,
}

/// A memory slot.
pub struct Slot {
    pub range: GfnRange,
    pub smm: bool,
    /// The heads, by level.
    pub rmaps: [Vec<AtomicU64>; 3],
    tracked: RefCell<HashMap<u64, i32>>,
    lpage: RefCell<HashMap<(u8, u64), i32>>,
    /// Dirty pages are logged.
    pub logged: Cell<bool>,
    /// The log.
    pub dirty: RefCell<BTreeSet<u64>>,
    /// The slot is valid.
    pub valid: Cell<bool>,
    /// It is gone: nobody finds it.
    pub gone: Cell<bool>,
}

impl Slot {
    pub fn new(start: u64, end: u64, smm: bool) -> Slot {
        let heads = |shift: u32| {
            let count = ((end - 1) >> shift) - (start >> shift) + 1;
            (0..count).map(|_| AtomicU64::new(0)).collect()
        };
        Slot {
            range: GfnRange::new(Gfn(start), Gfn(end)),
            smm,
            rmaps: [heads(0), heads(9), heads(18)],
            tracked: RefCell::default(),
            lpage: RefCell::default(),
            logged: Cell::new(false),
            dirty: RefCell::default(),
            valid: Cell::new(true),
            gone: Cell::new(false),
        }
    }

    pub fn head(&self, gfn: Gfn, level: Level) -> Option<&AtomicU64> {
        let shift = level.gfn_shift();
        let index = (gfn.0 >> shift).checked_sub(self.range.start.0 >> shift)?;
        if gfn >= self.range.end {
            return None;
        }
        self.rmaps.get(level.slot())?.get(index as usize)
    }

    pub fn is_tracked(&self, gfn: Gfn) -> bool {
        self.tracked.borrow().get(&gfn.0).is_some_and(|&n| n > 0)
    }

    pub fn lpage_disallowed(&self, gfn: Gfn, level: Level) -> bool {
        let key = (level.get(), gfn.0 >> level.gfn_shift());
        let whole = GfnRange::of(gfn.round_down(level), level);
        self.range.intersect(whole) != whole
            || self.lpage.borrow().get(&key).is_some_and(|&n| n > 0)
    }

    /// Changes how many want writes to a frame tracked.
    pub fn count_tracked(&self, gfn: Gfn, delta: i32) {
        *self.tracked.borrow_mut().entry(gfn.0).or_default() += delta;
    }

    /// Changes how many reasons there are against a huge page.
    pub fn count_lpage(&self, gfn: Gfn, level: Level, delta: i32) {
        let key = (level.get(), gfn.0 >> level.gfn_shift());
        *self.lpage.borrow_mut().entry(key).or_default() += delta;
    }

    /// Panics unless nothing is left of the MMU.
    pub fn assert_unused(&self) {
        for rmaps in &self.rmaps {
            for head in rmaps {
                assert_eq!(head.load(Ordering::Relaxed), 0, "a reverse map is left");
            }
        }
        for (gfn, n) in self.tracked.borrow().iter() {
            assert_eq!(*n, 0, "writes to {gfn:#x} are still tracked");
        }
        for (key, n) in self.lpage.borrow().iter() {
            assert_eq!(*n, 0, "no huge page at {key:?}");
        }
    }
}

/// See the module.
pub struct Machine {
    format: SpteFormat,
    /// The CPU logs what it writes.
    pub pml: bool,
    arena: NonNull<u8>,
    /// Where the arena is, as the tables have it.
    first_hpa: u64,
    headers: NonNull<u8>,
    states: RefCell<Vec<State>>,
    free: RefCell<Vec<usize>>,
    has_translations: RefCell<Vec<bool>>,
    dying: RefCell<Vec<PagePtr>>,
    readers: Cell<u32>,
    pub descs: Cell<i64>,
    pub slots: Vec<Slot>,
    /// The vCPUs' TLBs.
    pub tlbs: RefCell<Vec<Tlb>>,
    pub counters: RefCell<HashMap<Counter, i64>>,
    pub maxima: RefCell<HashMap<Maximum, u64>>,
    pub accounted: Cell<i64>,
    pub indirect: Cell<i64>,
    pub leaves: [Cell<i64>; 5],
    pub nx_splits: Cell<i64>,
    pub nx: Cell<bool>,
    /// L1 pages of nested guests are zapped with their parents.
    pub recursive_zap: Cell<bool>,
    /// One of so many questions whether to yield is answered with yes; 0 never.
    pub break_every: Cell<u64>,
    asked: Cell<u64>,
    pub yields: Cell<u64>,
    pub flushes: Cell<u64>,
    pub roots_zapped: Cell<u64>,
    /// All memory is a device's of the host.
    pub host_mmio: Cell<bool>,
    /// Times that the host was told of such mappings below a root that is a page, and below others.
    pub mmio_mapped: Cell<u64>,
    pub mmio_mapped_without_root: Cell<u64>,
    /// Called in the middle of operations, whenever the engine lets something be known:
    /// whoever does not hold the lock may look then.
    pub observer: RefCell<Option<Observer>>,
    bugs: RefCell<Vec<&'static str>>,
    /// A test that expects one takes it.
    pub warnings: RefCell<Vec<&'static str>>,
}

/// Somebody without the lock.
pub type Observer = Rc<dyn Fn(&Machine, Option<PageEvent<'_>>)>;

fn arena_layout() -> Layout {
    // Entries first, then translations.
    Layout::from_size_align(2 * PAGES * 4096, 4096).unwrap()
}

fn headers_layout() -> Layout {
    Layout::from_size_align(PAGES * HEADER, 8).unwrap()
}

/// A guard of the fake RCU.
pub struct FakeRcu<'a>(&'a Machine);

// SAFETY: Pages that are freed while a guard lives are kept until it is gone.
unsafe impl RcuRead for FakeRcu<'_> {}

impl Drop for FakeRcu<'_> {
    fn drop(&mut self) {
        self.0.readers.set(self.0.readers.get() - 1);
        self.0.end_grace_period();
    }
}

impl Machine {
    pub fn new(format: SpteFormat, slots: Vec<Slot>, vcpus: usize) -> Machine {
        // SAFETY: The layouts are not empty.
        let (arena, headers) = unsafe {
            (
                NonNull::new(alloc_zeroed(arena_layout())).unwrap(),
                NonNull::new(alloc_zeroed(headers_layout())).unwrap(),
            )
        };
        // What is free is poisoned, so that nobody walks into it.
        for i in 0..PAGES * 512 {
            // SAFETY: Within the arena.
            unsafe { arena.cast::<u64>().add(i).write(POISON) };
        }
        Machine {
            first_hpa: 1 << (physical_bits(&format) - 1).min(40),
            format,
            pml: false,
            arena,
            headers,
            states: RefCell::new(vec![State::Free; PAGES]),
            free: RefCell::new((0..PAGES).rev().collect()),
            has_translations: RefCell::new(vec![false; PAGES]),
            dying: RefCell::default(),
            readers: Cell::new(0),
            descs: Cell::new(0),
            slots,
            tlbs: RefCell::new((0..vcpus).map(|_| Tlb::default()).collect()),
            counters: RefCell::default(),
            maxima: RefCell::default(),
            accounted: Cell::new(0),
            indirect: Cell::new(0),
            leaves: Default::default(),
            nx_splits: Cell::new(0),
            nx: Cell::new(false),
            recursive_zap: Cell::new(false),
            break_every: Cell::new(0),
            asked: Cell::new(0),
            yields: Cell::new(0),
            flushes: Cell::new(0),
            roots_zapped: Cell::new(0),
            host_mmio: Cell::new(false),
            mmio_mapped: Cell::new(0),
            mmio_mapped_without_root: Cell::new(0),
            observer: RefCell::default(),
            bugs: RefCell::default(),
            warnings: RefCell::default(),
        }
    }

    /// Runs `f` with the lock held for write.
    pub fn write<R>(&self, f: impl FnOnce(&mut MmuWrite<'_>) -> R) -> R {
        // SAFETY: There is one thread.
        f(&mut unsafe { MmuWrite::assume_held() })
    }

    /// Runs `f` with the lock held for read.
    pub fn read<R>(&self, f: impl FnOnce(&MmuRead<'_>) -> R) -> R {
        // SAFETY: There is one thread.
        f(&unsafe { MmuRead::assume_held() })
    }

    fn observe(&self, event: Option<PageEvent<'_>>) {
        let observer = self.observer.borrow().clone();
        if let Some(observer) = observer {
            observer(self, event);
        }
    }

    pub fn bugs(&self) -> Vec<&'static str> {
        self.bugs.borrow().clone()
    }

    pub fn counter(&self, counter: Counter) -> i64 {
        self.counters.borrow().get(&counter).copied().unwrap_or(0)
    }

    /// How many pages exist.
    pub fn live_pages(&self) -> usize {
        let states = self.states.borrow();
        states.iter().filter(|&&state| state == State::Live).count()
    }

    /// Takes away what a page knows of unsync pages below, but for their number.
    pub fn clear_unsync_marks(&self, hpa: Hpa) {
        let header = self.page(hpa).as_ptr().cast::<u64>();
        // SAFETY: Within the header, of which the marks are eight words.
        unsafe {
            header.byte_add(UNSYNC_BITS_OFFSET).write_bytes(0, 8);
        }
    }

    /// Panics unless all is as it was before there was an MMU.
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.bugs(), Vec::<&str>::new());
        assert_eq!(*self.warnings.borrow(), Vec::<&str>::new());
        assert_eq!(self.live_pages(), 0, "pages leaked");
        assert_eq!(self.descs.get(), 0, "descriptors leaked");
        assert_eq!(self.accounted.get(), 0, "pages accounted");
        assert_eq!(self.indirect.get(), 0, "indirect pages accounted");
        assert_eq!(self.counter(Counter::Unsync), 0, "unsync pages");
        assert_eq!(self.nx_splits.get(), 0, "NX candidates");
        for leaves in &self.leaves {
            assert_eq!(leaves.get(), 0, "leaves accounted");
        }
        for slot in &self.slots {
            slot.assert_unused();
        }
    }

    fn index(&self, hpa: Hpa) -> usize {
        let index = (hpa.0.wrapping_sub(self.first_hpa) >> 12) as usize;
        let states = self.states.borrow();
        assert!(
            index < PAGES && states[index] != State::Free,
            "the engine walks into freed memory at {hpa:x?}"
        );
        index
    }

    fn entries_at(&self, index: usize) -> NonNull<Entries> {
        // SAFETY: Within the arena.
        unsafe { self.arena.add(index * 4096).cast() }
    }

    fn header_at(&self, index: usize) -> NonNull<Page> {
        // SAFETY: Within the headers.
        unsafe { self.headers.add(index * HEADER).cast() }
    }

    /// The page at an address, which is alive.
    pub fn page(&self, hpa: Hpa) -> PagePtr {
        // SAFETY: It was adopted when it was taken.
        unsafe { PagePtr::from_raw(self.header_at(self.index(hpa))) }
    }

    /// An entry of a page.
    pub fn entry(&self, hpa: Hpa, index: usize) -> &AtomicU64 {
        // SAFETY: The arena lives as long as the machine.
        let entries = unsafe { self.entries_at(self.index(hpa)).as_ref() };
        &entries[index]
    }

    /// The address of an entry, as reverse maps have it.
    pub fn entry_address(&self, hpa: Hpa, index: usize) -> u64 {
        std::ptr::from_ref(self.entry(hpa, index)).addr() as u64
    }

    /// What an entry translates to, if the page keeps that.
    pub fn translation(&self, hpa: Hpa, index: usize) -> Option<u64> {
        let all = self.page(hpa).translations()?;
        // SAFETY: As for entries.
        Some(unsafe { all.as_ref() }[index].get())
    }

    fn take(&self, translations: bool) -> Option<PagePtr> {
        let index = self.free.borrow_mut().pop()?;
        self.states.borrow_mut()[index] = State::Live;
        self.has_translations.borrow_mut()[index] = translations;
        // SAFETY: The page was free, so its memory is nobody's.
        unsafe {
            self.header_at(index).cast::<u8>().write_bytes(0, HEADER);
            let entries = self.entries_at(index);
            for i in 0..512 {
                entries.cast::<u64>().add(i).write(Spte::NONPRESENT.0);
            }
            let room = self
                .arena
                .add((PAGES + index) * 4096)
                .cast::<Translations>();
            let hpa = Hpa(self.first_hpa + ((index as u64) << 12));
            let translations = translations.then_some(room);
            Some(PagePtr::adopt(
                self.header_at(index),
                entries,
                hpa,
                translations,
            ))
        }
    }

    fn free_page(&self, page: PagePtr) {
        let hpa = page.hpa();
        let index = self.index(hpa);
        for tlb in self.tlbs.borrow().iter() {
            assert!(
                !tlb.may_walk(hpa),
                "a page is freed that hardware may still walk"
            );
        }
        for i in 0..512 {
            let spte = Spte(self.entry(hpa, i).load(Ordering::Relaxed));
            assert!(!spte.is_present(), "a page is freed that maps something");
            self.entry(hpa, i).store(POISON, Ordering::Relaxed);
        }
        self.states.borrow_mut()[index] = State::Free;
        self.free.borrow_mut().push(index);
    }

    fn end_grace_period(&self) {
        if self.readers.get() == 0 {
            for page in self.dying.take() {
                self.free_page(page);
            }
        }
    }

    /// The slot of `gfn` that vCPUs see.
    pub fn valid_slot(&self, gfn: Gfn) -> Option<&Slot> {
        self.slot(false, gfn).filter(|slot| slot.valid.get())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: Allocated with these layouts.
        unsafe {
            dealloc(self.arena.as_ptr(), arena_layout());
            dealloc(self.headers.as_ptr(), headers_layout());
        }
    }
}

// SAFETY: There are no TDP tables, so that none is found; entries of shadow pages
// are found by their address and live as long as the machine.
unsafe impl Host for Machine {
    type Slot = Slot;
    type Rcu<'a> = FakeRcu<'a>;

    fn rcu_read(&self) -> FakeRcu<'_> {
        self.readers.set(self.readers.get() + 1);
        FakeRcu(self)
    }

    fn format(&self) -> &SpteFormat {
        &self.format
    }

    fn pml(&self) -> bool {
        self.pml
    }

    fn table_of(&self, _hpa: Hpa) -> TablePtr {
        panic!("there are no TDP tables")
    }

    fn entries_of(&self, hpa: Hpa) -> NonNull<Entries> {
        self.entries_at(self.index(hpa))
    }

    fn alloc_table(&self) -> Option<TablePtr> {
        None
    }

    fn free_table_now(&self, _table: TablePtr) {}

    fn free_table_rcu(&self, _table: TablePtr) {}

    fn account_table(&self, _table: TablePtr, _delta: i32) {}

    fn account_leaf(&self, level: Level, delta: i64) {
        let leaves = &self.leaves[level.slot()];
        leaves.set(leaves.get() + delta);
        self.observe(None);
    }

    fn account_nx_split(&self, delta: i64) {
        self.nx_splits.set(self.nx_splits.get() + delta);
    }

    fn flush_all(&self) {
        self.observe(None);
        self.flushes.set(self.flushes.get() + 1);
        for tlb in self.tlbs.borrow_mut().iter_mut() {
            tlb.flush();
        }
    }

    fn flush_range(&self, _range: GfnRange) {
        self.flush_all();
    }

    fn need_break(&self) -> bool {
        let asked = self.asked.get() + 1;
        self.asked.set(asked);
        asked.checked_rem(self.break_every.get()) == Some(0)
    }

    fn relax_read(&self, _lock: &mut MmuRead<'_>) {}

    fn relax_write(&self, _lock: &mut MmuWrite<'_>) {
        self.yields.set(self.yields.get() + 1);
    }

    fn unlock_relock_read<R>(&self, _lock: &mut MmuRead<'_>, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn unlock_relock_write<R>(&self, _lock: &mut MmuWrite<'_>, f: impl FnOnce() -> R) -> R {
        self.yields.set(self.yields.get() + 1);
        f()
    }

    fn with_pages_lock<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn mark_dirty(&self, slot: &Slot, gfn: Gfn) {
        slot.dirty.borrow_mut().insert(gfn.0);
    }

    fn nx_huge_pages(&self) -> bool {
        self.nx.get()
    }

    fn host_mmio_mapped(&self) {
        self.mmio_mapped.set(self.mmio_mapped.get() + 1);
    }

    fn bug(&self, what: &'static str) {
        self.bugs.borrow_mut().push(what);
    }

    fn warn(&self, what: &'static str) {
        self.warnings.borrow_mut().push(what);
    }
}

// SAFETY: Pages come from `adopt`, one owner each, and are found by where they are;
// the arena lives as long as the machine.
unsafe impl ShadowHost for Machine {
    fn page_of(&self, hpa: Hpa) -> PagePtr {
        self.page(hpa)
    }

    fn page_at(&self, entries: NonNull<Entries>) -> PagePtr {
        let offset = entries.addr().get() - self.arena.addr().get();
        self.page(Hpa(self.first_hpa + offset as u64))
    }

    fn free_page_rcu(&self, page: PagePtr) {
        let index = self.index(page.hpa());
        let before = std::mem::replace(&mut self.states.borrow_mut()[index], State::Dying);
        assert_eq!(before, State::Live, "a page is freed twice");
        self.dying.borrow_mut().push(page);
        self.end_grace_period();
    }

    fn free_desc(&self, desc: DescPtr) {
        self.descs.set(self.descs.get() - 1);
        // SAFETY: It came from a box, and nobody is left to use it.
        drop(unsafe { Box::from_raw(desc.as_ptr().as_ptr().cast::<[u64; 16]>()) });
    }

    fn account_page(&self, _page: PagePtr, delta: i32) {
        self.accounted.set(self.accounted.get() + i64::from(delta));
        self.observe(None);
    }

    fn account_indirect(&self, delta: i64) {
        self.indirect.set(self.indirect.get() + delta);
    }

    fn slot(&self, smm: bool, gfn: Gfn) -> Option<&Slot> {
        let mut slots = self.slots.iter();
        slots.find(|slot| slot.smm == smm && slot.range.contains(gfn) && !slot.gone.get())
    }

    fn slot_range(&self, slot: &Slot) -> GfnRange {
        slot.range
    }

    fn rmap<'s>(&'s self, slot: &'s Slot, gfn: Gfn, level: Level) -> Option<&'s AtomicU64> {
        slot.head(gfn, level)
    }

    fn write_tracked(&self, slot: &Slot, gfn: Gfn) -> bool {
        slot.is_tracked(gfn)
    }

    fn track_writes(&self, slot: &Slot, gfn: Gfn, delta: i32) {
        let mut tracked = slot.tracked.borrow_mut();
        let count = tracked.entry(gfn.0).or_default();
        *count += delta;
        assert!(*count >= 0, "writes to {gfn:?} are tracked less than never");
    }

    fn disallow_lpage(&self, slot: &Slot, gfn: Gfn, delta: i32) {
        for level in [Level::L2M, Level::L1G] {
            let key = (level.get(), gfn.0 >> level.gfn_shift());
            let mut lpage = slot.lpage.borrow_mut();
            let count = lpage.entry(key).or_default();
            *count += delta;
            assert!(*count >= 0, "huge pages at {gfn:?} are too much allowed");
        }
    }

    fn lpage_allowed(&self, slot: &Slot, gfn: Gfn) -> bool {
        !slot.lpage_disallowed(gfn, Level::L2M)
    }

    fn protect_in_tdp(&self, _lock: &MmuWrite<'_>, _slot: &Slot, _gfn: Gfn) -> Flush {
        Flush::none()
    }

    fn dirty_logged(&self, slot: &Slot) -> bool {
        slot.logged.get()
    }

    fn with_unsync_lock<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn host_mmio_mapped_without_root(&self) {
        self.mmio_mapped_without_root
            .set(self.mmio_mapped_without_root.get() + 1);
    }

    fn root_zapped(&self) {
        self.roots_zapped.set(self.roots_zapped.get() + 1);
    }

    fn recursive_nested_zap(&self) -> bool {
        self.recursive_zap.get()
    }

    fn trace_page(&self, event: PageEvent<'_>) {
        self.observe(Some(event));
    }

    fn count(&self, counter: Counter, by: i64) {
        *self.counters.borrow_mut().entry(counter).or_default() += by;
        self.observe(None);
    }

    fn maximum(&self, what: Maximum, n: u64) {
        let mut maxima = self.maxima.borrow_mut();
        let place = maxima.entry(what).or_default();
        *place = n.max(*place);
    }
}

impl AuditHost for Machine {
    fn claimed_header(&self, entries: u64) -> Option<(u64, Gfn)> {
        let offset = entries.checked_sub(self.arena.addr().get() as u64)?;
        let index = (offset >> 12) as usize;
        if index >= PAGES {
            return None;
        }
        // As the kernel may find it: the page of a header that is in use no more.
        let header = self.header_at(index);
        // SAFETY: Within the headers, which live as long as the machine.
        let gfn = unsafe { header.cast::<u64>().byte_add(offset::GFN).read() };
        Some((header.addr().get() as u64, Gfn(gfn)))
    }

    fn address_of(&self, hpa: Hpa) -> u64 {
        (self.arena.addr().get() as u64).wrapping_add(hpa.0.wrapping_sub(self.first_hpa))
    }

    fn lpage_count(&self, slot: &Slot, gfn: Gfn, level: Level) -> Option<(i64, i64)> {
        let lpage = slot.lpage.borrow();
        let count = lpage.get(&(level.get(), gfn.0 >> level.gfn_shift()));
        Some((count.copied().unwrap_or(0).into(), 0))
    }

    fn write_track_count(&self, slot: &Slot, gfn: Gfn) -> Option<i64> {
        let tracked = slot.tracked.borrow();
        Some(tracked.get(&gfn.0).copied().unwrap_or(0).into())
    }

    fn others_track_writes(&self) -> bool {
        false
    }

    fn is_smm_slot(&self, slot: &Slot) -> bool {
        slot.smm
    }
}

/// Caches that hold so much, or what the machine has.
pub struct Caches<'m> {
    pub machine: &'m Machine,
    pub pages: u64,
    pub descs: u64,
    /// What filling them makes of them; nothing if memory is short.
    pub refill: Option<(u64, u64)>,
    /// How often they were filled.
    pub fills: u64,
}

impl<'m> Caches<'m> {
    /// What a vCPU has at the beginning of a fault.
    pub fn full(machine: &'m Machine) -> Caches<'m> {
        Caches {
            machine,
            pages: 5,
            descs: 14,
            refill: None,
            fills: 0,
        }
    }
}

// SAFETY: What they give is fresh.
unsafe impl PageSource for Caches<'_> {
    fn take_page(&mut self, translations: bool) -> Option<PagePtr> {
        self.pages = self.pages.checked_sub(1)?;
        self.machine.take(translations)
    }

    fn take_desc(&mut self) -> Option<DescPtr> {
        self.descs = self.descs.checked_sub(1)?;
        self.machine.descs.set(self.machine.descs.get() + 1);
        let memory = NonNull::from(Box::leak(Box::new([0u64; 16])));
        // SAFETY: Fresh memory of the size of a descriptor, freed by `free_desc`.
        Some(unsafe { DescPtr::adopt(memory.cast::<Desc>()) })
    }
}

impl SplitCaches for Caches<'_> {
    fn ready(&self) -> bool {
        self.pages >= 1 && self.descs >= 513
    }

    fn top_up(&mut self) -> bool {
        let Some((pages, descs)) = self.refill else {
            return false;
        };
        self.fills += 1;
        self.pages = self.pages.max(pages);
        self.descs = self.descs.max(descs);
        true
    }
}

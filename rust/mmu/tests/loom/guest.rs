// SPDX-License-Identifier: GPL-2.0

//! What shadow paging adds to the machine: the guest's own tables, the pages that
//! shadow them, and vCPUs whose hardware walks those.
//!
//! The guest's loads and stores order nothing. Through which of the TDP MMU's entries
//! its CPUs write to a table is a flag for each frame here: the protocol of these
//! entries has models of its own.

use crate::{
    cpu::Cpu,
    machine::{Gone, Slot, POISON},
    memory::FRAMES,
};
use loom::sync::{Mutex, MutexGuard};
use rmmu_engine::mmu::{
    shadow::{
        Buckets, Counter, Desc, DescPtr, GuestLeaf, GuestTables, Maximum, Page, PageEvent, PagePtr,
        PageRole, PageSource, ShadowHost, ShadowVcpu, Translations, GROUP,
    },
    sync::{
        atomic::{AtomicU64, Ordering},
        cell::Cell,
    },
    types::ACC_ALL,
    Entries, Flush, Gfn, GfnRange, Host, Hpa, Level, MmuWrite, Pfn, Spte, ENTRIES,
};
use std::{
    alloc::{alloc_zeroed, dealloc, Layout},
    mem::MaybeUninit,
    ptr::{self, NonNull},
    sync::Mutex as Plain,
};

const FIRST_HPA: u64 = 1 << 41;

/// An entry of the guest that leads to a frame, or to a table.
pub fn to(gfn: u64) -> u64 {
    gfn << 12 | 1
}

/// The frame that an entry of the guest leads to.
pub fn target(entry: u64) -> Option<u64> {
    (entry & 1 != 0).then_some(entry >> 12)
}

/// See the module.
#[derive(Default)]
pub struct Guest {
    /// The entries of tables, by frame and index.
    ram: Vec<AtomicU64>,
    /// By frame, whether the TDP MMU lets CPUs write to it.
    writable: Vec<AtomicU64>,
    /// By level and frame.
    rmaps: Vec<AtomicU64>,
    unsync_lock: Mutex<()>,
    vcpus: Vec<Mutex<Hardware>>,
    // No operation of loom happens while one of the plain ones is locked.
    pages: Plain<Vec<Frame>>,
    counts: Plain<Counts>,
    buckets: Option<HashTable>,
}

#[derive(Default)]
struct Counts {
    /// By frame, who wants writes to it tracked.
    tracked: [i32; FRAMES as usize],
    /// By frame, reasons for mapping it by small pages.
    small: [i32; FRAMES as usize],
    pages: i64,
    descs: i64,
    unsync: i64,
}

struct Frame {
    place: NonNull<Place>,
    state: State,
}

// SAFETY: The place is owned by the machine; access to it is for the engine to order.
unsafe impl Send for Frame {}

struct HashTable(NonNull<Buckets>);

// SAFETY: Only the address is used here; what is there is for the engine to guard.
unsafe impl Send for HashTable {}
// SAFETY: As above.
unsafe impl Sync for HashTable {}

// The engine finds a page by the address of an entry.
#[repr(C, align(64))]
struct Place {
    entries: MaybeUninit<Entries>,
    header: MaybeUninit<Page>,
    translations: Translations,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Live,
    Dying,
    Free,
}

/// What an access of the guest came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Hit(u64),
    Fault,
    /// The vCPU has to look for roots before it may enter the guest.
    Obsolete,
}

/// A vCPU's hardware. An access is one step for those who flush.
#[derive(Default)]
pub struct Hardware {
    /// The frame of the guest's root table.
    pub cr3: u64,
    pub root: Option<PagePtr>,
    /// Roots were zapped or are about to be: look before the guest is entered.
    pub obsolete: bool,
    /// Translations, by virtual page.
    leaves: Vec<(u64, Spte)>,
    /// Pages that may be walked without a look at what leads there.
    pages: Vec<Hpa>,
    /// Frames that the guest may write to without a look at the TDP MMU's entry.
    writable: Vec<u64>,
}

impl Hardware {
    /// Forgets all translations.
    pub fn flush(&mut self) {
        self.leaves.clear();
        self.pages.clear();
        self.writable.clear();
    }

    /// The guest may write at a virtual page without a look at the entry.
    pub fn may_write(&self, page: u64) -> bool {
        let mut leaves = self.leaves.iter();
        leaves.any(|leaf| leaf.0 == page && leaf.1.is_writable())
    }

    /// The guest reads at a virtual page.
    pub fn read(&mut self, cpu: &Cpu<'_>, page: u64) -> Access {
        if self.obsolete {
            return Access::Obsolete;
        }
        let found = self.leaves.iter().find(|leaf| leaf.0 == page);
        let spte = match found.copied() {
            Some((_, spte)) => spte,
            None => match self.walk(cpu, page) {
                Some(spte) => spte,
                None => return Access::Fault,
            },
        };
        let pfn = spte.pfn(cpu.format());
        cpu.machine.memory.access(pfn, false);
        Access::Hit(pfn.0 % FRAMES)
    }

    fn walk(&mut self, cpu: &Cpu<'_>, page: u64) -> Option<Spte> {
        let (guest, format) = (&cpu.machine.guest, cpu.format());
        let root = self.root.expect("a vCPU without a root must not run");
        let (mut hpa, mut level) = (root.hpa(), root.role().level());
        loop {
            let entries = guest.page_at(hpa).expect("a page").entries();
            self.pages.push(hpa);
            // SAFETY: It was not freed, as was just seen, and the machine checks that
            // no page is which hardware may walk.
            let cell = &unsafe { entries.as_ref() }[Gfn(page).index(level)];
            let spte = Spte(cell.load(Ordering::Acquire));
            if spte.raw() & 1 == 0 || spte.is_mmio(format) {
                return None;
            }
            match level.child() {
                Some(child) if spte.is_nonleaf(level) => {
                    (hpa, level) = (spte.hpa(format), child);
                }
                _ => {
                    self.leaves.push((page, spte));
                    return Some(spte);
                }
            }
        }
    }

    /// The guest writes an entry of a table; false if it may not.
    pub fn write(&mut self, guest: &Guest, table: u64, index: usize, entry: u64) -> bool {
        if !self.writable.contains(&table) {
            if guest.writable[table as usize].load(Ordering::Acquire) == 0 {
                return false;
            }
            self.writable.push(table);
        }
        guest.store(table, index, entry);
        true
    }
}

impl Guest {
    /// There is no guest with tables.
    pub fn none() -> Guest {
        Guest::default()
    }

    /// A guest with so many CPUs, all of whose tables are empty.
    pub fn new(cpus: usize) -> Guest {
        let zeroes = |count: u64| (0..count).map(|_| AtomicU64::new(0)).collect();
        // SAFETY: The layout is not empty.
        let buckets = unsafe { alloc_zeroed(Layout::new::<Buckets>()) };
        Guest {
            ram: zeroes(FRAMES * ENTRIES as u64),
            writable: zeroes(FRAMES),
            rmaps: zeroes(FRAMES * 3),
            vcpus: (0..cpus).map(|_| Mutex::default()).collect(),
            buckets: NonNull::new(buckets.cast()).map(HashTable),
            unsync_lock: Mutex::default(),
            pages: Plain::default(),
            counts: Plain::default(),
        }
    }

    /// An empty hash table.
    pub fn buckets(&self) -> NonNull<Buckets> {
        self.buckets.as_ref().expect("there is a guest").0
    }

    /// A vCPU's hardware, between two accesses of its guest.
    pub fn vcpu(&self, cpu: usize) -> MutexGuard<'_, Hardware> {
        self.vcpus[cpu].lock().unwrap()
    }

    /// Interrupts the vCPUs one after the other.
    pub fn for_each_vcpu(&self, f: impl Fn(&mut Hardware)) {
        for vcpu in &self.vcpus {
            f(&mut vcpu.lock().unwrap());
        }
    }

    pub fn flush_all(&self) {
        self.for_each_vcpu(Hardware::flush);
    }

    pub fn load(&self, table: u64, index: usize) -> u64 {
        self.ram[table as usize * ENTRIES + index].load(Ordering::Relaxed)
    }

    pub fn store(&self, table: u64, index: usize, entry: u64) {
        self.ram[table as usize * ENTRIES + index].store(entry, Ordering::Relaxed);
    }

    /// The TDP MMU lets CPUs write to a frame.
    pub fn allow_writes(&self, gfn: u64) {
        // The engine says that what it marked before is seen by who sees this.
        self.writable[gfn as usize].store(1, Ordering::Relaxed);
    }

    /// The page at an address, whether it is on its way out or not; none if that is
    /// no page's.
    pub fn page_at(&self, hpa: Hpa) -> Option<PagePtr> {
        let index = hpa.0.checked_sub(FIRST_HPA)? >> 12;
        let pages = self.pages.lock().unwrap();
        let frame = pages.get(index as usize).expect("a page that never was");
        assert_ne!(
            frame.state,
            State::Free,
            "somebody walks into freed memory at {hpa:x?}"
        );
        // SAFETY: `alloc` adopted the header.
        Some(unsafe { PagePtr::from_raw(header(frame.place)) })
    }

    fn alloc(&self, translations: bool) -> PagePtr {
        let place = NonNull::from(Box::leak(Box::new(Place {
            entries: MaybeUninit::uninit(),
            header: MaybeUninit::uninit(),
            translations: core::array::from_fn(|_| Cell::new(0)),
        })));
        for cell in cells(place) {
            // SAFETY: The place is ours alone.
            unsafe { cell.write(AtomicU64::new(Spte::NONPRESENT.raw())) };
        }
        let mut pages = self.pages.lock().unwrap();
        let hpa = Hpa(FIRST_HPA + ((pages.len() as u64) << 12));
        pages.push(Frame {
            place,
            state: State::Live,
        });
        drop(pages);
        // SAFETY: Places live as long as the machine.
        let all =
            unsafe { NonNull::new_unchecked(ptr::addr_of_mut!((*place.as_ptr()).translations)) };
        // SAFETY: The place is fresh and stays where it is.
        unsafe {
            PagePtr::adopt(
                header(place),
                entries(place),
                hpa,
                translations.then_some(all),
            )
        }
    }

    fn set_state(&self, page: PagePtr, from: &[State], to: State) -> NonNull<Place> {
        let mut pages = self.pages.lock().unwrap();
        let frame = &mut pages[((page.hpa().0 - FIRST_HPA) >> 12) as usize];
        assert!(from.contains(&frame.state), "a page is freed twice");
        frame.state = to;
        frame.place
    }

    /// Frees a page that nobody can be using.
    pub fn free(&self, page: PagePtr) {
        for vcpu in &self.vcpus {
            assert!(
                !vcpu.lock().unwrap().pages.contains(&page.hpa()),
                "a page is freed that hardware may still walk"
            );
        }
        let place = self.set_state(page, &[State::Live, State::Dying], State::Free);
        for cell in cells(place) {
            // SAFETY: Nobody else is using the cell. If that is not so, loom has it in
            // its books: here, or at the use to come.
            unsafe {
                (*cell).store(POISON, Ordering::Relaxed);
                (*cell).with_mut(|_| ());
            }
        }
    }

    /// Panics unless all is as it was before there was an MMU.
    pub fn assert_nothing_left(&self) {
        let counts = self.counts.lock().unwrap();
        let frames = [0; FRAMES as usize];
        assert_eq!((counts.tracked, counts.small), (frames, frames));
        assert_eq!((counts.pages, counts.descs, counts.unsync), (0, 0, 0));
        for frame in self.pages.lock().unwrap().iter() {
            assert_eq!(frame.state, State::Free, "a page leaks");
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for frame in self.pages.get_mut().unwrap().drain(..) {
            // SAFETY: It came from a box, and the threads of the model are gone.
            drop(unsafe { Box::from_raw(frame.place.as_ptr()) });
        }
        if let Some(HashTable(buckets)) = self.buckets {
            // SAFETY: Allocated with this layout.
            unsafe { dealloc(buckets.as_ptr().cast(), Layout::new::<Buckets>()) };
        }
    }
}

fn header(place: NonNull<Place>) -> NonNull<Page> {
    // SAFETY: Places live as long as the machine.
    unsafe { NonNull::new_unchecked(ptr::addr_of_mut!((*place.as_ptr()).header)).cast() }
}

fn entries(place: NonNull<Place>) -> NonNull<Entries> {
    // SAFETY: As above.
    unsafe { NonNull::new_unchecked(ptr::addr_of_mut!((*place.as_ptr()).entries)).cast() }
}

fn cells(place: NonNull<Place>) -> impl Iterator<Item = *mut AtomicU64> {
    let first = entries(place).as_ptr().cast::<AtomicU64>();
    // SAFETY: There are that many.
    (0..ENTRIES).map(move |i| unsafe { first.add(i) })
}

// SAFETY: Pages come from `adopt`, one owner each; they are found by where they are,
// and their memory lives as long as the machine.
unsafe impl ShadowHost for Cpu<'_> {
    fn page_of(&self, hpa: Hpa) -> PagePtr {
        self.machine.guest.page_at(hpa).expect("a shadow page")
    }

    fn page_at(&self, at: NonNull<Entries>) -> PagePtr {
        let pages = self.machine.guest.pages.lock().unwrap();
        let index = pages.iter().position(|frame| entries(frame.place) == at);
        drop(pages);
        self.page_of(Hpa(
            FIRST_HPA + ((index.expect("a page's entries") as u64) << 12)
        ))
    }

    fn free_page_rcu(&self, page: PagePtr) {
        let machine = self.machine;
        machine.guest.set_state(page, &[State::Live], State::Dying);
        machine.free_all(machine.rcu.give_up(Gone::Page(page)));
    }

    fn free_desc(&self, desc: DescPtr) {
        self.machine.guest.counts.lock().unwrap().descs -= 1;
        // SAFETY: It came from a box, and nobody is left to use it.
        drop(unsafe { Box::from_raw(desc.as_ptr().as_ptr().cast::<[u64; 16]>()) });
    }

    fn account_page(&self, _page: PagePtr, delta: i32) {
        self.machine.guest.counts.lock().unwrap().pages += i64::from(delta);
    }

    fn account_indirect(&self, _delta: i64) {}

    fn slot(&self, _smm: bool, gfn: Gfn) -> Option<&Slot> {
        (gfn.0 < FRAMES).then_some(&self.machine.slot)
    }

    fn slot_range(&self, _slot: &Slot) -> GfnRange {
        GfnRange::new(Gfn(0), Gfn(FRAMES))
    }

    fn rmap<'s>(&'s self, _slot: &'s Slot, gfn: Gfn, level: Level) -> Option<&'s AtomicU64> {
        let index = level.slot() as u64 * FRAMES + gfn.0;
        self.machine.guest.rmaps.get(index as usize)
    }

    fn write_tracked(&self, _slot: &Slot, gfn: Gfn) -> bool {
        self.machine.guest.counts.lock().unwrap().tracked[gfn.0 as usize] > 0
    }

    fn track_writes(&self, _slot: &Slot, gfn: Gfn, delta: i32) {
        self.machine.guest.counts.lock().unwrap().tracked[gfn.0 as usize] += delta;
    }

    fn disallow_lpage(&self, _slot: &Slot, gfn: Gfn, delta: i32) {
        self.machine.guest.counts.lock().unwrap().small[gfn.0 as usize] += delta;
    }

    fn lpage_allowed(&self, _slot: &Slot, gfn: Gfn) -> bool {
        self.machine.guest.counts.lock().unwrap().small[gfn.0 as usize] == 0
    }

    fn protect_in_tdp(&self, _lock: &MmuWrite<'_>, _slot: &Slot, gfn: Gfn) -> Flush {
        let entry = &self.machine.guest.writable[gfn.0 as usize];
        Flush::when(entry.swap(0, Ordering::AcqRel) != 0)
    }

    fn dirty_logged(&self, _slot: &Slot) -> bool {
        false
    }

    fn with_unsync_lock<R>(&self, f: impl FnOnce() -> R) -> R {
        let _guard = self.machine.guest.unsync_lock.lock().unwrap();
        f()
    }

    fn host_mmio_mapped_without_root(&self) {}

    fn root_zapped(&self) {
        // They are out of the guest before this returns.
        self.machine.guest.for_each_vcpu(|hardware| {
            hardware.obsolete = true;
            hardware.flush();
        });
    }

    fn recursive_nested_zap(&self) -> bool {
        false
    }

    fn trace_page(&self, _event: PageEvent<'_>) {}

    fn count(&self, counter: Counter, by: i64) {
        if counter == Counter::Unsync {
            self.machine.guest.counts.lock().unwrap().unsync += by;
        }
    }

    fn maximum(&self, _what: Maximum, _n: u64) {}
}

/// The vCPU as the engine sees it.
pub struct Acting<'a, 'm> {
    pub cpu: &'a Cpu<'m>,
    pub role: PageRole,
    pub interrupted: bool,
}

// SAFETY: What they give is fresh.
unsafe impl PageSource for Acting<'_, '_> {
    fn take_page(&mut self, translations: bool) -> Option<PagePtr> {
        Some(self.cpu.machine.guest.alloc(translations))
    }

    fn take_desc(&mut self) -> Option<DescPtr> {
        self.cpu.machine.guest.counts.lock().unwrap().descs += 1;
        let memory = NonNull::from(Box::leak(Box::new([0u64; 16])));
        // SAFETY: Fresh memory of the size of a descriptor, freed by `free_desc`.
        Some(unsafe { DescPtr::adopt(memory.cast::<Desc>()) })
    }
}

impl<'m> ShadowVcpu<Cpu<'m>> for Acting<'_, 'm> {
    fn root_role(&self) -> PageRole {
        self.role
    }

    fn slot<'h>(&self, host: &'h Cpu<'m>, gfn: Gfn) -> Option<&'h Slot> {
        host.slot(false, gfn)
    }

    fn may_prefetch(&mut self) -> bool {
        false
    }

    fn memtype(&self, _gfn: Gfn, _host_mmio: bool) -> u64 {
        0
    }

    fn mmio_generation(&self) -> u64 {
        0
    }

    fn prefetch_pages(
        &mut self,
        _host: &Cpu<'m>,
        _lock: &MmuWrite<'_>,
        _slot: &Slot,
        _gfn: Gfn,
        _pfns: &mut [Pfn],
    ) -> usize {
        0
    }

    fn request_sync(&mut self) {
        self.interrupted = true;
    }

    fn release_prefetched(&mut self) {}
}

/// The guest's tables, as the engine reads them.
pub struct Tables<'m> {
    pub guest: &'m Guest,
    /// The tables of the last level are where nothing can be read at the moment.
    pub unreadable: bool,
}

impl GuestTables for Tables<'_> {
    const ENTRY_BYTES: u64 = 8;

    fn read_entry(&self, gpa: u64) -> Option<u64> {
        Some(self.guest.load(gpa >> 12, (gpa & 0xfff) as usize / 8))
    }

    fn read_group(&self, gpa: u64, group: &mut [u64; GROUP]) -> bool {
        for (i, place) in group.iter_mut().enumerate() {
            *place = self.guest.load(gpa >> 12, (gpa & 0xfff) as usize / 8 + i);
        }
        !self.unreadable
    }

    fn leaf_4k(&self, entry: u64) -> Option<GuestLeaf> {
        Some(GuestLeaf {
            gfn: Gfn(target(entry)?),
            access: ACC_ALL,
        })
    }
}

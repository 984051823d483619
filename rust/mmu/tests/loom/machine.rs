// SPDX-License-Identifier: GPL-2.0

//! What the threads of a model share: locks, RCU, tables, the vCPUs' hardware.
//!
//! Memory of tables is used once and given back when the machine goes, so that a
//! use after free is a failed assertion and no undefined behaviour. The entries of
//! a freed table lead nowhere, and loom knows who may still get at them.

use crate::{guest::Guest, hardware::Hardware, memory::Memory, rcu::Rcu};
use loom::sync::{Mutex, MutexGuard, RwLock};
use rmmu_engine::mmu::{
    shadow::PagePtr,
    sync::atomic::{AtomicU64, Ordering},
    table::{Entries, Table},
    Gfn, Hpa, Level, SpteFormat, TablePtr, ENTRIES,
};
use std::{
    mem::MaybeUninit,
    ptr::{self, NonNull},
    sync::Mutex as Plain,
};

const FIRST_HPA: u64 = 1 << 40;
/// Present, and leads to a table or page that never was.
pub const POISON: u64 = 1 << 11 | 3 | 1 << 44;

/// The slot's dirty log. KVM uses locked instructions for it, so it does order.
pub struct Slot {
    log: AtomicU64,
}

impl Slot {
    pub fn mark(&self, gfn: Gfn) {
        self.log.fetch_or(1 << gfn.0, Ordering::AcqRel);
    }

    pub fn harvest(&self) -> u64 {
        self.log.fetch_and(0, Ordering::AcqRel)
    }

    pub fn contains(&self, gfn: Gfn) -> bool {
        self.log.fetch_or(0, Ordering::Relaxed) >> gfn.0 & 1 != 0
    }
}

#[derive(Default)]
pub struct Counts {
    pub leaves: [i64; 5],
    /// Those that went included.
    pub leaves_ever: [i64; 5],
    pub tables: i64,
    pub nx_splits: i64,
    pub bugs: Vec<&'static str>,
}

/// What is freed after a grace period.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    Table(TablePtr),
    Page(PagePtr),
}

pub struct Machine {
    pub format: SpteFormat,
    pub nx: bool,
    pub mmu_lock: RwLock<()>,
    pub pages_lock: Mutex<()>,
    pub rcu: Rcu,
    pub memory: Memory,
    pub slot: Slot,
    /// What there is for shadow paging.
    pub guest: Guest,
    // No operation of loom happens while one of the plain ones is locked.
    pub counts: Plain<Counts>,
    vcpus: Vec<Mutex<Hardware>>,
    tables: Plain<Vec<Frame>>,
}

struct Frame {
    place: NonNull<Place>,
    state: State,
}

// SAFETY: The place is owned by the machine; access to it is for the engine to order.
unsafe impl Send for Frame {}

struct Place {
    header: MaybeUninit<Table>,
    entries: MaybeUninit<Entries>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Live,
    Dying,
    Free,
}

impl Machine {
    pub fn new(format: SpteFormat, cpus: usize) -> Machine {
        Machine {
            format,
            nx: false,
            mmu_lock: RwLock::new(()),
            pages_lock: Mutex::new(()),
            rcu: Rcu::new(cpus),
            memory: Memory::new(),
            slot: Slot {
                log: AtomicU64::new(0),
            },
            guest: Guest::none(),
            counts: Plain::default(),
            vcpus: (0..cpus).map(|_| Mutex::new(Hardware::default())).collect(),
            tables: Plain::default(),
        }
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

    fn set_state(&self, hpa: Hpa, from: &[State], to: State) -> NonNull<Place> {
        let mut tables = self.tables.lock().unwrap();
        let frame = &mut tables[((hpa.0 - FIRST_HPA) >> 12) as usize];
        assert!(
            from.contains(&frame.state),
            "a table is freed twice: {:?}",
            frame.state
        );
        frame.state = to;
        frame.place
    }

    /// The table at `hpa`, whether it is on its way out or not.
    pub fn table_at(&self, hpa: Hpa) -> TablePtr {
        let tables = self.tables.lock().unwrap();
        let frame = hpa
            .0
            .checked_sub(FIRST_HPA)
            .and_then(|at| tables.get((at >> 12) as usize))
            .filter(|frame| frame.state != State::Free)
            .unwrap_or_else(|| panic!("somebody walks into freed memory at {hpa:x?}"));
        // SAFETY: `alloc_table` adopted the header.
        unsafe { TablePtr::from_raw(header(frame.place)) }
    }

    pub fn alloc_table(&self) -> TablePtr {
        let place = Box::new(Place {
            header: MaybeUninit::uninit(),
            entries: MaybeUninit::uninit(),
        });
        let place = NonNull::from(Box::leak(place));
        for cell in cells(place) {
            // SAFETY: The place is ours alone.
            unsafe { cell.write(AtomicU64::new(POISON)) };
        }
        let mut tables = self.tables.lock().unwrap();
        let hpa = Hpa(FIRST_HPA + ((tables.len() as u64) << 12));
        tables.push(Frame {
            place,
            state: State::Live,
        });
        drop(tables);
        // SAFETY: The place is fresh and stays where it is.
        unsafe { TablePtr::adopt(header(place), entries(place), hpa) }
    }

    /// A table is unlinked, but others may still be looking at it.
    pub fn begin_to_free(&self, table: TablePtr) {
        self.set_state(table.hpa(), &[State::Live], State::Dying);
    }

    /// Frees a table that nobody can be using.
    pub fn free(&self, table: TablePtr) {
        for vcpu in &self.vcpus {
            assert!(
                !vcpu.lock().unwrap().may_walk(table),
                "a table is freed that hardware may still walk"
            );
        }
        let hpa = table.hpa();
        let place = self.set_state(hpa, &[State::Live, State::Dying], State::Free);
        for cell in cells(place) {
            // SAFETY: Nobody else is using the cell. If that is not so, loom has
            // it in its books: here, or at the use to come.
            unsafe {
                (*cell).store(POISON, Ordering::Relaxed);
                (*cell).with_mut(|_| ());
            }
        }
        // SAFETY: As above. New atomics are in the header now, which loom
        // lets nobody use who is not ordered behind this.
        unsafe { TablePtr::adopt(header(place), entries(place), hpa) };
    }

    pub fn free_all(&self, gone: Vec<Gone>) {
        for one in gone {
            self.rcu.end_grace_period();
            match one {
                Gone::Table(table) => self.free(table),
                Gone::Page(page) => self.guest.free(page),
            }
        }
    }

    pub fn count_leaf(&self, level: Level, delta: i64) {
        let mut counts = self.counts.lock().unwrap();
        counts.leaves[level.slot()] += delta;
        counts.leaves_ever[level.slot()] += delta.max(0);
    }

    /// Panics unless all is as it was before there was an MMU.
    pub fn assert_nothing_left(&self) {
        let counts = self.counts.lock().unwrap();
        assert_eq!(counts.bugs, Vec::<&str>::new());
        assert_eq!(counts.leaves, [0; 5], "leaves");
        assert_eq!(counts.tables, 0, "tables");
        assert_eq!(counts.nx_splits, 0, "NX candidates");
        for frame in self.tables.lock().unwrap().iter() {
            assert_eq!(frame.state, State::Free, "a table leaks");
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for frame in self.tables.get_mut().unwrap().drain(..) {
            // SAFETY: It came from a box, and the threads of the model are gone.
            drop(unsafe { Box::from_raw(frame.place.as_ptr()) });
        }
    }
}

fn header(place: NonNull<Place>) -> NonNull<Table> {
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

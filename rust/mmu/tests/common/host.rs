// SPDX-License-Identifier: GPL-2.0

//! A host whose memory, locks, RCU and TLBs are watched.
//!
//! Memory of tables is never given back to the process, so that a use after free
//! is no undefined behaviour here: a freed table is filled with entries that lead
//! nowhere, and asking for a freed table panics. Grace periods are as short as
//! they can be: a table is freed as soon as the last reader from before is gone.

use super::tlb::{Access, Tlb};
use rmmu_engine::mmu::{
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering},
    table::{Entries, Table},
    Gfn, GfnRange, Host, Hpa, Level, MmuRead, MmuWrite, RcuRead, Spte, SpteFormat, TablePtr,
    TableSource,
};
use std::{
    collections::BTreeSet,
    ptr::{self, NonNull},
    sync::{
        atomic::{AtomicI32, AtomicI64, AtomicU8},
        Mutex, MutexGuard,
    },
};

const TABLES: usize = 1 << 15;
const FIRST_HPA: u64 = 1 << 40;
/// Present, and leads to a table that never was.
const POISON: u64 = 1 << 11 | 3 | 1 << 44;

const FREE: u8 = 0;
const LIVE: u8 = 1;
const DYING: u8 = 2;

#[repr(C, align(4096))]
struct Memory {
    entries: [u64; 512],
    header: [u64; 23],
}

struct Frame {
    memory: AtomicPtr<Memory>,
    state: AtomicU8,
}

#[derive(Default)]
struct Rcu {
    next: u64,
    readers: BTreeSet<u64>,
    dying: Vec<(u64, TablePtr)>,
}

/// A memory slot.
#[derive(Default)]
pub struct Slot {
    /// Frames that were marked dirty.
    pub dirty: Mutex<BTreeSet<u64>>,
}

/// See the module.
pub struct FakeHost {
    format: SpteFormat,
    /// The CPU logs what it writes.
    pub pml: bool,
    frames: Vec<Frame>,
    free: Mutex<Vec<usize>>,
    used: AtomicU64,
    rcu: Mutex<Rcu>,
    lock: SpinLock,
    pages_lock: Mutex<()>,
    /// The vCPUs.
    pub tlbs: Vec<Mutex<Tlb>>,
    /// Leaves by level.
    pub leaves: [AtomicI64; 5],
    /// Linked tables.
    pub tables: AtomicI64,
    /// Pages mapped ahead that turned out used, and unused.
    pub ahead: [AtomicI64; 2],
    /// NX candidates as they were accounted.
    pub nx_splits: AtomicI64,
    /// The NX mitigation is on.
    pub nx: AtomicBool,
    /// One of so many questions whether to yield is answered with yes; 0 never.
    pub break_every: AtomicU64,
    asked: AtomicU64,
    /// How often a walk yielded.
    pub yields: AtomicU64,
    /// How many more allocations succeed.
    pub allocations_left: AtomicI64,
    /// Flushes done.
    pub flushes: AtomicU64,
    bugs: Mutex<Vec<&'static str>>,
}

struct SpinLock {
    state: AtomicI32,
    waiters: AtomicI32,
}

impl SpinLock {
    fn read(&self) {
        self.acquire(|state| (state >= 0).then_some(state + 1));
    }

    fn write(&self) {
        self.acquire(|state| (state == 0).then_some(-1));
    }

    fn acquire(&self, next: impl Fn(i32) -> Option<i32>) {
        let try_once = || {
            self.state
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, &next)
                .is_ok()
        };
        if try_once() {
            return;
        }
        self.waiters.fetch_add(1, Ordering::Relaxed);
        while !try_once() {
            std::thread::yield_now();
        }
        self.waiters.fetch_sub(1, Ordering::Relaxed);
    }

    fn read_unlock(&self) {
        self.state.fetch_sub(1, Ordering::Release);
    }

    fn write_unlock(&self) {
        self.state.store(0, Ordering::Release);
    }
}

/// A guard of the fake RCU.
pub struct FakeRcu<'a> {
    host: &'a FakeHost,
    id: u64,
}

// SAFETY: The fake host frees a table when all guards made before it was handed
// over are gone.
unsafe impl RcuRead for FakeRcu<'_> {}

impl Drop for FakeRcu<'_> {
    fn drop(&mut self) {
        self.host.leave_rcu(self.id);
    }
}

impl FakeHost {
    /// A host with this format and so many vCPUs.
    pub fn new(format: SpteFormat, vcpus: usize) -> FakeHost {
        let frame = |_| Frame {
            memory: AtomicPtr::new(ptr::null_mut()),
            state: AtomicU8::new(FREE),
        };
        FakeHost {
            format,
            pml: false,
            frames: (0..TABLES).map(frame).collect(),
            free: Mutex::new((0..TABLES).rev().collect()),
            used: AtomicU64::new(0),
            rcu: Mutex::default(),
            lock: SpinLock {
                state: AtomicI32::new(0),
                waiters: AtomicI32::new(0),
            },
            pages_lock: Mutex::new(()),
            tlbs: (0..vcpus).map(|_| Mutex::default()).collect(),
            leaves: Default::default(),
            tables: AtomicI64::new(0),
            ahead: Default::default(),
            nx_splits: AtomicI64::new(0),
            nx: AtomicBool::new(false),
            break_every: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            yields: AtomicU64::new(0),
            allocations_left: AtomicI64::new(i64::MAX),
            flushes: AtomicU64::new(0),
            bugs: Mutex::default(),
        }
    }

    /// Runs `f` with the lock held for read.
    pub fn read<R>(&self, f: impl FnOnce(&mut MmuRead<'_>) -> R) -> R {
        self.lock.read();
        // SAFETY: It was just taken, and `f` can not keep the token.
        let result = f(&mut unsafe { MmuRead::assume_held() });
        self.lock.read_unlock();
        result
    }

    /// Runs `f` with the lock held for write.
    pub fn write<R>(&self, f: impl FnOnce(&mut MmuWrite<'_>) -> R) -> R {
        self.lock.write();
        // SAFETY: It was just taken, and `f` can not keep the token.
        let result = f(&mut unsafe { MmuWrite::assume_held() });
        self.lock.write_unlock();
        result
    }

    /// A vCPU's hardware.
    pub fn tlb(&self, vcpu: usize) -> MutexGuard<'_, Tlb> {
        self.tlbs[vcpu].lock().unwrap()
    }

    /// The guest accesses memory.
    pub fn access(&self, vcpu: usize, gfn: Gfn, write: bool, exec: bool) -> Access {
        self.tlb(vcpu).access(self, gfn, write, exec)
    }

    /// Pages mapped ahead of which it is known that they were used, and that they were not.
    pub fn ahead(&self) -> (i64, i64) {
        let [used, unused] = &self.ahead;
        (used.load(Ordering::Relaxed), unused.load(Ordering::Relaxed))
    }

    /// Broken invariants that the engine reported.
    pub fn bugs(&self) -> Vec<&'static str> {
        self.bugs.lock().unwrap().clone()
    }

    /// Tables that were handed out and not freed.
    pub fn tables_in_use(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Panics unless all is as it was before there was an MMU.
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.bugs(), Vec::<&str>::new());
        assert_eq!(self.tables_in_use(), 0, "tables leaked");
        assert_eq!(self.tables.load(Ordering::Relaxed), 0, "tables accounted");
        assert_eq!(self.nx_splits.load(Ordering::Relaxed), 0, "NX candidates");
        for (i, leaves) in self.leaves.iter().enumerate() {
            let level = i + 1;
            assert_eq!(leaves.load(Ordering::Relaxed), 0, "leaves of level {level}");
        }
    }

    fn frame(&self, hpa: Hpa) -> &Frame {
        let index = hpa.0.wrapping_sub(FIRST_HPA) >> 12;
        self.frames
            .get(index as usize)
            .filter(|frame| frame.state.load(Ordering::Acquire) != FREE)
            .unwrap_or_else(|| panic!("the engine walks into freed memory at {hpa:x?}"))
    }

    fn free_table(&self, table: TablePtr) {
        let hpa = table.hpa();
        for tlb in &self.tlbs {
            assert!(
                !tlb.lock().unwrap().may_walk(hpa.0),
                "a table is freed that hardware may still walk"
            );
        }
        let index = ((hpa.0 - FIRST_HPA) >> 12) as usize;
        for cell in self.entries(table) {
            cell.store(POISON, Ordering::Relaxed);
        }
        let before = self.frames[index].state.swap(FREE, Ordering::AcqRel);
        assert_ne!(before, FREE, "a table is freed twice");
        self.free.lock().unwrap().push(index);
        self.used.fetch_sub(1, Ordering::Relaxed);
    }

    fn entries(&self, table: TablePtr) -> &Entries {
        // SAFETY: Memory of tables lives as long as the fake host.
        unsafe { table.entries().as_ref() }
    }

    fn leave_rcu(&self, id: u64) {
        let mut done = Vec::new();
        {
            let mut rcu = self.rcu.lock().unwrap();
            rcu.readers.remove(&id);
            let oldest = rcu.readers.first().copied().unwrap_or(u64::MAX);
            rcu.dying.retain(|&(stamp, table)| {
                let over = stamp <= oldest;
                if over {
                    done.push(table);
                }
                !over
            });
        }
        for table in done {
            self.free_table(table);
        }
    }
}

// SAFETY: Tables come from `adopt`, one owner each; they are never unmapped while
// the host lives, and table_of and entries_of find them by their address.
unsafe impl Host for FakeHost {
    type Slot = Slot;
    type Rcu<'a> = FakeRcu<'a>;

    fn rcu_read(&self) -> FakeRcu<'_> {
        let mut rcu = self.rcu.lock().unwrap();
        let id = rcu.next;
        rcu.next += 1;
        rcu.readers.insert(id);
        FakeRcu { host: self, id }
    }

    fn format(&self) -> &SpteFormat {
        &self.format
    }

    fn pml(&self) -> bool {
        self.pml
    }

    fn table_of(&self, hpa: Hpa) -> TablePtr {
        let memory = self.frame(hpa).memory.load(Ordering::Acquire);
        // SAFETY: The memory was adopted when it was handed out.
        unsafe {
            let header = ptr::addr_of_mut!((*memory).header).cast::<Table>();
            TablePtr::from_raw(NonNull::new_unchecked(header))
        }
    }

    fn alloc_table(&self) -> Option<TablePtr> {
        if self.allocations_left.fetch_sub(1, Ordering::Relaxed) <= 0 {
            return None;
        }
        let index = self.free.lock().unwrap().pop()?;
        let frame = &self.frames[index];
        let mut memory = frame.memory.load(Ordering::Acquire);
        if memory.is_null() {
            memory = Box::into_raw(Box::new(Memory {
                entries: [POISON; 512],
                header: [0; 23],
            }));
            frame.memory.store(memory, Ordering::Release);
        }
        assert_eq!(frame.state.swap(LIVE, Ordering::AcqRel), FREE);
        self.used.fetch_add(1, Ordering::Relaxed);
        // SAFETY: The frame was free, so nobody uses its memory.
        unsafe {
            ptr::addr_of_mut!((*memory).header).write([0; 23]);
            let header = ptr::addr_of_mut!((*memory).header).cast::<Table>();
            let entries = ptr::addr_of_mut!((*memory).entries).cast::<Entries>();
            Some(TablePtr::adopt(
                NonNull::new_unchecked(header),
                NonNull::new_unchecked(entries),
                Hpa(FIRST_HPA + ((index as u64) << 12)),
            ))
        }
    }

    fn free_table_now(&self, table: TablePtr) {
        self.free_table(table);
    }

    fn free_table_rcu(&self, table: TablePtr) {
        let mut rcu = self.rcu.lock().unwrap();
        let state = &self.frame(table.hpa()).state;
        assert_eq!(
            state.swap(DYING, Ordering::AcqRel),
            LIVE,
            "a table is freed twice"
        );
        let stamp = rcu.next;
        if rcu.readers.is_empty() {
            drop(rcu);
            self.free_table(table);
        } else {
            rcu.dying.push((stamp, table));
        }
    }

    fn account_table(&self, _table: TablePtr, delta: i32) {
        self.tables.fetch_add(delta.into(), Ordering::Relaxed);
    }

    fn account_leaf(&self, level: Level, delta: i64) {
        self.leaves[level.slot()].fetch_add(delta, Ordering::Relaxed);
    }

    fn account_ahead(&self, used: i64, unused: i64) {
        self.ahead[0].fetch_add(used, Ordering::Relaxed);
        self.ahead[1].fetch_add(unused, Ordering::Relaxed);
    }

    fn account_nx_split(&self, delta: i64) {
        self.nx_splits.fetch_add(delta, Ordering::Relaxed);
    }

    fn flush_all(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        for tlb in &self.tlbs {
            tlb.lock().unwrap().flush();
        }
    }

    fn flush_range(&self, range: GfnRange) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        for tlb in &self.tlbs {
            tlb.lock().unwrap().flush_range(range);
        }
    }

    fn need_break(&self) -> bool {
        if self.lock.waiters.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let every = self.break_every.load(Ordering::Relaxed);
        self.asked
            .fetch_add(1, Ordering::Relaxed)
            .checked_rem(every)
            == Some(0)
    }

    fn relax_read(&self, lock: &mut MmuRead<'_>) {
        self.unlock_relock_read(lock, || self.yields.fetch_add(1, Ordering::Relaxed));
    }

    fn relax_write(&self, lock: &mut MmuWrite<'_>) {
        self.unlock_relock_write(lock, || self.yields.fetch_add(1, Ordering::Relaxed));
    }

    fn unlock_relock_read<R>(&self, _lock: &mut MmuRead<'_>, f: impl FnOnce() -> R) -> R {
        self.lock.read_unlock();
        std::thread::yield_now();
        let result = f();
        self.lock.read();
        result
    }

    fn unlock_relock_write<R>(&self, _lock: &mut MmuWrite<'_>, f: impl FnOnce() -> R) -> R {
        self.lock.write_unlock();
        std::thread::yield_now();
        let result = f();
        self.lock.write();
        result
    }

    fn with_pages_lock<R>(&self, f: impl FnOnce() -> R) -> R {
        let _guard = self.pages_lock.lock().unwrap();
        f()
    }

    fn mark_dirty(&self, slot: &Slot, gfn: Gfn) {
        slot.dirty.lock().unwrap().insert(gfn.0);
    }

    fn nx_huge_pages(&self) -> bool {
        self.nx.load(Ordering::Relaxed)
    }

    fn bug(&self, what: &'static str) {
        self.bugs.lock().unwrap().push(what);
    }

    fn warn(&self, what: &'static str) {
        self.bug(what);
    }
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        for frame in &self.frames {
            let memory = frame.memory.load(Ordering::Acquire);
            if !memory.is_null() {
                // SAFETY: It came from a box, and nobody is left to use it.
                drop(unsafe { Box::from_raw(memory) });
            }
        }
    }
}

/// A vCPU's cache of tables.
pub struct Cache<'a>(pub &'a FakeHost);

// SAFETY: What the host allocates belongs to nobody else.
unsafe impl TableSource for Cache<'_> {
    fn take(&mut self) -> Option<TablePtr> {
        self.0.alloc_table()
    }
}

/// As [`Cache`], of tables that are filled already.
pub struct FilledCache<'a>(pub &'a FakeHost);

// SAFETY: As above, and the entries are filled.
unsafe impl TableSource for FilledCache<'_> {
    const PREFILLED: bool = true;

    fn take(&mut self) -> Option<TablePtr> {
        let table = self.0.alloc_table()?;
        for cell in self.0.entries(table) {
            cell.store(Spte::NONPRESENT.0, Ordering::Relaxed);
        }
        Some(table)
    }
}

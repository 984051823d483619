// SPDX-License-Identifier: GPL-2.0

//! A CPU, which one thread of a model runs on: the engine's host.

use crate::{
    hardware::Hardware,
    machine::{Gone, Machine, Slot},
};
use loom::sync::{
    atomic::{AtomicUsize, Ordering},
    MutexGuard, RwLockReadGuard, RwLockWriteGuard,
};
use rmmu_engine::mmu::{
    Entries, Gfn, GfnRange, Host, Hpa, Level, MmuRead, MmuWrite, RcuRead, SpteFormat, TablePtr,
    TableSource,
};
use std::{
    cell::{Cell, RefCell},
    ptr::NonNull,
};

pub struct Cpu<'m> {
    pub machine: &'m Machine,
    pub id: usize,
    sections: Cell<u32>,
    held: RefCell<Held<'m>>,
    /// Counts what the CPU did to the count of tables. For loom what comes after it
    /// is later than what came before, even if it is no operation of an atomic.
    accounted: AtomicUsize,
    /// The answers to a walk's next questions whether somebody waits, a bit each.
    pub breaks: Cell<u32>,
}

#[derive(Default)]
enum Held<'m> {
    #[default]
    Nothing,
    Read {
        _guard: RwLockReadGuard<'m, ()>,
    },
    Write {
        _guard: RwLockWriteGuard<'m, ()>,
    },
}

/// A guard of RCU.
pub struct Section<'a, 'm>(&'a Cpu<'m>);

// SAFETY: See the module rcu.
unsafe impl RcuRead for Section<'_, '_> {}

impl Drop for Section<'_, '_> {
    fn drop(&mut self) {
        let cpu = self.0;
        cpu.sections.set(cpu.sections.get() - 1);
        if cpu.sections.get() == 0 && !std::thread::panicking() {
            cpu.machine.free_all(cpu.machine.rcu.leave(cpu.id));
        }
    }
}

impl<'m> Cpu<'m> {
    pub fn new(machine: &'m Machine, id: usize) -> Cpu<'m> {
        Cpu {
            machine,
            id,
            sections: Cell::new(0),
            held: RefCell::default(),
            accounted: AtomicUsize::new(0),
            breaks: Cell::new(0),
        }
    }

    /// The hardware of the vCPU that runs here.
    pub fn hardware(&self) -> MutexGuard<'m, Hardware> {
        self.machine.vcpu(self.id)
    }

    fn lock_read(&self) {
        let _guard = self.machine.mmu_lock.read().unwrap();
        self.held.replace(Held::Read { _guard });
    }

    fn lock_write(&self) {
        let _guard = self.machine.mmu_lock.write().unwrap();
        self.held.replace(Held::Write { _guard });
    }

    fn unlock(&self) {
        assert_eq!(self.sections.get(), 0, "the lock drops within RCU");
        drop(self.held.take());
    }

    /// Runs `f` with the lock held for read.
    pub fn read<R>(&self, f: impl FnOnce(&mut MmuRead<'_>) -> R) -> R {
        self.lock_read();
        // SAFETY: It was just taken, and `f` can not keep the token.
        let result = f(&mut unsafe { MmuRead::assume_held() });
        self.unlock();
        result
    }

    /// Runs `f` with the lock held for write.
    pub fn write<R>(&self, f: impl FnOnce(&mut MmuWrite<'_>) -> R) -> R {
        self.lock_write();
        // SAFETY: It was just taken, and `f` can not keep the token.
        let result = f(&mut unsafe { MmuWrite::assume_held() });
        self.unlock();
        result
    }
}

// SAFETY: Tables come from `adopt`, one owner each; their memory lives as long as
// the machine, and table_of finds them by their address.
unsafe impl<'m> Host for Cpu<'m> {
    type Slot = Slot;
    type Rcu<'a>
        = Section<'a, 'm>
    where
        Self: 'a;

    fn rcu_read(&self) -> Section<'_, 'm> {
        if self.sections.get() == 0 {
            self.machine.rcu.enter(self.id);
        }
        self.sections.set(self.sections.get() + 1);
        Section(self)
    }

    fn format(&self) -> &SpteFormat {
        &self.machine.format
    }

    fn pml(&self) -> bool {
        // Of nested guests only, which no model has.
        false
    }

    fn table_of(&self, hpa: Hpa) -> TablePtr {
        self.machine.table_at(hpa)
    }

    fn entries_of(&self, hpa: Hpa) -> NonNull<Entries> {
        match self.machine.guest.page_at(hpa) {
            Some(page) => page.entries(),
            None => self.table_of(hpa).entries(),
        }
    }

    fn alloc_table(&self) -> Option<TablePtr> {
        Some(self.machine.alloc_table())
    }

    fn free_table_now(&self, table: TablePtr) {
        self.machine.free(table);
    }

    fn free_table_rcu(&self, table: TablePtr) {
        self.machine.begin_to_free(table);
        self.machine
            .free_all(self.machine.rcu.give_up(Gone::Table(table)));
    }

    fn account_table(&self, _table: TablePtr, delta: i32) {
        self.accounted.fetch_add(1, Ordering::Relaxed);
        self.machine.counts.lock().unwrap().tables += i64::from(delta);
    }

    fn account_leaf(&self, level: Level, delta: i64) {
        self.machine.count_leaf(level, delta);
    }

    fn account_nx_split(&self, delta: i64) {
        self.machine.counts.lock().unwrap().nx_splits += delta;
    }

    fn flush_all(&self) {
        self.machine.for_each_vcpu(Hardware::flush);
        self.machine.guest.flush_all();
    }

    fn flush_range(&self, range: GfnRange) {
        self.machine
            .for_each_vcpu(|hardware| hardware.flush_range(range));
    }

    fn need_break(&self) -> bool {
        let answers = self.breaks.get();
        self.breaks.set(answers >> 1);
        answers & 1 != 0
    }

    fn relax_read(&self, lock: &mut MmuRead<'_>) {
        self.unlock_relock_read(lock, || ());
    }

    fn relax_write(&self, lock: &mut MmuWrite<'_>) {
        self.unlock_relock_write(lock, || ());
    }

    fn unlock_relock_read<R>(&self, _lock: &mut MmuRead<'_>, f: impl FnOnce() -> R) -> R {
        self.unlock();
        let result = f();
        self.lock_read();
        result
    }

    fn unlock_relock_write<R>(&self, _lock: &mut MmuWrite<'_>, f: impl FnOnce() -> R) -> R {
        self.unlock();
        let result = f();
        self.lock_write();
        result
    }

    fn with_pages_lock<R>(&self, f: impl FnOnce() -> R) -> R {
        let _guard = self.machine.pages_lock.lock().unwrap();
        f()
    }

    fn mark_dirty(&self, slot: &Slot, gfn: Gfn) {
        slot.mark(gfn);
    }

    fn nx_huge_pages(&self) -> bool {
        self.machine.nx
    }

    fn bug(&self, what: &'static str) {
        self.machine.counts.lock().unwrap().bugs.push(what);
    }

    fn warn(&self, what: &'static str) {
        self.bug(what);
    }
}

/// A vCPU's cache of tables.
pub struct Cache<'a, 'm>(pub &'a Cpu<'m>);

// SAFETY: What the host allocates belongs to nobody else.
unsafe impl TableSource for Cache<'_, '_> {
    fn take(&mut self) -> Option<TablePtr> {
        self.0.alloc_table()
    }
}

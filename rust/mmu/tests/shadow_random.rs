// SPDX-License-Identifier: GPL-2.0

//! Random operations on a VM under shadow paging, in each of the guest's paging
//! modes, against a plain reading of its tables.
//!
//! A guest rewrites its tables at random, with and without the flushes that the
//! architecture asks for, and accesses memory through them; the host takes pages
//! away, logs, ages, zaps, and runs out of pages meanwhile. Each access must be one
//! that the guest's tables allow, or allowed when the address was last flushed, and
//! must lead to the page of the host that backs the frame now. Every now and then
//! everything the engine keeps is compared with a brute-force reading.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::{format, portion, Random};
use rmmu_engine::mmu::{shadow::Counter, Gfn, GfnRange, Level};
use shadow::{
    cpu::Kind,
    host::Slot,
    paging::{Mode, Paging, FULL, NX, PS, U, W},
    set, Touch, Vm,
};
use std::collections::BTreeMap;

const OPERATIONS: u64 = 100_000;

/// Frames of tables, the kernel's own apart.
const TABLES: u64 = 0x20;
const TABLE_COUNT: u64 = 40;
/// Frames of the tables that map all tables, for the kernel.
const KERNEL: u64 = 0x10;
/// Frames of data: four parts of 2 MiB.
const DATA: u64 = 0x200;
const DATA_END: u64 = 0xa00;
/// No memory there.
const HOLE: u64 = 0xa00;
/// Roots among the tables, which are the first.
const ROOTS: u64 = 3;
/// Behind the roots, and what PAE's roots are in.
const FIRST_INNER: u64 = 15;

struct Run {
    vm: Vm,
    random: Random,
    /// Accesses by what they came to.
    touches: BTreeMap<&'static str, u64>,
    /// The most huge pages that were mapped at a time.
    most_huge: i64,
    /// How often frames came to share a page of the host.
    shared: u64,
}

/// The page of the kernel's address space where a table is.
fn kernel_va(paging: &Paging, gfn: u64) -> u64 {
    let index = gfn - KERNEL;
    let base = match paging.mode {
        Mode::Bits32 => 0xffc0_0000,
        Mode::Pae => 0xffe0_0000,
        Mode::Level4 | Mode::Level4By5 | Mode::Ept => 0xffff_ff80_0000_0000,
        Mode::Level5 => 0xffff_0000_0000_0000,
    };
    base + (index << 12)
}

/// What index of a top table leads to the kernel's tables.
fn kernel_index(paging: &Paging) -> u64 {
    paging.index(kernel_va(paging, KERNEL), paging.top())
}

/// The flags of the kernel's own entries.
fn kernel(paging: &Paging) -> u64 {
    if paging.is_ept() {
        paging.full()
    } else {
        FULL & !U
    }
}

impl Run {
    fn new(paging: Paging, seed: u64) -> Run {
        let slots = vec![Slot::new(0, HOLE, false)];
        let format = if paging.is_ept() {
            format::ept(true)
        } else {
            format::npt()
        };
        let mut vm = Vm::new(format, paging, slots, 2);
        vm.machine.recursive_zap.set(paging.nested);
        let mut next = KERNEL;
        // The kernel's tables, from the top down; the last one maps all tables.
        let first = next;
        for level in (1..paging.top()).rev() {
            let table = Gfn(next);
            next += 1;
            if level > 1 {
                let index = paging.index(kernel_va(&paging, KERNEL), level);
                set(&vm, table.0, index, next << 12 | kernel(&paging));
                continue;
            }
            for gfn in KERNEL..TABLES + TABLE_COUNT {
                let index = paging.index(kernel_va(&paging, gfn), 1);
                set(&vm, table.0, index, gfn << 12 | kernel(&paging));
            }
        }
        let mut run = Run {
            random: Random(seed),
            touches: BTreeMap::new(),
            most_huge: 0,
            shared: 0,
            vm: {
                for root in 0..ROOTS {
                    for top in tops(&paging, TABLES + root) {
                        let index = kernel_index(&paging);
                        if paging.mode != Mode::Pae || top == TABLES + 4 * root + 3 {
                            set(&vm, top, index, first << 12 | kernel(&paging));
                        }
                    }
                    if paging.mode == Mode::Pae {
                        for i in 0..4 {
                            let pdpte = (TABLES + 4 * root + i) << 12 | 1;
                            set(&vm, TABLES + 12 + root, i, pdpte);
                        }
                    }
                }
                for gfn in KERNEL..TABLES + TABLE_COUNT {
                    vm.watched.insert(kernel_va(&paging, gfn) >> 12);
                }
                vm
            },
        };
        for va in run.data_addresses() {
            run.vm.watched.insert(va >> 12);
        }
        run.fill_tables();
        for vcpu in 0..2 {
            let cr3 = run.root_cr3(vcpu as u64 % ROOTS);
            run.vm.load_cr3(vcpu, cr3, false);
        }
        run
    }

    fn paging(&self) -> Paging {
        self.vm.paging
    }

    fn root_cr3(&self, root: u64) -> u64 {
        match self.paging().mode {
            Mode::Pae => (TABLES + 12 + root) << 12,
            _ => (TABLES + root) << 12,
        }
    }

    /// What level a table is meant for. The guest errs now and then.
    fn level_of(&self, table: Gfn) -> u8 {
        let top = self.paging().top();
        let below = |n: u64| match (top, n) {
            (2, _) => 1,
            (4, 0..=2) | (5, 2..=3) => 3,
            (4, 3..=7) | (5, 4..=7) => 2,
            (5, 0..=1) => 4,
            _ => 1,
        };
        match table.0 - TABLES {
            n if n < self.top_tables() => top,
            n if n < FIRST_INNER => 1,
            n => below(n - FIRST_INNER),
        }
    }

    fn top_tables(&self) -> u64 {
        match self.paging().mode {
            Mode::Pae => 4 * ROOTS,
            _ => ROOTS,
        }
    }

    /// Indexes that the guest uses in a table.
    fn index(&mut self, level: u8) -> u64 {
        if level > 1 {
            return self.random.below(2);
        }
        match self.random.below(8) {
            0 => 256 + self.random.below(2),
            _ => self.random.below(10),
        }
    }

    /// Addresses the guest uses: combinations of those indexes.
    fn data_addresses(&mut self) -> Vec<u64> {
        let paging = self.paging();
        (0..64)
            .map(|_| {
                let mut va = 0;
                for level in 1..=paging.top() {
                    va |= self.index(level) << paging.shift(level);
                }
                if paging.mode == Mode::Pae {
                    va |= self.random.below(2) << 30;
                }
                va
            })
            .collect()
    }

    fn address(&mut self) -> u64 {
        let user = self.vm.watched.len() - (TABLES + TABLE_COUNT - KERNEL) as usize;
        let n = self.random.below(user as u64) as usize;
        // The kernel's addresses are the highest.
        *self.vm.watched.iter().nth(n).unwrap() << 12
    }

    /// A table that is meant for a level, or any.
    fn table(&mut self, level: Option<u8>) -> Gfn {
        loop {
            let table = Gfn(TABLES + self.random.below(TABLE_COUNT));
            if level.is_none_or(|level| self.level_of(table) == level) {
                return table;
            }
        }
    }

    /// An entry for a table of a level.
    fn entry(&mut self, level: u8) -> u64 {
        let paging = self.paging();
        let mut flags = paging.full();
        let rate = if level > 1 { 30 } else { 6 };
        for bit in rights(&paging) {
            if self.random.once_in(rate) {
                flags &= !bit;
            }
        }
        if self.random.once_in(rate + 6) {
            flags = paging.no_exec(flags);
        }
        let odd = self.random.below(40);
        match odd {
            0 => return 0,
            1 => return self.table(None).to_gpa() | paging.not_present(flags),
            2 => return self.table(None).to_gpa() | flags,
            3 if paging.mode != Mode::Bits32 => return DATA << 12 | flags | 1 << 50,
            4 | 5 if level == 1 => return (HOLE + self.random.below(4)) << 12 | flags,
            _ => {}
        }
        if level == 2 && self.random.once_in(4) {
            let align = 1 << (paging.shift(2) - 12);
            let frames = DATA_END.next_multiple_of(align);
            let large = self.random.below(frames / align);
            return (large * align) << 12 | flags | PS;
        }
        if level > 1 {
            return self.table(Some(level - 1)).to_gpa() | flags;
        }
        match self.random.below(6) {
            0 => self.table(None).to_gpa() | flags,
            // Neighbours, which are mapped in advance.
            1..=3 => (DATA + self.random.below(8)) << 12 | flags,
            _ => (DATA + self.random.below(DATA_END - DATA)) << 12 | flags,
        }
    }

    /// The guest makes tables before it uses them.
    fn fill_tables(&mut self) {
        let paging = self.paging();
        for n in 0..TABLE_COUNT {
            let table = Gfn(TABLES + n);
            if (self.top_tables()..FIRST_INNER).contains(&n) {
                continue;
            }
            let level = self.level_of(table);
            let indexes: Vec<u64> = if level > 1 {
                vec![0, 1]
            } else {
                (0..10).chain(256..258).collect()
            };
            for index in indexes {
                let entry = self.entry(level);
                set(&self.vm, table.0, index, entry);
            }
        }
        self.vm.note_tables();
        assert!(paging.top() >= 2);
    }

    /// The guest changes an entry of one of its tables.
    fn write_table(&mut self) {
        let paging = self.paging();
        let vcpu = self.random.below(2) as usize;
        let top = u64::from(paging.top());
        let level = match self.random.below(5) {
            0 => 2 + self.random.below(top - 1) as u8,
            _ => 1,
        };
        let table = self.table(Some(level));
        if (self.top_tables()..FIRST_INNER).contains(&(table.0 - TABLES)) {
            return;
        }
        let index = self.index(level);
        let gpa = paging.entry_gpa(table, index);
        let old = self.vm.ram.load(gpa, paging.width());
        let value = if self.random.once_in(3) && old != 0 {
            // Just other rights.
            old ^ rights(&paging)[self.random.below(4) as usize]
        } else {
            self.entry(level)
        };
        let va = kernel_va(&paging, table.0) | gpa & 0xfff;
        self.vm.unprotect.set(self.random.once_in(3));
        self.vm.store(vcpu, va, gpa, value);
        match self.random.below(4) {
            0 => {
                let va = self.address();
                self.vm.invlpg(vcpu, va);
            }
            1 => {
                for other in 0..2 {
                    let va = self.address();
                    self.vm.invlpg(other, va);
                }
            }
            _ => {}
        }
    }

    fn access(&mut self) {
        let vcpu = self.random.below(2) as usize;
        let va = self.address();
        let what = self.random.below(3);
        let kind = Kind {
            write: what == 1,
            exec: what == 2,
            user: !self.random.once_in(3),
        };
        let touch = self.vm.touch(vcpu, va, kind);
        let name = match touch {
            Touch::Memory(gfn) if gfn.0 < DATA => "table",
            Touch::Memory(_) => "data",
            Touch::Fault => "fault",
            Touch::Mmio(_) => "mmio",
            Touch::Emulated(_) => "emulated",
            Touch::ReadOnly(_) => "read-only",
        };
        *self.touches.entry(name).or_default() += 1;
        match touch {
            Touch::Fault if !self.random.once_in(3) => self.repair(vcpu, va),
            Touch::Memory(gfn) if kind.write && gfn.0 < DATA => {
                // The guest's data are its own tables.
                let paging = self.paging();
                if gfn.0 >= TABLES + FIRST_INNER {
                    let level = self.level_of(gfn);
                    let index = self.index(level);
                    let value = self.entry(level);
                    let gpa = paging.entry_gpa(gfn, index);
                    self.vm.ram.store(gpa, paging.width(), value);
                    self.vm.note_tables();
                }
            }
            Touch::Emulated(gfn) if (TABLES + FIRST_INNER..DATA).contains(&gfn.0) => {
                let level = self.level_of(gfn);
                for _ in 0..1 + self.random.below(4) {
                    let index = self.index(level);
                    let gpa = self.paging().entry_gpa(gfn, index);
                    let value = self.entry(level);
                    self.vm.emulated_store(gpa, value);
                }
            }
            _ => {}
        }
    }

    /// The guest serves its own page fault.
    fn repair(&mut self, vcpu: usize, va: u64) {
        let paging = self.paging();
        let mut table = self.vm.first_table(vcpu, va);
        for level in (1..=paging.top()).rev() {
            let gpa = paging.entry_gpa(table, paging.index(va, level));
            let mut entry = self.vm.ram.load(gpa, paging.width());
            let broken = !paging.is_present(entry) || paging.is_reserved(entry, level);
            let whole = paging.full() & !paging.accessed() & !paging.dirty();
            if broken || entry & whole != whole || entry & NX != 0 {
                if broken || !self.vm.ram.contains(paging.frame(entry, level)) {
                    entry = self.entry(level);
                }
                entry = (entry | paging.full()) & !NX & !(1 << 50);
                self.vm
                    .store(vcpu, kernel_va(&paging, table.0) | gpa & 0xfff, gpa, entry);
            }
            table = paging.frame(entry, level);
            let is_table = (TABLES..TABLES + TABLE_COUNT).contains(&table.0);
            if paging.is_leaf(entry, level) || !is_table {
                break;
            }
        }
        if !self.random.once_in(4) {
            self.vm.invlpg(vcpu, va);
        }
    }

    fn frames(&mut self) -> GfnRange {
        let start = match self.random.below(3) {
            0 => TABLES + self.random.below(TABLE_COUNT),
            _ => DATA + self.random.below(DATA_END - DATA),
        };
        let most = if self.random.once_in(8) { 600 } else { 4 };
        let pages = 1 + self.random.below(most);
        GfnRange::new(Gfn(start), Gfn((start + pages).min(DATA_END)))
    }

    fn host(&mut self) {
        let range = self.frames();
        let lift = self.random.below(2) == 0;
        let writable = !self.random.once_in(4);
        match self.random.below(17) {
            16 => {
                // As KSM does it, or two slots with the same memory.
                let with = Gfn(DATA + self.random.below(8));
                let count = 1 + self.random.below(8);
                let range = GfnRange::new(with.add(1), with.add(1 + count));
                self.vm.invalidate(range, |ram| {
                    ram.huge.borrow_mut().remove(&(DATA >> 9));
                    for gfn in range.start.0..range.end.0 {
                        ram.share(Gfn(gfn), with);
                    }
                });
                self.shared += 1;
            }
            0..=4 => self.vm.invalidate(range, |ram| {
                for gfn in range.start.0..range.end.0 {
                    ram.huge.borrow_mut().remove(&(gfn >> 9));
                    ram.back(Gfn(gfn), writable);
                }
            }),
            5 => {
                let first = Gfn(DATA + self.random.below(4) * 512);
                let range = GfnRange::of(first, Level::L2M);
                self.vm.invalidate(range, |ram| ram.back_huge(first));
            }
            6 | 7 => {
                let (machine, slot) = (&self.vm.machine, &self.vm.machine.slots[0]);
                machine.write(|lock| self.vm.shadow.age(machine, lock, slot, range, lift));
            }
            8 if self.random.once_in(3) => self.vm.start_logging(0),
            9 => {
                self.vm.harvest(0);
                if lift {
                    self.vm.machine.slots[0].logged.set(false);
                    let (machine, slot) = (&self.vm.machine, &self.vm.machine.slots[0]);
                    machine.write(|lock| {
                        let allowed = |gfn| self.vm.max_level(gfn);
                        self.vm.shadow.recover_huge(machine, lock, slot, allowed);
                    });
                }
            }
            10 => {
                let goal = 12 + self.random.below(60);
                let machine = &self.vm.machine;
                machine.write(|lock| self.vm.shadow.set_max_pages(machine, lock, goal));
                // Enough for all roots and a fault.
                machine.write(|lock| {
                    let goal = goal.max(self.vm.shadow.pages() + 30);
                    self.vm.shadow.set_max_pages(machine, lock, goal);
                });
            }
            11 if self.random.once_in(4) => self.vm.zap_fast(),
            12 => {
                let machine = &self.vm.machine;
                machine.write(|lock| self.vm.shadow.recover_nx(machine, lock, 3, |_, _| lift));
            }
            13 if self.random.once_in(4) => {
                let (machine, slot) = (&self.vm.machine, &self.vm.machine.slots[0]);
                let nx = lift;
                self.vm.invalidate(GfnRange::new(Gfn(0), Gfn(HOLE)), |_| {});
                machine.nx.set(nx);
                machine.write(|lock| {
                    let flush = rmmu_engine::mmu::Flush::none();
                    self.vm.shadow.zap_slot_pages(machine, lock, slot, flush);
                });
            }
            14 => {
                let gfn = self.table(None);
                let machine = &self.vm.machine;
                machine.write(|lock| self.vm.shadow.unprotect_gfn(machine, lock, gfn));
            }
            15 if self.random.once_in(3) => {
                self.vm.generation.set(self.vm.generation.get() + 2);
            }
            _ => {
                let (every, once) = (self.random.below(5), self.random.below(2));
                self.vm.machine.break_every.set(every * once);
            }
        }
    }

    fn step(&mut self) {
        self.vm.prefetch.set(!self.random.once_in(4));
        if self.random.once_in(50) {
            let (pages, descs) = (self.random.below(3), self.random.below(3));
            self.vm.cache.set((pages, descs));
        }
        match self.random.below(20) {
            0..=7 => self.write_table(),
            8..=15 => self.access(),
            16 => {
                let vcpu = self.random.below(2) as usize;
                let root = self.random.below(ROOTS);
                let keep = !self.random.once_in(3);
                self.vm.load_cr3(vcpu, self.root_cr3(root), keep);
            }
            17 => {
                let va = self.address();
                let vcpu = self.random.below(2) as usize;
                self.vm.invlpg(vcpu, va);
            }
            _ => self.host(),
        }
    }
}

/// Bits that make a difference to what an entry allows.
fn rights(paging: &Paging) -> [u64; 4] {
    // Without the right to read an entry of EPT allows nothing at all.
    let third = if paging.is_ept() { 7 } else { U };
    [W, third, paging.accessed(), paging.dirty()]
}

/// The tables of the highest level that a root has.
fn tops(paging: &Paging, root: u64) -> Vec<u64> {
    let n = root - TABLES;
    match paging.mode {
        Mode::Pae => (0..4).map(|i| TABLES + 4 * n + i).collect(),
        _ => vec![root],
    }
}

fn run(paging: Paging, seed: u64) {
    let mut run = Run::new(paging, seed);
    for step in 0..portion(OPERATIONS) {
        run.step();
        // After each of the first operations, and then often.
        if step < portion(4000) || step % 32 == 0 {
            run.vm.assert_audit();
        }
        if step % 128 == 0 {
            run.vm.check();
            run.most_huge = run.most_huge.max(run.vm.machine.leaves[1].get());
        }
    }
    run.vm.check();
    // Everything the test is about has happened.
    let machine = &run.vm.machine;
    for counter in [
        Counter::ShadowZapped,
        Counter::PteWrite,
        Counter::PdeZapped,
        Counter::Flooded,
        Counter::Recycled,
        Counter::CacheMiss,
        Counter::Synced,
    ] {
        let count = machine.counter(counter);
        assert!(count > portion(50) as i64, "{counter:?}: {count}");
    }
    let ahead = machine.counter(Counter::Prefetched);
    assert_eq!(
        ahead > portion(1000) as i64,
        paging.ad,
        "mapped ahead: {ahead}"
    );
    assert!(machine.yields.get() > portion(50));
    assert!(run.most_huge > 0, "no huge page was mapped");
    assert!(
        run.shared > portion(50),
        "frames shared a page: {}",
        run.shared
    );
    for (name, least) in [("data", 10_000), ("table", 1000), ("mmio", 100)] {
        let count = run.touches[name];
        assert!(
            count > portion(least),
            "accesses that came to {name}: {count}"
        );
    }
    run.vm.destroy();
}

#[test]
fn two_levels() {
    run(Paging::new(Mode::Bits32), 1);
}

#[test]
fn physical_address_extension() {
    run(Paging::new(Mode::Pae), 2);
}

#[test]
fn four_levels() {
    let paging = Paging::new(Mode::Level4);
    run(
        Paging {
            smep: true,
            ..paging
        },
        3,
    );
}

#[test]
fn four_levels_without_write_protection_of_the_supervisor() {
    let paging = Paging::new(Mode::Level4);
    run(
        Paging {
            wp: false,
            smep: true,
            ..paging
        },
        4,
    );
}

#[test]
fn five_levels() {
    run(Paging::new(Mode::Level5), 5);
}

#[test]
fn nested_four_levels_below_five() {
    run(Paging::new(Mode::Level4By5), 6);
}

#[test]
fn nested_extended_page_tables() {
    run(Paging::new(Mode::Ept), 7);
}

#[test]
fn nested_extended_page_tables_without_accessed_and_dirty_bits() {
    let paging = Paging::new(Mode::Ept);
    run(
        Paging {
            ad: false,
            ..paging
        },
        8,
    );
}

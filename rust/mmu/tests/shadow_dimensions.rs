// SPDX-License-Identifier: GPL-2.0

//! Random VMs under shadow paging, on random machines.
//!
//! `shadow_random` does many operations on a few VMs, whose guests have orderly
//! tables in one slot. Here each VM is another: how entries look, how many bits a
//! physical address has, what the host logs with. Its two vCPUs share their tables and
//! may page in different ways at a time; their registers change while the guest runs.
//! Any table may be one of any level, and may refer to itself; tables are in ordinary
//! memory, in read-only slots, in slots that come and go, and where there is no memory
//! at all. Pages are so few at times that the roots use them up.
//!
//! Everything is audited after every operation. A VM is made from a seed, which is
//! printed when something is wrong; `RMMU_TEST_SEED` runs that one VM.

mod common;
#[path = "common/shadow/mod.rs"]
mod shadow;

use common::{format, portion, Random};
use rmmu_engine::mmu::{shadow::Counter, Gfn, GfnRange, Level, SpteFormat};
use shadow::{
    cpu::Kind,
    host::Slot,
    paging::{Mode, Paging, Translation, FULL, PS, U, W},
    Touch, Vm,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    env, thread,
};

const WORLDS: u64 = 30;
const OPERATIONS: u64 = 1500;

/// Maps all tables, at any level at which it is used: its last entry is itself.
const MAP: u64 = 0x10;
/// What CR3 points to with PAE.
const PDPTS: u64 = 0x11;
const ROOTS: u64 = 0x14;
const ROOT_COUNT: u64 = 3;
const TABLES: u64 = 0x20;
const TABLES_END: u64 = 0x50;
const DATA: u64 = 0x50;
/// 2 MiB that the host may back by a huge page.
const HUGE: u64 = 0x400;
const END: u64 = 0x600;
/// The slots: where they are, and whether they are read-only when they come back. What
/// is between `0x40` and `0x48` is no memory.
const SLOTS: [(u64, u64, bool); 5] = [
    (0, 0x20, false),
    (0x20, 0x38, false),
    (0x38, 0x40, true),
    (0x48, 0x300, false),
    (0x300, END, false),
];
/// Frames between which the guest spreads its data.
const NEAR: [u64; 5] = [DATA, 0x1fc, 0x2fc, HUGE, HUGE + 0x1f0];

struct World {
    vm: Vm,
    random: Random,
    /// The modes that its vCPUs may use.
    modes: Vec<Mode>,
    /// Each frame of tables is mostly used at one level.
    orderly: bool,
    /// The addresses of data that each vCPU uses.
    addresses: [Vec<u64>; 2],
    /// What happened, and how often.
    done: BTreeMap<&'static str, u64>,
}

/// Where the kernel sees a frame of tables.
fn kernel_va(paging: &Paging, gfn: u64) -> u64 {
    if paging.mode == Mode::Bits32 {
        // An entry of the map is two, the second of which is not present.
        return 0xff80_0000 | gfn << 13;
    }
    let top = paging.top();
    let upper = (2..=top).fold(0, |va, level| va | 511 << paging.shift(level));
    let quarter = if paging.mode == Mode::Pae { 3 << 30 } else { 0 };
    quarter | upper | gfn << 12
}

/// A machine: its format, whether its CPU logs, the modes of guests on it, and the bits of its addresses.
fn machine(random: &mut Random) -> (SpteFormat, bool, Vec<Mode>, u32) {
    let bits = [36, 39, 40, 46, 48, 51, 52][random.below(7) as usize];
    if random.once_in(3) {
        let format = format::ept_of(bits, !random.once_in(3));
        let pml = format.ad_enabled && random.once_in(2);
        return (format, pml, vec![Mode::Ept], bits);
    }
    let nested = random.once_in(3);
    let modes = match nested {
        true => vec![Mode::Level4By5, Mode::Level5],
        false => vec![Mode::Bits32, Mode::Pae, Mode::Level4, Mode::Level5],
    };
    (format::npt_of(bits), false, modes, bits)
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            random.below(2);
        }
        let (format, pml, modes, bits) = machine(&mut random);
        let mut paging = Paging::new(modes[0]);
        paging.bits = 36 + random.below(u64::from(bits) - 35) as u32;
        let nested = modes.len() != 4;
        paging.nested = nested;
        paging.ad = format.ad_enabled;
        let slots = SLOTS.map(|(start, end, _)| Slot::new(start, end, false));
        let mut vm = Vm::new(format, paging, slots.into(), 2);
        vm.machine.pml = pml;
        vm.machine.recursive_zap.set(nested);
        for (number, &(start, end, read_only)) in SLOTS.iter().enumerate() {
            if read_only {
                vm.ram.remove(start..end);
                vm.ram.add(start..end, true);
            }
            assert!(vm.machine.slots[number].valid.get());
        }
        vm.ram.remove(0x40..0x48);
        let mut world = World {
            vm,
            random,
            modes,
            orderly: !seed.is_multiple_of(4),
            addresses: Default::default(),
            done: BTreeMap::new(),
        };
        world.fill();
        world.choose_addresses();
        for vcpu in 0..2 {
            world.change_registers(vcpu);
        }
        world
    }

    fn note(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    /// Writes the tables that there are at the beginning.
    fn fill(&mut self) {
        let paging = self.vm.paging;
        let flags = match paging.is_ept() {
            true => paging.full(),
            // Users must not see their tables, or no vCPU with SMAP could change them.
            false => FULL & !U,
        };
        for gfn in ROOTS..TABLES_END {
            self.set(MAP, gfn, gfn << 12 | flags);
        }
        self.set(MAP, 511, MAP << 12 | flags);
        for root in 0..ROOT_COUNT {
            self.set(ROOTS + root, 511, MAP << 12 | flags);
            for i in 0..4 {
                let table = ROOTS + (root + i) % ROOT_COUNT;
                self.set(PDPTS + root, i, table << 12 | 1);
            }
        }
        for table in (ROOTS..ROOTS + ROOT_COUNT).chain(TABLES..TABLES_END) {
            for index in (0..6).chain(256..258) {
                let entry = self.entry(paging, table);
                self.set(table, index, entry);
            }
        }
    }

    /// Writes an entry of eight bytes before anything runs.
    fn set(&self, table: u64, index: u64, value: u64) {
        let width = rmmu_engine::mmu::shadow::guest::Width::Eight;
        self.vm.ram.store(table << 12 | index << 3, width, value);
    }

    fn vcpu(&mut self) -> usize {
        self.random.below(2) as usize
    }

    /// A frame that is meant for a table, memory or not.
    fn table(&mut self) -> u64 {
        match self.random.below(8) {
            0 => ROOTS + self.random.below(ROOT_COUNT),
            _ => TABLES + self.random.below(TABLES_END - TABLES),
        }
    }

    /// The level at which a frame of tables is mostly used.
    fn level_of(&self, paging: &Paging, table: u64) -> u8 {
        match table {
            ..TABLES => paging.top(),
            _ if table.is_multiple_of(2) => 1,
            _ if table % 4 == 1 => 2,
            _ if table % 8 == 3 => 3,
            _ => 4,
        }
    }

    /// A frame for a table below another one.
    fn table_below(&mut self, paging: &Paging, level: u8) -> u64 {
        for _ in 0..50 {
            let table = self.table();
            let there = self.vm.ram.contains(Gfn(table)) || self.random.once_in(20);
            if there && (!self.orderly || self.level_of(paging, table) + 1 == level) {
                return table;
            }
        }
        TABLES
    }

    /// A frame of data, or just behind the end of a slot.
    fn data(&mut self) -> u64 {
        let near = NEAR[self.random.below(5) as usize];
        near + self.random.below(8)
    }

    /// An entry of a table, for whatever level.
    fn entry(&mut self, paging: Paging, table: u64) -> u64 {
        let mut flags = paging.full();
        let ept = paging.is_ept();
        let third = if ept { 7 } else { U };
        for bit in [W, third, paging.accessed(), paging.dirty()] {
            if self.random.once_in(12) {
                flags &= !bit;
            }
        }
        if self.random.once_in(10) {
            flags = paging.no_exec(flags);
        }
        // Protection keys and what software keeps in an entry, which PAE alone does
        // not have.
        if !self.modes.contains(&Mode::Pae) {
            flags |= self.random.below(1 << 11) << 52 & self.ignored(ept);
        }
        let level = self.level_of(&paging, table);
        let below = match level {
            1 if self.orderly => 37,
            _ if self.orderly => 3,
            _ => 20,
        };
        let gfn = match self.random.below(60) {
            0 => return 0,
            1 => return self.table() << 12 | paging.not_present(flags),
            2 if paging.bits < 52 => return DATA << 12 | flags | 1 << 51,
            3 => table,
            4 => self.table(),
            5 | 6 => END + self.random.below(4),
            // The last frame there can be.
            7 => (1 << (paging.bits - 12)) - 1 - self.random.below(2),
            8..=10 => {
                let align = 1 << (paging.shift(2) - 12);
                let large = self.random.below(END / align + 1) * align;
                return large << 12 | flags | PS;
            }
            n if n % 40 >= below => self.table_below(&paging, level),
            _ => self.data(),
        };
        gfn << 12 | flags
    }

    fn ignored(&mut self, ept: bool) -> u64 {
        match self.random.below(3) {
            // Bits 52 to 62; with EPT some of them have a meaning that we do not offer.
            0 if !ept => 0x7ff << 52,
            1 => 0xf << 52,
            _ => 0,
        }
    }

    fn index(&mut self) -> u64 {
        match self.random.below(10) {
            0 => 256 + self.random.below(2),
            1..=3 => 2 + self.random.below(4),
            _ => self.random.below(2),
        }
    }

    /// New addresses to look at, for the ways in which the vCPUs page now.
    fn choose_addresses(&mut self) {
        let mut watched = BTreeSet::new();
        for vcpu in 0..2 {
            let paging = self.vm.paging_of(vcpu);
            self.addresses[vcpu].clear();
            for _ in 0..16 {
                let mut va = 0;
                for level in 1..=paging.top() {
                    let mut index = self.index();
                    if paging.mode == Mode::Bits32 {
                        index *= 2;
                    }
                    va |= index << paging.shift(level);
                }
                if paging.mode == Mode::Pae {
                    va |= self.random.below(3) << 30;
                }
                watched.insert(va >> 12);
                self.addresses[vcpu].push(va);
            }
            for gfn in (ROOTS..ROOTS + ROOT_COUNT).chain(TABLES..TABLES_END) {
                watched.insert(kernel_va(&paging, gfn) >> 12);
            }
        }
        self.vm.watched = watched;
    }

    /// An address that a vCPU uses, tables as the kernel sees them included.
    fn address(&mut self, vcpu: usize) -> u64 {
        if !self.random.once_in(6) {
            return self.addresses[vcpu][self.random.below(16) as usize];
        }
        let n = self.random.below(self.vm.watched.len() as u64) as usize;
        self.vm.watched.iter().nth(n).unwrap() << 12
    }

    /// A value for CR3: mostly a root, which may be in memory or not.
    fn cr3(&mut self, paging: &Paging) -> u64 {
        let any = self.random.once_in(6);
        let gfn = match paging.mode {
            _ if any => self.table(),
            Mode::Pae => PDPTS + self.random.below(3),
            _ => ROOTS + self.random.below(ROOT_COUNT),
        };
        gfn << 12
    }

    /// CR0, CR4 and EFER change, by the guest or by who runs it.
    fn change_registers(&mut self, vcpu: usize) {
        let mut paging = self.vm.paging_of(vcpu);
        let mode = paging.mode;
        if self.random.once_in(3) {
            paging.mode = self.modes[self.random.below(self.modes.len() as u64) as usize];
        }
        if paging.is_ept() {
            paging.ad = self.random.once_in(2)
                && rmmu_engine::mmu::Host::format(&self.vm.machine).ad_enabled;
        } else {
            let flags = self.random.below(16);
            paging.wp = flags & 1 != 0;
            // Page walks for a nested guest are those of a user.
            paging.smep = flags & 2 != 0 && !paging.nested;
            paging.smap = flags & 4 != 0 && !paging.nested;
            paging.nx = flags & 8 != 0;
        }
        let cr3 = self.cr3(&paging);
        self.vm.set_paging(vcpu, paging, cr3);
        if paging.mode == mode {
            return;
        }
        self.choose_addresses();
        // What the new addresses translate to counts from now on.
        self.vm.ram.changed.set(true);
        for other in 0..2 {
            let cr3 = self.vm.vcpus[other].cr3;
            self.vm.load_cr3(other, cr3, false);
        }
        self.vm.note_tables();
    }

    /// A vCPU changes an entry, through the kernel's map or through the emulator.
    fn write_entry(&mut self, vcpu: usize, table: u64, index: u64, value: u64) {
        let paging = self.vm.paging_of(vcpu);
        let gpa = paging.entry_gpa(Gfn(table), index);
        let slot = self.vm.machine.valid_slot(Gfn(table));
        if slot.is_none() || self.vm.ram.is_rom(Gfn(table)) {
            return;
        }
        let va = kernel_va(&paging, table);
        let mapped = self.vm.translate(vcpu, va);
        let stores = mapped.is_some_and(|Translation { gfn, access }| {
            gfn.0 == table && access & rmmu_engine::mmu::types::ACC_WRITE != 0
        });
        self.vm.unprotect.set(self.random.once_in(3));
        if stores && self.vm.watched.contains(&(va >> 12)) {
            // What an old translation of this address leads to is no table of ours.
            self.vm.invlpg(vcpu, va);
            self.vm.store(vcpu, va | gpa & 0xfff, gpa, value);
            self.note("store");
        } else {
            self.vm.emulated_store_by(vcpu, gpa, value);
            self.note("emulated store");
        }
    }

    fn write_table(&mut self) {
        let vcpu = self.vcpu();
        let paging = self.vm.paging_of(vcpu);
        let (table, mut index) = (self.table(), self.index());
        if paging.mode == Mode::Bits32 {
            index *= 2;
        }
        let gpa = paging.entry_gpa(Gfn(table), index);
        let old = self.vm.ram.load(gpa, paging.width());
        let value = if old != 0 && self.random.once_in(3) {
            let third = if paging.is_ept() { 7 } else { U };
            let bits = [W, third, paging.accessed(), paging.dirty()];
            old ^ bits[self.random.below(4) as usize]
        } else {
            self.entry(paging, table)
        };
        self.write_entry(vcpu, table, index, value);
        if self.random.once_in(3) {
            let va = self.address(vcpu);
            self.vm.invlpg(vcpu, va);
        }
    }

    fn access(&mut self) {
        let vcpu = self.vcpu();
        let va = self.address(vcpu);
        let what = self.random.below(3);
        let kind = Kind {
            write: what == 1,
            exec: what == 2,
            user: self.vm.paging.nested || self.random.once_in(2),
        };
        match self.vm.touch(vcpu, va, kind) {
            Touch::Memory(gfn) if (ROOTS..TABLES_END).contains(&gfn.0) => {
                self.note("table");
                if kind.write && gfn.0 >= TABLES {
                    let paging = self.vm.paging_of(vcpu);
                    let (index, value) = (self.index(), self.entry(paging, gfn.0));
                    let gpa = paging.entry_gpa(gfn, index);
                    self.vm.ram.store(gpa, paging.width(), value);
                    self.vm.note_tables();
                }
            }
            Touch::Memory(_) => self.note("data"),
            Touch::Fault => {
                self.note("fault");
                if !self.random.once_in(3) {
                    self.repair(vcpu, va);
                }
            }
            Touch::Mmio(_) => self.note("MMIO"),
            Touch::Emulated(_) => self.note("emulated"),
            Touch::ReadOnly(_) => self.note("read-only"),
        }
    }

    /// The entry of the last level for an address: its table, its index, and the frame.
    fn leaf(&self, vcpu: usize, va: u64) -> Option<(Gfn, u64, Gfn)> {
        let paging = self.vm.paging_of(vcpu);
        let mut table = self.vm.first_table(vcpu, va);
        for level in (1..=paging.top()).rev() {
            if !self.vm.ram.contains(table) {
                return None;
            }
            let index = paging.index(va, level);
            let gpa = paging.entry_gpa(table, index);
            let entry = self.vm.ram.load(gpa, paging.width());
            if !paging.is_present(entry) || paging.is_reserved(entry, level) {
                return None;
            }
            let frame = paging.frame(entry, level);
            if level == 1 {
                return Some((table, index, frame));
            }
            if paging.is_leaf(entry, level) {
                return None;
            }
            table = frame;
        }
        None
    }

    /// The guest reads through an entry, lets the entry lead to another frame with the
    /// same page of the host, and goes on without a flush.
    fn swap_frames(&mut self) {
        let vcpu = self.vcpu();
        let paging = self.vm.paging_of(vcpu);
        let start = self.random.below(16) as usize;
        let leaves = (start..start + 16).find_map(|number| {
            let va = self.addresses[vcpu][number % 16];
            let (table, index, frame) = self.leaf(vcpu, va)?;
            let pfn = self.vm.ram.backing(frame)?.pfn;
            let owners = self.vm.ram.owners(pfn);
            let other = owners.into_iter().find(|&other| other != frame)?;
            Some((va, table, index, [frame, other]))
        });
        let Some((va, table, index, frames)) = leaves else {
            return;
        };
        let user = self.vm.paging.nested || self.random.once_in(2);
        let [before, after] = frames.map(|frame| frame.0 << 12 | paging.full());
        self.write_entry(vcpu, table.0, index, before & !W);
        self.vm.invlpg(vcpu, va);
        self.swap_touch(vcpu, va, false, user);
        self.write_entry(vcpu, table.0, index, after);
        let write = !self.random.once_in(4);
        self.swap_touch(vcpu, va, write, user);
    }

    /// An access to what [`swap_frames`](World::swap_frames) changes.
    fn swap_touch(&mut self, vcpu: usize, va: u64, write: bool, user: bool) {
        let exec = false;
        if let Touch::Memory(_) = self.vm.touch(vcpu, va, Kind { write, exec, user }) {
            self.note("swapped");
        }
    }

    /// The guest serves its page fault: one entry becomes as it should be.
    fn repair(&mut self, vcpu: usize, va: u64) {
        let paging = self.vm.paging_of(vcpu);
        let mut table = self.vm.first_table(vcpu, va);
        for level in (1..=paging.top()).rev() {
            if !self.vm.ram.contains(table) {
                break;
            }
            let index = paging.index(va, level);
            let gpa = paging.entry_gpa(table, index);
            let entry = self.vm.ram.load(gpa, paging.width());
            let usable = paging.is_present(entry) && !paging.is_reserved(entry, level);
            let frame = paging.frame(entry, level);
            let leaf = level == 1 || paging.is_leaf(entry, level);
            let whole = paging.full();
            if !usable || entry & whole != whole || !leaf && !self.vm.ram.contains(frame) {
                let gfn = match level {
                    1 => self.data(),
                    _ => self.table_below(&paging, level),
                };
                self.write_entry(vcpu, table.0, index, gfn << 12 | whole);
            }
            let entry = self.vm.ram.load(gpa, paging.width());
            if paging.is_leaf(entry, level) {
                break;
            }
            table = paging.frame(entry, level);
        }
        if !self.random.once_in(4) {
            self.vm.invlpg(vcpu, va);
        }
    }

    /// A slot goes, or comes back.
    fn change_slots(&mut self) {
        // The first one has what the others hang on.
        let number = 1 + self.random.below(SLOTS.len() as u64 - 1) as usize;
        if self.vm.machine.slots[number].gone.get() {
            let read_only = self.random.once_in(4) || SLOTS[number].2;
            self.vm.add_slot(number, read_only);
            self.note("a slot comes");
        } else if self.random.once_in(3) {
            let all = self.random.once_in(2);
            self.vm.remove_slot(number, all);
            self.note("a slot goes");
        }
    }

    /// A slot that is there.
    fn slot(&mut self) -> usize {
        loop {
            let number = self.random.below(SLOTS.len() as u64) as usize;
            if !self.vm.machine.slots[number].gone.get() {
                return number;
            }
        }
    }

    /// A few frames of a slot that is there.
    fn frames(&mut self, number: usize) -> GfnRange {
        let (start, end, _) = SLOTS[number];
        let first = start + self.random.below(end - start);
        let most = if self.random.once_in(6) { 600 } else { 5 };
        let last = (first + 1 + self.random.below(most)).min(end);
        GfnRange::new(Gfn(first), Gfn(last))
    }

    fn host(&mut self) {
        let number = self.slot();
        let range = self.frames(number);
        let lift = self.random.once_in(2);
        let writable = !self.random.once_in(4);
        match self.random.below(16) {
            0 | 1 => self.vm.invalidate(range, |ram| {
                for gfn in range.start.0..range.end.0 {
                    ram.huge.borrow_mut().remove(&(gfn >> 9));
                    ram.back(Gfn(gfn), writable);
                }
            }),
            2 if !self.vm.machine.slots[4].gone.get() => {
                let range = GfnRange::of(Gfn(HUGE), Level::L2M);
                self.vm.invalidate(range, |ram| ram.back_huge(Gfn(HUGE)));
            }
            3 | 13 | 14 => {
                // Frames of data share a page. What is written to a table under another
                // name goes unnoticed, with in-tree KVM, too.
                let near = Gfn(NEAR[self.random.below(5) as usize]);
                let range = GfnRange::new(near.add(1), near.add(2 + self.random.below(7)));
                let there = |gfn: u64| self.vm.machine.valid_slot(Gfn(gfn)).is_some();
                if (near.0..range.end.0).all(there) {
                    self.vm.invalidate(range, |ram| {
                        for gfn in range.start.0..range.end.0 {
                            ram.huge.borrow_mut().remove(&(gfn >> 9));
                            ram.share(Gfn(gfn), near);
                        }
                    });
                    self.note("shared");
                }
            }
            4 => {
                let (machine, slot) = (&self.vm.machine, &self.vm.machine.slots[number]);
                machine.write(|lock| self.vm.shadow.age(machine, lock, slot, range, lift));
            }
            5 if !self.vm.machine.slots[number].logged.get() => self.vm.start_logging(number),
            5 | 6 => {
                if self.vm.machine.slots[number].logged.get() {
                    self.harvest(number, lift);
                }
            }
            7 if self.random.once_in(3) => self.vm.zap_fast(),
            8 => {
                let machine = &self.vm.machine;
                machine.write(|lock| self.vm.shadow.recover_nx(machine, lock, 3, |_, _| lift));
            }
            9 => {
                let gfn = Gfn(self.table());
                let machine = &self.vm.machine;
                machine.write(|lock| self.vm.shadow.unprotect_gfn(machine, lock, gfn));
            }
            10 if self.random.once_in(3) => {
                self.vm.machine.nx.set(lift);
                self.vm.zap_fast();
            }
            11 | 12 => {
                // A handful of pages, or plenty.
                let goal = match self.random.below(3) {
                    0 => 1000,
                    1 => 1 + self.random.below(10),
                    _ => 20 + self.random.below(40),
                };
                let machine = &self.vm.machine;
                machine.write(|lock| self.vm.shadow.set_max_pages(machine, lock, goal));
            }
            _ => {
                let (every, once) = (self.random.below(5), self.random.below(2));
                self.vm.machine.break_every.set(every * once);
            }
        }
    }

    fn harvest(&mut self, number: usize, end: bool) {
        let range = self.vm.machine.slots[number].range;
        let all = std::mem::take(&mut self.vm.logged_writes);
        let (mine, others) = all.into_iter().partition(|&gfn| range.contains(Gfn(gfn)));
        self.vm.logged_writes = mine;
        self.note("harvested");
        self.vm.harvest(number);
        self.vm.logged_writes = others;
        let slot = &self.vm.machine.slots[number];
        if end {
            slot.logged.set(false);
            self.vm.machine.write(|lock| {
                let allowed = |gfn| self.vm.max_level(gfn);
                let machine = &self.vm.machine;
                self.vm.shadow.recover_huge(machine, lock, slot, allowed);
            });
        }
    }

    fn step(&mut self) {
        self.vm.prefetch.set(!self.random.once_in(4));
        if self.random.once_in(50) {
            let (pages, descs) = (self.random.below(3), self.random.below(3));
            self.vm.cache.set((pages, descs));
        }
        match self.random.below(60) {
            0..=15 => self.write_table(),
            16..=45 => self.access(),
            46 | 47 => {
                let vcpu = self.vcpu();
                let va = self.address(vcpu);
                self.vm.invlpg(vcpu, va);
            }
            48 | 49 => {
                let vcpu = self.vcpu();
                let paging = self.vm.paging_of(vcpu);
                let keep = !self.random.once_in(3);
                let cr3 = self.cr3(&paging);
                self.vm.load_cr3(vcpu, cr3, keep);
            }
            50 => {
                let vcpu = self.vcpu();
                self.change_registers(vcpu);
                self.note("registers");
            }
            51 => self.change_slots(),
            52 | 53 => self.swap_frames(),
            _ => self.host(),
        }
    }
}

/// Says how to see it again when a VM fails.
struct Progress {
    seed: u64,
    operations: u64,
}

impl Drop for Progress {
    fn drop(&mut self) {
        if thread::panicking() {
            let Progress { seed, operations } = self;
            eprintln!("RMMU_TEST_SEED={seed} fails after {operations} operations");
        }
    }
}

fn run(seed: u64) -> BTreeMap<&'static str, u64> {
    let mut progress = Progress {
        seed,
        operations: 0,
    };
    let mut world = World::new(seed);
    for operation in 0..portion(OPERATIONS) {
        progress.operations = operation + 1;
        world.step();
        world.vm.assert_audit();
        if operation % 64 == 0 {
            world.vm.check();
        }
    }
    world.vm.check();
    let machine = &world.vm.machine;
    for (name, counter) in [
        ("zapped", Counter::ShadowZapped),
        ("synced", Counter::Synced),
        ("recycled", Counter::Recycled),
        ("mapped ahead", Counter::Prefetched),
    ] {
        let count = machine.counter(counter) as u64;
        *world.done.entry(name).or_default() += count;
    }
    let raised = world.vm.raised.get();
    *world.done.entry("quota raised").or_default() += raised;
    let World { vm, done, .. } = world;
    vm.destroy();
    done
}

/// Runs worlds; each kind of event has to be among what happened in them.
fn run_all(first: u64) {
    if let Ok(seed) = env::var("RMMU_TEST_SEED") {
        println!("{:?}", run(seed.parse().expect("a number")));
        return;
    }
    let mut all: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in first..first + WORLDS {
        for (name, count) in run(seed) {
            *all.entry(name).or_default() += count;
        }
    }
    println!("{all:?}");
    for name in [
        "MMIO",
        "a slot comes",
        "a slot goes",
        "data",
        "emulated",
        "emulated store",
        "fault",
        "harvested",
        "mapped ahead",
        "quota raised",
        "read-only",
        "recycled",
        "registers",
        "shared",
        "swapped",
        "store",
        "synced",
        "table",
        "zapped",
    ] {
        let count = all.get(name).copied().unwrap_or(0);
        assert!(count >= portion(30), "{name}: {count} times");
    }
}

#[test]
fn random_worlds() {
    run_all(1);
}

#[test]
fn more_random_worlds() {
    run_all(1000);
}

// SPDX-License-Identifier: GPL-2.0

//! Random processors, what KVM makes of their registers, and random memory.

use super::manual::{Access, Cpu, Mode};
use rmmu_engine::mmu::{
    shadow::guest::{ErrorCode, Exchange, GuestContext, GuestMemory, Width, GROUP},
    Gfn, Level,
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

/// Numbers that are the same in every run.
pub struct Random(pub u64);

pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub fn random_cpu(random: &mut Random, mode: Mode) -> Cpu {
    let long = matches!(mode, Mode::Level4 | Mode::Level5);
    let paging = long || matches!(mode, Mode::Bits32 | Mode::Pae);
    Cpu {
        mode,
        cr3: frame(random.next()) << 12 | random.next() & 0xfff,
        pdpte: core::array::from_fn(|_| frame(random.next()) << 12 | u64::from(!random.once_in(8))),
        pse: mode != Mode::Bits32 || !random.once_in(4),
        wp: !random.once_in(3),
        nxe: paging && mode != Mode::Bits32 && !random.once_in(4),
        smep: paging && random.once_in(2),
        smap: paging && random.once_in(2),
        ac: random.once_in(2),
        pke: long && random.once_in(2),
        pkru: (random.next() & random.next()) as u32,
        physical_bits: [36, 40, 46, 52][random.below(4) as usize],
        gigabyte_pages: !random.once_in(3),
        amd: random.once_in(2),
        ept_accessed_dirty: !random.once_in(3),
        ept_execute_only: random.once_in(2),
        mode_based_execute: random.once_in(2),
    }
}

pub fn random_access(random: &mut Random, cpu: &Cpu) -> Access {
    let what = random.below(3);
    let user = random.once_in(2);
    Access {
        write: what == 1,
        fetch: what == 2,
        user,
        implicit: !user && what == 0 && random.once_in(4),
        paging_structure: cpu.is_ept() && what < 2 && random.once_in(3),
    }
}

/// A frame of the few that tables are in.
fn frame(from: u64) -> u64 {
    mix(from) % 40
}

fn bits(high: u32, low: u32) -> u64 {
    if high < low {
        return 0;
    }
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// The masks of reserved bits, as KVM holds them.
fn reserved_masks(cpu: &Cpu) -> [[u64; 5]; 2] {
    let m = cpu.physical_bits;
    let nx = if cpu.nxe { 0 } else { 1 << 63 };
    let bit8 = if cpu.amd { 1 << 8 } else { 0 };
    let giga = if cpu.gigabyte_pages { 0 } else { 1 << 7 };
    match cpu.mode {
        Mode::Bits32 => {
            let large = if cpu.pse { bits(21, 17) } else { 0 };
            [[0; 5], [0, large, 0, 0, 0]]
        }
        Mode::Pae => {
            let high = bits(62, m) | nx;
            [[high, high, 0, 0, 0], [high, high | bits(20, 13), 0, 0, 0]]
        }
        Mode::Level4 | Mode::Level5 => {
            let high = bits(51, m) | nx;
            let top = high | 1 << 7 | bit8;
            [
                [high, high, high | giga, top, top],
                [
                    high,
                    high | bits(20, 13),
                    high | bits(29, 13) | giga,
                    top,
                    top,
                ],
            ]
        }
        Mode::Ept4 | Mode::Ept5 => {
            let high = bits(51, m);
            let top = high | bits(7, 3);
            let table = high | bits(6, 3);
            [
                [high, table, table | giga, top, top],
                [
                    high,
                    high | bits(20, 12),
                    high | bits(29, 12) | giga,
                    top,
                    top,
                ],
            ]
        }
    }
}

fn bad_combinations(cpu: &Cpu) -> u64 {
    (0..64u64)
        .filter(|low| {
            let (memory_type, r, w, x) = (low >> 3, low & 1, low >> 1 & 1, low >> 2 & 1);
            let bad_type = [2, 3, 7].contains(&memory_type);
            let bad_access = r == 0 && (w == 1 || x == 1 && !cpu.ept_execute_only);
            bad_type || bad_access
        })
        .fold(0, |mask, low| mask | 1 << low)
}

/// For each kind of access, which combinations of the bits read 1, write 2, user 4
/// and execute 8 fault. An access that SMAP does not apply to has the bit of RSVD.
fn permissions(cpu: &Cpu) -> [u16; 16] {
    core::array::from_fn(|index| {
        let code = (index as u64) << 1;
        let [write, user, no_smap, fetch] = [1, 2, 3, 4].map(|n| code >> n & 1 == 1);
        (0..16u16)
            .filter(|access| {
                let [r, w, u, x] = [0, 1, 2, 3].map(|n| access >> n & 1 == 1);
                if cpu.is_ept() {
                    let execute = if cpu.mode_based_execute && user { u } else { x };
                    return write && !w || fetch && !execute || !write && !fetch && !r;
                }
                let data_by_supervisor = !user && !fetch;
                !write && !fetch && !r
                    || write && !w && (user || cpu.wp)
                    || user && !u
                    || fetch && cpu.nxe && !x
                    || fetch && cpu.smep && !user && u
                    || data_by_supervisor && cpu.smap && u && !no_smap
            })
            .fold(0, |mask, access| mask | 1 << access)
    })
}

/// Two bits for each even error code: whether access-disable and write-disable of the
/// key count. The bit of RSVD stands for a user page.
fn key_mask(cpu: &Cpu) -> u32 {
    if !cpu.pke {
        return 0;
    }
    (0..32u32).step_by(2).fold(0, |mask, code| {
        let [write, user, user_page, fetch] = [1, 2, 3, 4].map(|n| code >> n & 1 == 1);
        let access_disable = user_page && !fetch;
        let write_disable = access_disable && write && (user || cpu.wp);
        mask | (u32::from(access_disable) | u32::from(write_disable) << 1) << code
    })
}

/// What KVM would make of the processor's registers.
pub fn context(cpu: &Cpu) -> GuestContext {
    let level = match cpu.mode {
        Mode::Bits32 => Level::L2M,
        Mode::Pae => Level::L1G,
        Mode::Level4 | Mode::Ept4 => Level::L512G,
        Mode::Level5 | Mode::Ept5 => Level::L256T,
    };
    GuestContext {
        level,
        root: cpu.cr3,
        pdptrs: cpu.pdpte,
        pse: cpu.pse,
        accessed_dirty: cpu.accessed_dirty_bits().is_some(),
        mbec: cpu.is_ept() && cpu.mode_based_execute,
        reports_fetch: cpu.nxe || cpu.smep,
        nested: cpu.is_ept(),
        rsvd: reserved_masks(cpu),
        bad_mt_xwr: if cpu.is_ept() {
            bad_combinations(cpu)
        } else {
            0
        },
        permissions: permissions(cpu),
        pkru_mask: key_mask(cpu),
        pkru: cpu.pkru,
        ac: cpu.ac,
    }
}

pub fn error_code(access: Access) -> ErrorCode {
    let mut code = ErrorCode::NONE;
    for (set, bit) in [
        (access.write, ErrorCode::WRITE),
        (access.user, ErrorCode::USER),
        (access.fetch, ErrorCode::FETCH),
        (access.implicit, ErrorCode::IMPLICIT),
        (access.paging_structure, ErrorCode::GUEST_PAGE),
    ] {
        if set {
            code = code | bit;
        }
    }
    code
}

/// What another CPU of the guest does when an entry is about to be exchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Racer {
    Idle,
    /// Changes this many entries that are about to be exchanged.
    Entry(u32),
    /// Changes another entry of the path once.
    Other,
}

/// The guest's memory: entries come into being when they are first read.
pub struct Memory {
    seed: u64,
    mode: Mode,
    physical_bits: u32,
    /// Frames without a slot, in a read-only slot, and out of the host's reach.
    no_slot: u64,
    read_only: u64,
    unreachable: u64,
    words: RefCell<BTreeMap<u64, u64>>,
    racer: Cell<Racer>,
    /// The entries read since the walk began anew, and the memory at that time.
    seen: RefCell<Vec<u64>>,
    at_start: RefCell<BTreeMap<u64, u64>>,
    pub tries: Cell<u32>,
    exchanges: Cell<u32>,
    pub log_full: Cell<bool>,
    pub logged: Cell<u32>,
    changes: Cell<u64>,
}

impl Memory {
    pub fn new(random: &mut Random, cpu: &Cpu) -> Memory {
        let rare = |random: &mut Random| {
            if random.once_in(3) {
                1 << random.below(40)
            } else {
                0
            }
        };
        Memory {
            seed: random.next(),
            mode: cpu.mode,
            physical_bits: cpu.physical_bits,
            no_slot: rare(random),
            read_only: rare(random) | rare(random),
            unreachable: rare(random),
            words: RefCell::default(),
            racer: Cell::new(Racer::Idle),
            seen: RefCell::default(),
            at_start: RefCell::default(),
            tries: Cell::new(0),
            exchanges: Cell::new(0),
            log_full: Cell::new(false),
            logged: Cell::new(0),
            changes: Cell::new(0),
        }
    }

    /// Before a walk: who races it.
    pub fn expect(&self, racer: Racer) {
        self.racer.set(racer);
        self.seen.borrow_mut().clear();
        self.tries.set(0);
        self.exchanges.set(0);
        self.logged.set(0);
        self.at_start.replace(self.words.borrow().clone());
    }

    /// The entry as it was when the last try of the walk began.
    pub fn at_start(&self, gpa: u64) -> Option<u64> {
        if self.lacks(gpa >> 12) {
            return None;
        }
        let words = self.at_start.borrow();
        Some(words.get(&gpa).copied().unwrap_or_else(|| self.fresh(gpa)))
    }

    pub fn now(&self, gpa: u64) -> u64 {
        let words = self.words.borrow();
        words.get(&gpa).copied().unwrap_or_else(|| self.fresh(gpa))
    }

    pub fn everything(&self) -> BTreeMap<u64, u64> {
        self.words.borrow().clone()
    }

    pub fn is_read_only(&self, frame: u64) -> bool {
        frame < 64 && self.read_only >> frame & 1 == 1
    }

    fn lacks(&self, frame: u64) -> bool {
        frame >= 64 || (self.no_slot | self.unreachable) >> frame & 1 == 1
    }

    fn width(&self) -> Width {
        if self.mode == Mode::Bits32 {
            Width::Four
        } else {
            Width::Eight
        }
    }

    fn fresh(&self, gpa: u64) -> u64 {
        let mut random = Random(self.seed ^ mix(gpa));
        self.entry(&mut random)
    }

    /// An entry that is mostly good for something at some level.
    fn entry(&self, random: &mut Random) -> u64 {
        let ept = matches!(self.mode, Mode::Ept4 | Mode::Ept5);
        let often = |random: &mut Random, bit: u32, n| u64::from(!random.once_in(n)) << bit;
        let seldom = |random: &mut Random, bit: u32, n| u64::from(random.once_in(n)) << bit;
        let large = random.once_in(5);
        let mut entry = if large {
            let align = [21, 22, 30][random.below(3) as usize];
            let reach = match self.mode {
                Mode::Bits32 => 32,
                _ => self.physical_bits,
            };
            random.next() & bits(reach - 1, align) | 1 << 7
        } else {
            frame(random.next()) << 12
        };
        if self.mode == Mode::Bits32 && large {
            entry |= random.next() & bits(16, 13);
        }
        if ept {
            entry |= often(random, 0, 12) | often(random, 1, 6) | often(random, 2, 6);
            entry |= seldom(random, 8, 2) | seldom(random, 9, 2) | often(random, 10, 5);
            entry |= random.next() & bits(63, 52) | seldom(random, 11, 2);
            if large || random.once_in(4) {
                entry |= [0, 1, 4, 5, 6, 6, 6, 2][random.below(8) as usize] << 3;
            }
        } else {
            entry |= often(random, 0, 16) | often(random, 1, 6) | often(random, 2, 5);
            entry |= seldom(random, 5, 2) | seldom(random, 6, 2);
            entry |= random.next() & (bits(4, 3) | bits(11, 9)) | seldom(random, 8, 8);
            if self.mode != Mode::Bits32 {
                entry |= seldom(random, 63, 8);
                if self.mode != Mode::Pae || random.once_in(16) {
                    entry |= random.next() & bits(62, 52);
                }
            }
        }
        if random.once_in(16) {
            entry ^= 1 << random.below(64);
        }
        if random.once_in(24) {
            entry = random.next();
        }
        if self.mode == Mode::Bits32 {
            entry &= 0xffff_ffff;
        }
        entry
    }

    /// Another CPU writes: bits change, or all of the entry.
    fn scribble(&self, gpa: u64, harmless: bool) {
        let n = self.changes.get() + 1;
        self.changes.set(n);
        let mut random = Random(mix(self.seed ^ n) ^ gpa);
        let old = self.now(gpa);
        let mut new = old;
        while new == old {
            new = match random.below(3) {
                // Ignored in all formats.
                _ if harmless => old ^ 1 << 11,
                0 => self.entry(&mut random),
                1 => old ^ 1 << random.below(12),
                _ => old ^ (1 << 5 | 1 << 6),
            };
            if self.mode == Mode::Bits32 {
                new &= 0xffff_ffff;
            }
        }
        self.words.borrow_mut().insert(gpa, new);
    }

    fn race(&self, gpa: u64) {
        match self.racer.get() {
            Racer::Idle => {}
            Racer::Entry(left) => {
                // Few entries survive many changes of all kinds.
                self.scribble(gpa, left > 8);
                self.racer.set(match left {
                    1 => Racer::Idle,
                    n => Racer::Entry(n - 1),
                });
            }
            Racer::Other => {
                let other = self.seen.borrow().iter().copied().find(|seen| *seen != gpa);
                if let Some(other) = other {
                    self.scribble(other, false);
                    self.racer.set(Racer::Idle);
                }
            }
        }
    }
}

impl GuestMemory for Memory {
    type Page = u64;

    fn page(&self, table: Gfn) -> Option<u64> {
        let none = table.0 >= 64 || self.no_slot >> table.0 & 1 == 1;
        (!none).then_some(table.0 << 12)
    }

    fn is_writable(&self, page: u64) -> bool {
        !self.is_read_only(page >> 12)
    }

    fn read(&self, page: u64, offset: u16, width: Width) -> Option<u64> {
        assert_eq!(width, self.width());
        let gpa = page | u64::from(offset);
        // A walk reads everything before it writes: this is the start of another try.
        if self.seen.borrow().is_empty() || self.exchanges.get() > 0 {
            self.tries.set(self.tries.get() + 1);
            self.at_start.replace(self.words.borrow().clone());
            self.seen.borrow_mut().clear();
            self.exchanges.set(0);
        }
        self.seen.borrow_mut().push(gpa);
        (!self.lacks(page >> 12)).then(|| self.now(gpa))
    }

    fn compare_exchange(
        &self,
        page: u64,
        offset: u16,
        width: Width,
        old: u64,
        new: u64,
    ) -> Exchange {
        assert_eq!(width, self.width());
        let gpa = page | u64::from(offset);
        assert!(self.is_writable(page), "a read-only table is written");
        self.exchanges.set(self.exchanges.get() + 1);
        self.race(gpa);
        if self.now(gpa) != old {
            return Exchange::Changed;
        }
        self.words.borrow_mut().insert(gpa, new);
        Exchange::Done
    }

    fn read_now(&self, gpa: u64, width: Width) -> Option<u64> {
        assert_eq!(width, self.width());
        assert_eq!(gpa % u64::from(width.bytes()), 0);
        (!self.lacks(gpa >> 12)).then(|| self.now(gpa))
    }

    fn read_group_now(&self, gpa: u64, width: Width, group: &mut [u64; GROUP]) -> bool {
        for (n, entry) in group.iter_mut().enumerate() {
            match self.read_now(gpa + n as u64 * u64::from(width.bytes()), width) {
                Some(value) => *entry = value,
                None => return false,
            }
        }
        true
    }

    fn log_dirty(&self, _address: u64) -> bool {
        self.logged.set(self.logged.get() + 1);
        !self.log_full.get()
    }
}

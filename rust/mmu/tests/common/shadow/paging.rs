// SPDX-License-Identifier: GPL-2.0

//! How the guest pages: its modes, what KVM makes of them, and a plain reading of
//! its tables.

use super::{
    cpu::{Kind, Rules},
    ram::Ram,
};
use rmmu_engine::mmu::{
    shadow::{
        guest::{ErrorCode, GuestContext, Width},
        PageRole,
    },
    types::{ACC_ALL, ACC_EXEC, ACC_READ, ACC_USER, ACC_WRITE},
    Gfn, Level,
};

pub const P: u64 = 1 << 0;
pub const W: u64 = 1 << 1;
pub const U: u64 = 1 << 2;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const NX: u64 = 1 << 63;
/// Present and all that it takes to be used for anything.
pub const FULL: u64 = P | W | U | A | D;

/// The guest's paging mode, and that of what shadows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Bits32,
    Pae,
    Level4,
    Level5,
    /// Four levels, shadowed by five: nested paging.
    Level4By5,
    /// Four levels of EPT, nested.
    Ept,
}

/// The guest's registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paging {
    pub mode: Mode,
    pub wp: bool,
    pub smep: bool,
    /// The tables translate a nested guest's addresses.
    pub nested: bool,
    /// Accessed and dirty bits are in use.
    pub ad: bool,
    pub smap: bool,
    /// `EFER.NX`.
    pub nx: bool,
    /// Bits of a physical address of the guest.
    pub bits: u32,
}

/// What the guest's tables make of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    pub gfn: Gfn,
    /// No write unless the page is dirty.
    pub access: u8,
}

impl Translation {
    /// The guest's tables allow the access.
    pub fn allows(&self, paging: &Paging, kind: Kind) -> bool {
        let has = |bits: u8| self.access & bits == bits;
        if paging.is_ept() {
            return match kind {
                Kind { write: true, .. } => has(ACC_WRITE),
                Kind { exec: true, .. } => has(ACC_EXEC),
                _ => has(ACC_READ),
            };
        }
        if kind.user && !has(ACC_USER) {
            return false;
        }
        if kind.exec {
            let smep = paging.smep && !kind.user && has(ACC_USER);
            return has(ACC_EXEC) && !smep;
        }
        if paging.smap && !kind.user && has(ACC_USER) {
            return false;
        }
        !kind.write || has(ACC_WRITE)
    }
}

impl Paging {
    pub fn new(mode: Mode) -> Paging {
        Paging {
            mode,
            wp: true,
            smep: false,
            nested: matches!(mode, Mode::Level4By5 | Mode::Ept),
            ad: true,
            smap: false,
            nx: true,
            bits: 46,
        }
    }

    pub fn rules(&self) -> Rules {
        Rules {
            smep: self.smep,
            smap: self.smap,
        }
    }

    pub fn is_ept(&self) -> bool {
        self.mode == Mode::Ept
    }

    /// Present and all that it takes to be used for anything.
    pub fn full(&self) -> u64 {
        if self.is_ept() {
            0b111 | self.accessed() | self.dirty()
        } else {
            FULL
        }
    }

    pub fn accessed(&self) -> u64 {
        if self.is_ept() {
            1 << 8
        } else {
            A
        }
    }

    pub fn dirty(&self) -> u64 {
        if self.is_ept() {
            1 << 9
        } else {
            D
        }
    }

    /// An entry that must not be executed.
    pub fn no_exec(&self, entry: u64) -> u64 {
        match self.mode {
            Mode::Ept => entry & !4,
            Mode::Bits32 => entry,
            _ => entry | NX,
        }
    }

    pub fn is_present(&self, entry: u64) -> bool {
        if self.is_ept() {
            entry & 7 != 0
        } else {
            entry & P != 0
        }
    }

    /// An entry of these flags that is not present.
    pub fn not_present(&self, entry: u64) -> u64 {
        if self.is_ept() {
            entry & !7
        } else {
            entry & !P
        }
    }

    pub fn width(&self) -> Width {
        match self.mode {
            Mode::Bits32 => Width::Four,
            _ => Width::Eight,
        }
    }

    pub fn entry_bytes(&self) -> u64 {
        match self.width() {
            Width::Four => 4,
            Width::Eight => 8,
        }
    }

    /// The level of the first table in memory, PDPTEs apart.
    pub fn top(&self) -> u8 {
        match self.mode {
            Mode::Bits32 | Mode::Pae => 2,
            Mode::Level4 | Mode::Level4By5 | Mode::Ept => 4,
            Mode::Level5 => 5,
        }
    }

    /// Bits of an address that index a table.
    pub fn index_bits(&self) -> u32 {
        match self.mode {
            Mode::Bits32 => 10,
            _ => 9,
        }
    }

    pub fn shift(&self, level: u8) -> u32 {
        12 + u32::from(level - 1) * self.index_bits()
    }

    /// The index of an address in a table.
    pub fn index(&self, va: u64, level: u8) -> u64 {
        va >> self.shift(level) & ((1 << self.index_bits()) - 1)
    }

    /// The address of an entry of a table.
    pub fn entry_gpa(&self, table: Gfn, index: u64) -> u64 {
        table.to_gpa() + index * self.entry_bytes()
    }

    pub fn rsvd(&self) -> [[u64; 5]; 2] {
        let high = (1 << 52) - (1 << self.bits);
        match self.mode {
            Mode::Bits32 => [[0; 5], [0, 0x1f << 17, 0, 0, 0]],
            Mode::Ept => {
                let table = high | 0xf << 3;
                [
                    [high, table, table, table | PS, table | PS],
                    [high, high | 0x1ff << 12, high | PS, high | PS, high | PS],
                ]
            }
            _ => {
                let high = high | if self.nx { 0 } else { NX };
                [
                    [high, high, high | PS, high | PS, high | PS],
                    [high, high | 0xff << 13, high | PS, high | PS, high | PS],
                ]
            }
        }
    }

    pub fn context(&self, root: u64, pdptrs: [u64; 4]) -> GuestContext {
        let level = match self.mode {
            Mode::Bits32 => Level::L2M,
            Mode::Pae => Level::L1G,
            Mode::Level4 | Mode::Level4By5 | Mode::Ept => Level::L512G,
            Mode::Level5 => Level::L256T,
        };
        GuestContext {
            level,
            root,
            pdptrs,
            pse: true,
            accessed_dirty: self.ad,
            mbec: false,
            reports_fetch: true,
            nested: self.nested,
            rsvd: self.rsvd(),
            bad_mt_xwr: if self.is_ept() {
                crate::common::format::ept(true).bad_mt_xwr
            } else {
                0
            },
            permissions: self.permissions(),
            pkru_mask: 0,
            pkru: 0,
            ac: false,
        }
    }

    /// For each kind of access, the combinations of access bits it faults on.
    fn permissions(&self) -> [u16; 16] {
        core::array::from_fn(|index| {
            let code = (index as u64) << 1;
            let (write, user, exec) = (code & 2 != 0, code & 4 != 0, code & 16 != 0);
            (0..16u8)
                .filter(|access| {
                    if self.is_ept() {
                        let right = if write {
                            ACC_WRITE
                        } else if exec {
                            ACC_EXEC
                        } else {
                            ACC_READ
                        };
                        return access & right == 0;
                    }
                    let w = access & ACC_WRITE != 0 || !user && !self.wp;
                    let u = access & ACC_USER != 0;
                    let smep = self.smep && !user && u;
                    let smap = self.smap && !user && !exec && u;
                    access & ACC_READ == 0
                        || smap
                        || write && !w
                        || user && !u
                        || exec && (access & ACC_EXEC == 0 || smep)
                })
                .fold(0, |mask, access| mask | 1 << access)
        })
    }

    pub fn error_code(&self, kind: Kind) -> ErrorCode {
        let mut code = ErrorCode::NONE;
        if kind.write {
            code = code | ErrorCode::WRITE;
        }
        if kind.user {
            code = code | ErrorCode::USER;
        }
        if kind.exec {
            code = code | ErrorCode::FETCH;
        }
        code
    }

    /// The role of the root.
    pub fn root_role(&self) -> PageRole {
        let level = match self.mode {
            Mode::Bits32 | Mode::Pae => 3,
            Mode::Level4 | Mode::Ept => 4,
            Mode::Level5 | Mode::Level4By5 => 5,
        };
        let flag = |set: bool, bit: u32| u32::from(set) << bit;
        PageRole(
            level
                | flag(self.mode == Mode::Bits32, 4)
                | u32::from(ACC_ALL) << 8
                | flag(self.nx || self.mode == Mode::Ept, 13)
                | flag(self.wp, 14)
                | flag(self.smap && !self.wp, 15)
                | flag(!self.ad, 16)
                | flag(self.nested, 17)
                | flag(self.mode == Mode::Level4By5, 18)
                | flag(self.smep, 20),
        )
    }

    /// What an entry allows by itself.
    pub fn access(&self, entry: u64) -> u8 {
        let set = |bit: u64, access: u8| if entry & bit != 0 { access } else { 0 };
        if self.is_ept() {
            return set(1, ACC_READ)
                | set(2, ACC_WRITE)
                | set(4, ACC_EXEC)
                | set(1 << 10, ACC_USER);
        }
        let exec = if entry & NX == 0 { ACC_EXEC } else { 0 };
        ACC_READ | set(W, ACC_WRITE) | set(U, ACC_USER) | exec
    }

    pub fn is_reserved(&self, entry: u64, level: u8) -> bool {
        let large = usize::from(entry & PS != 0);
        let bad = self.is_ept() && {
            // Write without read, execute without read, no such memory type.
            let (xwr, memtype) = (entry & 7, entry >> 3 & 7);
            [2, 4, 6].contains(&xwr) || [2, 3, 7].contains(&memtype)
        };
        bad || entry & self.rsvd()[large][usize::from(level - 1)] != 0
    }

    pub fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level == 1 || level == 2 && entry & PS != 0
    }

    /// The frame an entry points to.
    pub fn frame(&self, entry: u64, level: u8) -> Gfn {
        let address = match self.width() {
            Width::Four => entry & 0xffff_f000,
            Width::Eight => entry & 0xf_ffff_ffff_f000,
        };
        let mask = if self.is_leaf(entry, level) {
            (1u64 << self.shift(level)) - 1
        } else {
            0xfff
        };
        Gfn((address & !mask) >> 12)
    }

    /// Reads the guest's tables; nothing if an entry on the way was not accessed.
    pub fn translate(
        &self,
        ram: &Ram,
        root: u64,
        pdptrs: &[u64; 4],
        va: u64,
    ) -> Option<Translation> {
        let mut table = Gfn(root >> 12);
        if self.mode == Mode::Pae {
            let pdpte = pdptrs[(va >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return None;
            }
            table = Gfn(pdpte >> 12);
        }
        let mut access = ACC_ALL;
        for level in (1..=self.top()).rev() {
            if !ram.contains(table) {
                return None;
            }
            let entry = ram.load(self.entry_gpa(table, self.index(va, level)), self.width());
            let rom = ram.is_rom(table);
            let accessed = !self.ad || rom || entry & self.accessed() != 0;
            if !self.is_present(entry) || !accessed || self.is_reserved(entry, level) {
                return None;
            }
            access &= self.access(entry);
            let frame = self.frame(entry, level);
            if self.is_leaf(entry, level) {
                if self.ad && !rom && entry & self.dirty() == 0 {
                    access &= !ACC_WRITE;
                }
                let inside = (va & ((1 << self.shift(level)) - 1)) >> 12;
                let gfn = Gfn(frame.0 + inside);
                return Some(Translation { gfn, access });
            }
            table = frame;
        }
        None
    }
}

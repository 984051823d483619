// SPDX-License-Identifier: GPL-2.0

//! What the processor manuals say about an address, written down plainly: one
//! function a paging mode, no masks that are made elsewhere. Intel's manual, chapters
//! "Paging" and "VMX support for address translation"; where AMD differs, a flag.

/// The paging modes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Bits32,
    Pae,
    Level4,
    Level5,
    Ept4,
    Ept5,
}

/// The registers and features that matter.
#[derive(Clone, Debug)]
pub struct Cpu {
    pub mode: Mode,
    pub cr3: u64,
    pub pdpte: [u64; 4],
    pub pse: bool,
    pub wp: bool,
    pub nxe: bool,
    pub smep: bool,
    pub smap: bool,
    pub ac: bool,
    pub pke: bool,
    pub pkru: u32,
    pub physical_bits: u32,
    pub gigabyte_pages: bool,
    /// Bit 8 of an entry of the upper levels is reserved.
    pub amd: bool,
    pub ept_accessed_dirty: bool,
    pub ept_execute_only: bool,
    pub mode_based_execute: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub write: bool,
    pub fetch: bool,
    pub user: bool,
    /// The processor's own, to a structure of the system.
    pub implicit: bool,
    /// EPT: to a paging structure of the guest.
    pub paging_structure: bool,
}

/// An entry that the processor read.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    pub gpa: u64,
    pub value: u64,
    pub level: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    NotPresent,
    Reserved,
    /// Whether a protection key is among the reasons.
    Protection {
        key: bool,
    },
}

#[derive(Clone, Debug)]
pub struct Translation {
    pub address: u64,
    pub level: u8,
    pub used: Vec<Used>,
}

#[derive(Clone, Debug)]
pub struct Refusal {
    pub why: Why,
    pub used: Vec<Used>,
}

fn field(value: u64, high: u32, low: u32) -> u64 {
    value >> low & (u64::MAX >> (63 - (high - low)))
}

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

/// Whether any of the bits from `high` down to `low` is set; none if `high < low`.
fn any(value: u64, high: u32, low: u32) -> bool {
    high >= low && field(value, high, low) != 0
}

/// Reads entries and remembers them.
struct Reader<'a> {
    read: &'a dyn Fn(u64) -> Option<u64>,
    used: Vec<Used>,
}

type Step = Result<u64, Why>;

impl Reader<'_> {
    fn read(&mut self, gpa: u64, level: u8) -> Step {
        let value = (self.read)(gpa).ok_or(Why::NotPresent)?;
        self.used.push(Used { gpa, value, level });
        Ok(value)
    }
}

fn present(entry: u64) -> Result<(), Why> {
    if bit(entry, 0) {
        Ok(())
    } else {
        Err(Why::NotPresent)
    }
}

fn reserved(set: bool) -> Result<(), Why> {
    if set {
        Err(Why::Reserved)
    } else {
        Ok(())
    }
}

/// 32-bit paging; the result is address and level.
fn bits32(cpu: &Cpu, reader: &mut Reader<'_>, linear: u64) -> Result<(u64, u8), Why> {
    let directory = field(cpu.cr3, 31, 12) << 12;
    let pde = reader.read(directory | field(linear, 31, 22) << 2, 2)?;
    present(pde)?;
    if cpu.pse && bit(pde, 7) {
        // 36 bits of physical address reach this mode.
        reserved(any(pde, 21, 17))?;
        let page = field(pde, 16, 13) << 32 | field(pde, 31, 22) << 22;
        return Ok((page | field(linear, 21, 0), 2));
    }
    let pte = reader.read(field(pde, 31, 12) << 12 | field(linear, 21, 12) << 2, 1)?;
    present(pte)?;
    Ok((field(pte, 31, 12) << 12 | field(linear, 11, 0), 1))
}

fn pae(cpu: &Cpu, reader: &mut Reader<'_>, linear: u64) -> Result<(u64, u8), Why> {
    let m = cpu.physical_bits;
    let pdpte = cpu.pdpte[field(linear, 31, 30) as usize];
    present(pdpte)?;
    let pde = reader.read(field(pdpte, 51, 12) << 12 | field(linear, 29, 21) << 3, 2)?;
    present(pde)?;
    reserved(any(pde, 62, m) || !cpu.nxe && bit(pde, 63))?;
    if bit(pde, 7) {
        reserved(any(pde, 20, 13))?;
        return Ok((field(pde, 51, 21) << 21 | field(linear, 20, 0), 2));
    }
    let pte = reader.read(field(pde, 51, 12) << 12 | field(linear, 20, 12) << 3, 1)?;
    present(pte)?;
    reserved(any(pte, 62, m) || !cpu.nxe && bit(pte, 63))?;
    Ok((field(pte, 51, 12) << 12 | field(linear, 11, 0), 1))
}

fn long_mode(cpu: &Cpu, reader: &mut Reader<'_>, linear: u64) -> Result<(u64, u8), Why> {
    let m = cpu.physical_bits;
    let everywhere = |entry: u64| any(entry, 51, m) || !cpu.nxe && bit(entry, 63);
    let mut table = field(cpu.cr3, 51, 12) << 12;

    if cpu.mode == Mode::Level5 {
        let pml5e = reader.read(table | field(linear, 56, 48) << 3, 5)?;
        present(pml5e)?;
        reserved(everywhere(pml5e) || bit(pml5e, 7) || cpu.amd && bit(pml5e, 8))?;
        table = field(pml5e, 51, 12) << 12;
    }

    let pml4e = reader.read(table | field(linear, 47, 39) << 3, 4)?;
    present(pml4e)?;
    reserved(everywhere(pml4e) || bit(pml4e, 7) || cpu.amd && bit(pml4e, 8))?;

    let pdpte = reader.read(field(pml4e, 51, 12) << 12 | field(linear, 38, 30) << 3, 3)?;
    present(pdpte)?;
    reserved(everywhere(pdpte))?;
    if bit(pdpte, 7) {
        reserved(!cpu.gigabyte_pages || any(pdpte, 29, 13))?;
        return Ok((field(pdpte, 51, 30) << 30 | field(linear, 29, 0), 3));
    }

    let pde = reader.read(field(pdpte, 51, 12) << 12 | field(linear, 29, 21) << 3, 2)?;
    present(pde)?;
    reserved(everywhere(pde))?;
    if bit(pde, 7) {
        reserved(any(pde, 20, 13))?;
        return Ok((field(pde, 51, 21) << 21 | field(linear, 20, 0), 2));
    }

    let pte = reader.read(field(pde, 51, 12) << 12 | field(linear, 20, 12) << 3, 1)?;
    present(pte)?;
    reserved(everywhere(pte))?;
    Ok((field(pte, 51, 12) << 12 | field(linear, 11, 0), 1))
}

/// EPT. "Reserved" is a misconfiguration, everything else a violation.
fn ept(cpu: &Cpu, reader: &mut Reader<'_>, physical: u64) -> Result<(u64, u8), Why> {
    let check = |entry: u64, level: u8| -> Result<bool, Why> {
        let (r, w, x) = (bit(entry, 0), bit(entry, 1), bit(entry, 2));
        let xu = cpu.mode_based_execute && bit(entry, 10);
        if !(r || w || x || xu) {
            return Err(Why::NotPresent);
        }
        reserved(!r && w)?;
        reserved(!r && (x || xu) && !cpu.ept_execute_only)?;
        reserved(any(entry, 51, cpu.physical_bits))?;
        let page = match level {
            5 | 4 => {
                reserved(any(entry, 7, 3))?;
                false
            }
            3 | 2 => bit(entry, 7),
            _ => true,
        };
        if page {
            reserved(matches!(field(entry, 5, 3), 2 | 3 | 7))?;
            reserved(level == 3 && (!cpu.gigabyte_pages || any(entry, 29, 12)))?;
            reserved(level == 2 && any(entry, 20, 12))?;
        } else {
            reserved(any(entry, 6, 3))?;
        }
        Ok(page)
    };
    let mut table = field(cpu.cr3, 51, 12) << 12;
    let mut level = if cpu.mode == Mode::Ept5 { 5 } else { 4 };
    loop {
        let low = 12 + 9 * (u32::from(level) - 1);
        let entry = reader.read(table | field(physical, low + 8, low) << 3, level)?;
        if check(entry, level)? {
            let page = field(entry, 51, low) << low;
            return Ok((page | field(physical, low - 1, 0), level));
        }
        table = field(entry, 51, 12) << 12;
        level -= 1;
    }
}

impl Cpu {
    pub fn is_ept(&self) -> bool {
        matches!(self.mode, Mode::Ept4 | Mode::Ept5)
    }

    /// Where the processor finds the accessed bit, and the dirty bit.
    pub fn accessed_dirty_bits(&self) -> Option<(u32, u32)> {
        match (self.is_ept(), self.ept_accessed_dirty) {
            (false, _) => Some((5, 6)),
            (true, true) => Some((8, 9)),
            (true, false) => None,
        }
    }

    /// The translation of an address for an access, or why there is none. Changes no
    /// memory.
    pub fn translate(
        &self,
        access: Access,
        address: u64,
        read: &dyn Fn(u64) -> Option<u64>,
    ) -> Result<Translation, Refusal> {
        let mut reader = Reader {
            read,
            used: Vec::new(),
        };
        let end = match self.mode {
            Mode::Bits32 => bits32(self, &mut reader, address),
            Mode::Pae => pae(self, &mut reader, address),
            Mode::Level4 | Mode::Level5 => long_mode(self, &mut reader, address),
            Mode::Ept4 | Mode::Ept5 => ept(self, &mut reader, address),
        };
        let used = reader.used;
        let refused = if self.is_ept() {
            self.forbids_ept(access, &used)
        } else {
            self.forbids(access, &used)
        };
        match (end, refused) {
            (Ok((address, level)), None) => Ok(Translation {
                address,
                level,
                used,
            }),
            (Ok(_), Some(why)) => Err(Refusal { why, used }),
            (Err(why), _) => Err(Refusal { why, used }),
        }
    }

    fn forbids_ept(&self, access: Access, used: &[Used]) -> Option<Why> {
        let all = |n| used.iter().all(|entry| bit(entry.value, n));
        let may = if access.write {
            all(1)
        } else if !access.fetch {
            all(0)
        } else if self.mode_based_execute && access.user {
            all(10)
        } else {
            all(2)
        };
        (!may).then_some(Why::Protection { key: false })
    }

    /// "Determination of access rights."
    fn forbids(&self, access: Access, used: &[Used]) -> Option<Why> {
        let all = |n| used.iter().all(|entry| bit(entry.value, n));
        let user_mode_address = all(2);
        let writable = all(1);
        let execute_disable = self.nxe && used.iter().any(|entry| bit(entry.value, 63));
        let smap_allows = !self.smap || self.ac && !access.implicit;

        let by_tables = match (access.user, access.fetch, access.write) {
            (false, true, _) if user_mode_address => !self.smep && !execute_disable,
            (false, true, _) => !execute_disable,
            (false, false, true) if user_mode_address => smap_allows && (!self.wp || writable),
            (false, false, true) => !self.wp || writable,
            (false, false, false) => !user_mode_address || smap_allows,
            (true, true, _) => user_mode_address && !execute_disable,
            (true, false, true) => user_mode_address && writable,
            (true, false, false) => user_mode_address,
        };

        let mut key_forbids = false;
        if self.pke && user_mode_address && !access.fetch {
            let leaf = used.last().map_or(0, |entry| entry.value);
            let key = field(leaf, 62, 59) as u32;
            let access_disable = self.pkru >> (2 * key) & 1 == 1;
            let write_disable = self.pkru >> (2 * key + 1) & 1 == 1;
            key_forbids =
                access_disable || access.write && write_disable && (access.user || self.wp);
        }
        (!by_tables || key_forbids).then_some(Why::Protection { key: key_forbids })
    }

    /// The error code of a page fault.
    pub fn error_code(&self, access: Access, why: Why) -> u64 {
        let p = why != Why::NotPresent;
        let id = access.fetch && (self.nxe || self.smep);
        u64::from(p)
            | u64::from(access.write) << 1
            | u64::from(access.user) << 2
            | u64::from(why == Why::Reserved) << 3
            | u64::from(id) << 4
            | u64::from(why == Why::Protection { key: true }) << 5
    }

    /// The exit qualification of an EPT violation.
    pub fn exit_qualification(&self, access: Access, used: &[Used]) -> u64 {
        let all = |n| u64::from(used.iter().all(|entry| bit(entry.value, n)));
        let read = !access.write && !access.fetch || access.paging_structure;
        u64::from(read)
            | u64::from(access.write) << 1
            | u64::from(access.fetch && !access.write) << 2
            | all(0) << 3
            | all(1) << 4
            | all(2) << 5
            | if self.mode_based_execute {
                all(10) << 6
            } else {
                0
            }
            | 1 << 7
            | u64::from(!access.paging_structure) << 8
    }
}

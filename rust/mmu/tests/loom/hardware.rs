// SPDX-License-Identifier: GPL-2.0

//! A vCPU's hardware: it walks the tables, sets accessed and dirty bits, and caches
//! translations and pointers to tables until they are flushed or fault.
//!
//! An access is one step for those who flush: an interrupt for a flush is taken
//! before or after it, and the flush waits for that.
//!
//! Loads are acquire loads here. The hardware's are ordered by the address that one
//! takes from the other, which loom has no notion of.

use crate::{cpu::Cpu, machine::Machine};
use rmmu_engine::mmu::{
    sync::atomic::Ordering, Gfn, GfnRange, Host, Level, Pfn, Spte, SpteFormat, TablePtr, ENTRIES,
};

/// What an access of the guest came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// It went to this page of the host.
    Hit(Pfn),
    /// The hardware reports a fault. The entry was present to the hardware?
    Fault { present: bool },
    /// The guest is not entered, since the root was invalidated.
    Obsolete,
}

#[derive(Default)]
pub struct Hardware {
    /// The root that is in use.
    pub root: Option<TablePtr>,
    /// The root was invalidated: do not enter the guest.
    pub obsolete: bool,
    /// Frames whose dirty bit the hardware has set: what PML logs.
    pub logged: Vec<Gfn>,
    leaves: Vec<Leaf>,
    tables: Vec<(Level, GfnRange, TablePtr)>,
}

#[derive(Clone, Copy)]
struct Leaf {
    spte: Spte,
    range: GfnRange,
}

impl Hardware {
    /// Forgets all translations.
    pub fn flush(&mut self) {
        self.leaves.clear();
        self.tables.clear();
    }

    /// Forgets translations of the range.
    pub fn flush_range(&mut self, range: GfnRange) {
        let apart = |other: GfnRange| range.intersect(other).is_empty();
        self.leaves.retain(|leaf| apart(leaf.range));
        self.tables.retain(|&(_, covered, _)| apart(covered));
    }

    /// The hardware may go to this table without looking at what leads to it.
    pub fn may_walk(&self, table: TablePtr) -> bool {
        self.tables.iter().any(|at| at.2 == table)
    }

    fn access(&mut self, cpu: &Cpu<'_>, gfn: Gfn, write: bool) -> Access {
        if self.obsolete {
            return Access::Obsolete;
        }
        let format = cpu.format();
        if let Some(leaf) = self.cached(gfn) {
            if allowed(format, leaf.spte, write) && !sets_bits(format, leaf.spte, write) {
                return hit(cpu.machine, format, leaf, gfn, write);
            }
        }
        let result = self.walk(cpu, gfn, write);
        if let Access::Fault { .. } = result {
            self.flush_range(GfnRange::of(gfn, Level::L4K));
        }
        result
    }

    fn cached(&self, gfn: Gfn) -> Option<Leaf> {
        let mut leaves = self.leaves.iter();
        leaves.find(|leaf| leaf.range.contains(gfn)).copied()
    }

    /// Where to begin: at the lowest table that is cached.
    fn start(&self, gfn: Gfn) -> TablePtr {
        let on_the_way = self.tables.iter().filter(|at| at.1.contains(gfn));
        match on_the_way.min_by_key(|at| at.0) {
            Some(&(_, _, table)) => table,
            None => self.root.expect("a vCPU without a root must not run"),
        }
    }

    fn walk(&mut self, cpu: &Cpu<'_>, gfn: Gfn, write: bool) -> Access {
        let (machine, format) = (cpu.machine, cpu.format());
        let mut table = self.start(gfn);
        loop {
            table = machine.table_at(table.hpa());
            // SAFETY: It was not freed, as was just seen, and the machine checks that
            // no table is which hardware may walk.
            let header = unsafe { table.as_ref() };
            let level = header.level();
            if !self.may_walk(table) {
                let pages = level.pages() * ENTRIES as u64;
                let covered = GfnRange::new(header.gfn(), header.gfn().add(pages));
                self.tables.push((level, covered, table));
            }
            let cell = &header.entries()[gfn.index(level)];
            let spte = Spte(cell.load(Ordering::Acquire));
            if !hardware_present(format, spte) {
                return Access::Fault { present: false };
            }
            if spte.is_nonleaf(level) {
                table = machine.table_at(spte.hpa(format));
                continue;
            }
            if !allowed(format, spte, write) {
                return Access::Fault { present: true };
            }
            let mut leaf = Leaf {
                spte,
                range: GfnRange::of(gfn, level),
            };
            if sets_bits(format, spte, write) {
                leaf.spte = with_bits(format, spte, write);
                let set = cell.compare_exchange(
                    spte.raw(),
                    leaf.spte.raw(),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
                if set.is_err() {
                    continue;
                }
                if !spte.is_dirty(format) && leaf.spte.is_dirty(format) {
                    self.logged.push(gfn);
                }
            }
            self.leaves.retain(|old| !old.range.contains(gfn));
            self.leaves.push(leaf);
            return hit(machine, format, leaf, gfn, write);
        }
    }
}

impl Cpu<'_> {
    /// The guest on this CPU reads or writes.
    pub fn access(&self, gfn: Gfn, write: bool) -> Access {
        self.hardware().access(self, gfn, write)
    }
}

fn hit(machine: &Machine, format: &SpteFormat, leaf: Leaf, gfn: Gfn, write: bool) -> Access {
    let pfn = Pfn(leaf.spte.pfn(format).0 + (gfn.0 - leaf.range.start.0));
    machine.memory.access(pfn, write);
    Access::Hit(pfn)
}

fn with_bits(format: &SpteFormat, spte: Spte, write: bool) -> Spte {
    Spte(spte.raw() | format.accessed | if write { format.dirty } else { 0 })
}

/// The access makes the hardware set bits of the entry.
fn sets_bits(format: &SpteFormat, spte: Spte, write: bool) -> bool {
    format.ad_enabled && with_bits(format, spte, write) != spte
}

fn hardware_present(format: &SpteFormat, spte: Spte) -> bool {
    let mask = if format.xs != 0 { 0b111 } else { 1 };
    spte.raw() & mask != 0
}

fn allowed(format: &SpteFormat, spte: Spte, write: bool) -> bool {
    hardware_present(format, spte) && spte.access_allowed(format, write, false)
}

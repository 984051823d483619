// SPDX-License-Identifier: GPL-2.0

//! A vCPU's hardware: it walks the tables, caches what it found, and sets accessed
//! and dirty bits. It keeps everything as long as it may, which is until a flush.

use super::host::FakeHost;
use rmmu_engine::mmu::{
    sync::atomic::Ordering, table::Table, Gfn, GfnRange, Host, Level, Pfn, Spte, SpteFormat,
    TablePtr,
};
use std::collections::HashMap;

/// A translation in a TLB.
#[derive(Clone, Copy, Debug)]
pub struct Cached {
    /// The entry as it was.
    pub spte: Spte,
    /// Its level.
    pub level: Level,
    /// The first frame it maps.
    pub gfn: Gfn,
    dirty: bool,
}

/// What an access of the guest came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// It went to this frame of the host.
    Hit(Pfn),
    /// The hardware reports a fault. The entry was present to the hardware?
    Fault { present: bool },
    /// The entry says that there is MMIO.
    Mmio,
}

/// The translations of one vCPU.
#[derive(Default)]
pub struct Tlb {
    /// The root that is in use.
    pub root: Option<TablePtr>,
    /// The root was invalidated: do not enter the guest.
    pub obsolete: bool,
    leaves: HashMap<(u64, Level), Cached>,
    tables: HashMap<u64, GfnRange>,
    /// Frames whose dirty bit the hardware has set: what PML logs.
    pub pml: Vec<Gfn>,
}

impl Tlb {
    /// Forgets everything.
    pub fn flush(&mut self) {
        self.leaves.clear();
        self.tables.clear();
    }

    /// Forgets what has to do with the range.
    pub fn flush_range(&mut self, range: GfnRange) {
        let overlaps = |other: GfnRange| !range.intersect(other).is_empty();
        self.leaves
            .retain(|_, leaf| !overlaps(GfnRange::of(leaf.gfn, leaf.level)));
        self.tables.retain(|_, covered| !overlaps(*covered));
    }

    /// The hardware may walk this table without looking at what leads to it.
    pub fn may_walk(&self, hpa: u64) -> bool {
        self.tables.contains_key(&hpa)
    }

    /// The cached translation of a frame.
    pub fn cached(&self, gfn: Gfn) -> Option<Cached> {
        [Level::L4K, Level::L2M, Level::L1G]
            .into_iter()
            .find_map(|level| self.leaves.get(&(gfn.round_down(level).0, level)).copied())
    }

    /// All cached translations.
    pub fn all(&self) -> impl Iterator<Item = &Cached> {
        self.leaves.values()
    }

    /// The guest reads, writes or executes.
    pub fn access(&mut self, host: &FakeHost, gfn: Gfn, write: bool, exec: bool) -> Access {
        let format = host.format();
        if let Some(hit) = self.cached(gfn) {
            let clean_write = write && format.ad_enabled && !hit.dirty;
            if allowed(format, hit.spte, write, exec) && !clean_write {
                return Access::Hit(frame(format, &hit, gfn));
            }
            // A translation that faults, or must set a bit, is dropped.
            self.leaves.remove(&(hit.gfn.0, hit.level));
        }
        self.walk(host, gfn, write, exec)
    }

    fn walk(&mut self, host: &FakeHost, gfn: Gfn, write: bool, exec: bool) -> Access {
        let format = host.format();
        let root = self.root.expect("a vCPU without a root must not run");
        // SAFETY: The vCPU holds a reference to its root.
        let mut table: &Table = unsafe { root.as_ref() };
        let mut level = table.level();
        loop {
            self.tables.insert(
                table.hpa().0,
                GfnRange::new(table.gfn(), Gfn(table.gfn().0 + 512 * level.pages())),
            );
            let cell = &table.entries()[gfn.index(level)];
            let spte = Spte(cell.load(Ordering::Acquire));
            if spte.is_mmio(format) {
                return Access::Mmio;
            }
            if !hardware_present(format, spte) {
                return Access::Fault { present: false };
            }
            assert!(
                spte.is_present(),
                "hardware uses the entry {spte:x?}, the MMU thinks it is not present"
            );
            if spte.is_nonleaf(level) {
                // SAFETY: The vCPU's translations are flushed before the table is
                // freed; the fake host checks that.
                table = unsafe { host.table_of(spte.hpa(format)).as_ref() };
                level = level.child().expect("no table below the last level");
                continue;
            }
            if !allowed(format, spte, write, exec) {
                return Access::Fault { present: true };
            }
            let mut new = spte;
            if format.ad_enabled {
                new = Spte(new.0 | format.accessed | if write { format.dirty } else { 0 });
                if cell
                    .compare_exchange(spte.0, new.0, Ordering::AcqRel, Ordering::Acquire)
                    .is_err()
                {
                    continue;
                }
            }
            let leaf = Cached {
                spte: new,
                level,
                gfn: gfn.round_down(level),
                dirty: new.is_dirty(format),
            };
            if format.ad_enabled && write && !spte.is_dirty(format) {
                self.pml.push(gfn);
            }
            self.leaves.insert((leaf.gfn.0, level), leaf);
            return Access::Hit(frame(format, &leaf, gfn));
        }
    }
}

fn frame(format: &SpteFormat, leaf: &Cached, gfn: Gfn) -> Pfn {
    Pfn(leaf.spte.pfn(format).0 + (gfn.0 - leaf.gfn.0))
}

fn hardware_present(format: &SpteFormat, spte: Spte) -> bool {
    let mask = if format.xs != 0 { 0b111 } else { 1 };
    spte.raw() & mask != 0
}

fn allowed(format: &SpteFormat, spte: Spte, write: bool, exec: bool) -> bool {
    hardware_present(format, spte) && spte.access_allowed(format, write, exec)
}

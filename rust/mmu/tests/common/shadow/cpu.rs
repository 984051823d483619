// SPDX-License-Identifier: GPL-2.0

//! A vCPU's hardware under shadow paging: it walks the shadow tables, caches what it
//! found, and sets accessed and dirty bits. It keeps everything as long as it may.

use super::host::Machine;
use rmmu_engine::mmu::{
    shadow::{PagePtr, Root},
    sync::atomic::Ordering,
    Host, Hpa, Level, Pfn, Spte, SpteFormat,
};
use std::collections::{BTreeSet, HashMap};

const USER: u64 = 1 << 2;
const NX: u64 = 1 << 63;

/// An access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kind {
    pub write: bool,
    pub exec: bool,
    pub user: bool,
}

impl Kind {
    pub const READ: Kind = Kind {
        write: false,
        exec: false,
        user: true,
    };
    pub const WRITE: Kind = Kind {
        write: true,
        exec: false,
        user: true,
    };
}

/// What hardware makes of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hit {
    Memory(Pfn),
    NotPresent,
    Protected,
    /// An entry with reserved bits.
    Reserved(Spte),
}

/// The roots a vCPU has loaded, with a reference to each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Roots {
    Page(PagePtr),
    Pae([u64; 4]),
}

impl Roots {
    pub fn as_root(&self) -> Root<'_> {
        match self {
            Roots::Page(page) => Root::Page(*page),
            Roots::Pae(entries) => Root::Pae(entries),
        }
    }

    /// The pages.
    pub fn pages(&self, machine: &Machine) -> Vec<PagePtr> {
        match self {
            Roots::Page(page) => vec![*page],
            Roots::Pae(entries) => entries
                .iter()
                .filter(|&&entry| entry != 0)
                .map(|entry| machine.page(Hpa(entry & !0xfff)))
                .collect(),
        }
    }

    fn start(&self, va: u64) -> Option<(Hpa, Level)> {
        match self {
            Roots::Page(page) => Some((page.hpa(), page.role().level())),
            Roots::Pae(entries) => {
                let entry = entries[(va >> 30 & 3) as usize];
                (entry != 0).then_some((Hpa(entry & !0xfff), Level::L2M))
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Cached {
    spte: Spte,
    dirty: bool,
}

/// A TLB.
#[derive(Default)]
pub struct Tlb {
    leaves: HashMap<(u64, Level), Cached>,
    walked: BTreeSet<u64>,
}

impl Tlb {
    /// Forgets everything.
    pub fn flush(&mut self) {
        self.leaves.clear();
        self.walked.clear();
    }

    /// Forgets the translation of an address.
    pub fn flush_address(&mut self, va: u64) {
        self.leaves
            .retain(|&(base, level), _| base != va >> level.shift());
    }

    /// A translation is cached by which the host's page can be written to.
    pub fn may_write(&self, format: &SpteFormat, pfn: Pfn) -> bool {
        self.leaves.iter().any(|(&(_, level), cached)| {
            let first = cached.spte.pfn(format).0;
            let inside = (first..first + level.pages()).contains(&pfn.0);
            inside && cached.dirty && cached.spte.is_writable()
        })
    }

    /// A pointer to the page may be cached.
    pub fn may_walk(&self, hpa: Hpa) -> bool {
        self.walked.contains(&hpa.0)
    }
}

/// What a supervisor must not do to pages of users.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Rules {
    pub smep: bool,
    pub smap: bool,
}

fn allows(format: &SpteFormat, spte: Spte, kind: Kind, rules: Rules) -> bool {
    if format.xs != 0 {
        let bit = match kind {
            Kind { write: true, .. } => 2,
            Kind { exec: true, .. } => 4,
            _ => 1,
        };
        return spte.raw() & bit != 0;
    }
    let user = spte.raw() & USER != 0;
    let executable = spte.raw() & NX == 0 && (kind.user || !rules.smep || !user);
    if rules.smap && !kind.user && !kind.exec && user {
        return false;
    }
    (!kind.user || user) && (!kind.write || spte.is_writable()) && (!kind.exec || executable)
}

/// Accesses memory through the TLB of a vCPU, or else the shadow tables.
pub fn access(
    machine: &Machine,
    vcpu: usize,
    roots: &Roots,
    va: u64,
    kind: Kind,
    rules: Rules,
) -> Hit {
    let format = machine.format();
    let frame = |spte: Spte, level: Level| {
        let inside = (va >> 12) & (level.pages() - 1);
        Hit::Memory(Pfn(spte.pfn(format).0 + inside))
    };
    let mut tlbs = machine.tlbs.borrow_mut();
    let tlb = &mut tlbs[vcpu];
    for level in [Level::L4K, Level::L2M, Level::L1G] {
        let key = (va >> level.shift(), level);
        let Some(cached) = tlb.leaves.get(&key).copied() else {
            continue;
        };
        if allows(format, cached.spte, kind, rules) && (!kind.write || cached.dirty) {
            return frame(cached.spte, level);
        }
        // The dirty bit must be set in memory; or hardware looks again before it
        // faults.
        tlb.leaves.remove(&key);
    }

    let Some((mut hpa, mut level)) = roots.start(va) else {
        return Hit::NotPresent;
    };
    loop {
        tlb.walked.insert(hpa.0);
        let cell = machine.entry(hpa, (va >> level.shift()) as usize & 511);
        let spte = Spte(cell.load(Ordering::Relaxed));
        let present = if format.xs != 0 { 7 } else { 1 };
        if spte.raw() & present == 0 {
            return Hit::NotPresent;
        }
        if format.reserved(spte.raw(), level) != 0 {
            return Hit::Reserved(spte);
        }
        if spte.is_nonleaf(level) {
            hpa = spte.hpa(format);
            level = level.child().unwrap();
            continue;
        }
        if !allows(format, spte, kind, rules) {
            return Hit::Protected;
        }
        let mut bits = 0;
        if format.ad_enabled {
            bits |= format.accessed;
            if kind.write {
                bits |= format.dirty;
            }
        }
        let spte = Spte(cell.fetch_or(bits, Ordering::Relaxed) | bits);
        let dirty = spte.is_dirty(format) || kind.write;
        tlb.leaves
            .insert((va >> level.shift(), level), Cached { spte, dirty });
        return frame(spte, level);
    }
}

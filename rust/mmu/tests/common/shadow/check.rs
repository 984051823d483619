// SPDX-License-Identifier: GPL-2.0

//! Looks at everything the engine keeps, and compares it with a brute-force
//! reading of the guest's tables and of all entries.

use super::{
    paging::{Mode, Paging},
    Vm,
};
use crate::common::format::write_back;
use rmmu_engine::mmu::{
    audit::{Audit, Finding, Looked},
    shadow::PageInfo,
    sync::atomic::{AtomicU64, Ordering},
    types::{ACC_EXEC, ACC_USER, ACC_WRITE},
    Gfn, Host, Hpa, Level, Spte,
};
use std::collections::{BTreeMap, HashMap};

const USER: u64 = 1 << 2;
const NO_EXEC: u64 = 1 << 63;

/// What all entries of all pages say.
struct All {
    pages: HashMap<u64, PageInfo>,
    /// Leaves that map a frame at a level.
    leaves: HashMap<(u64, u8), Vec<u64>>,
    /// Entries that point to a page.
    parents: HashMap<u64, Vec<u64>>,
    counts: [i64; 5],
}

/// The entries of a reverse map, read as KVM would.
fn decode(head: &AtomicU64) -> Vec<u64> {
    let head = head.load(Ordering::Relaxed);
    if head == 0 {
        return Vec::new();
    }
    if head & 1 == 0 {
        return vec![head];
    }
    let mut entries = Vec::new();
    let mut behind = None;
    let mut at = head & !1;
    while at != 0 {
        let words = std::ptr::with_exposed_provenance::<[u64; 16]>(at as usize);
        // SAFETY: A descriptor that the engine has in a map.
        let words = unsafe { words.read() };
        let (count, tail) = (words[1] as u32 as usize, (words[1] >> 32) as usize);
        assert!(
            (1..=14).contains(&count),
            "a descriptor has {count} entries"
        );
        if let Some(behind) = behind {
            assert_eq!(count, 14, "a descriptor behind the first is full");
            assert_eq!(behind, count + tail, "entries behind a descriptor");
        }
        behind = Some(tail);
        entries.extend(&words[2..2 + count]);
        at = words[0];
    }
    assert_eq!(behind, Some(0));
    entries
}

fn sorted(mut all: Vec<u64>) -> Vec<u64> {
    all.sort_unstable();
    all
}

impl Vm {
    fn collect(&self) -> All {
        let mut all = All {
            pages: HashMap::new(),
            leaves: HashMap::new(),
            parents: HashMap::new(),
            counts: [0; 5],
        };
        self.visit(|page| {
            assert!(all.pages.insert(page.hpa.0, *page).is_none());
        });
        for page in all.pages.values() {
            let level = page.role.level();
            for index in 0..512 {
                let spte = self.entry(page.hpa, index);
                let address = self.machine.entry_address(page.hpa, index);
                if spte.is_leaf(level) {
                    all.counts[level.slot()] += 1;
                    let gfn = self.gfn_of(page, index);
                    all.leaves
                        .entry((gfn.0 >> level.gfn_shift(), level.get()))
                        .or_default()
                        .push(address);
                } else if spte.is_nonleaf(level) {
                    let child = spte.hpa(self.machine.format());
                    all.parents.entry(child.0).or_default().push(address);
                }
            }
        }
        all
    }

    fn entry(&self, hpa: Hpa, index: usize) -> Spte {
        Spte(self.machine.entry(hpa, index).load(Ordering::Relaxed))
    }

    fn gfn_of(&self, page: &PageInfo, index: usize) -> Gfn {
        match self.machine.translation(page.hpa, index) {
            Some(translation) => Gfn(translation >> 12),
            None if page.role.is_passthrough() => page.gfn,
            None => Gfn(page.gfn.0 + ((index as u64) << page.role.level().gfn_shift())),
        }
    }

    fn access_of(&self, page: &PageInfo, index: usize) -> u8 {
        match self.machine.translation(page.hpa, index) {
            Some(translation) => (translation & 0xf) as u8,
            None => page.role.access(),
        }
    }

    /// What the engine's own audit finds.
    pub fn audit(&self) -> (Looked, Vec<Finding>) {
        let mut found = Vec::new();
        let mut audit = Audit::new(|finding| found.push(finding));
        self.machine.write(|lock| {
            self.shadow.audit(&self.machine, lock, &mut audit);
            for slot in &self.machine.slots {
                let shadow = &self.shadow;
                shadow.audit_slot(&self.machine, lock, slot, &mut audit);
            }
        });
        audit.compare_leaves(|level| self.machine.leaves[level.slot()].get());
        (audit.looked, found)
    }

    /// Panics if the engine's own audit finds anything.
    pub fn assert_audit(&self) {
        let (_, found) = self.audit();
        assert_eq!(found, Vec::new(), "what the audit found");
    }

    /// Panics unless everything fits together.
    pub fn check(&self) {
        assert_eq!(self.machine.bugs(), Vec::<&str>::new());
        self.assert_audit();
        let all = self.collect();
        self.check_counts(&all);
        self.check_maps(&all);
        for page in all.pages.values() {
            self.check_marks(&all, page);
            for index in 0..512 {
                let spte = self.entry(page.hpa, index);
                if spte.is_leaf(page.role.level()) {
                    self.check_leaf(&all, page, index, spte);
                }
                if spte.is_present() && page.role.has_guest_entries() && !page.unsync {
                    self.check_guest_entry(&all, page, index, spte);
                }
            }
        }
    }

    fn check_counts(&self, all: &All) {
        let zapped = self
            .held_roots()
            .into_iter()
            .filter(|hpa| !all.pages.contains_key(hpa));
        let mut roots = 0;
        for hpa in zapped {
            roots += 1;
            for index in 0..512 {
                assert!(
                    !self.entry(Hpa(hpa), index).is_present(),
                    "a zapped root maps something"
                );
            }
        }
        let pages = all.pages.len() + roots;
        assert_eq!(self.machine.live_pages(), pages, "pages that nobody knows");
        assert_eq!(self.shadow.pages(), pages as u64);
        assert_eq!(self.machine.accounted.get(), pages as i64);
        let indirect = all
            .pages
            .values()
            .filter(|page| page.role.has_guest_entries())
            .count();
        assert_eq!(self.shadow.indirect_pages(), indirect as u64);
        assert_eq!(self.machine.indirect.get(), indirect as i64);
        let unsync = all.pages.values().filter(|page| page.unsync).count();
        let counted = self
            .machine
            .counter(rmmu_engine::mmu::shadow::Counter::Unsync);
        assert_eq!(counted, unsync as i64, "unsync pages");
        for (level, leaves) in all.counts.iter().zip(&self.machine.leaves) {
            assert_eq!(*level, leaves.get(), "leaves as accounted");
        }
    }

    fn check_maps(&self, all: &All) {
        let mut seen = BTreeMap::new();
        for slot in &self.machine.slots {
            for (i, heads) in slot.rmaps.iter().enumerate() {
                let shift = 9 * i as u32;
                let first = slot.range.start.0 >> shift;
                for (index, head) in heads.iter().enumerate() {
                    let entries = sorted(decode(head));
                    if !entries.is_empty() {
                        seen.insert((first + index as u64, i as u8 + 1), entries);
                    }
                }
            }
        }
        let expected: BTreeMap<_, _> = all
            .leaves
            .iter()
            .map(|(&key, entries)| (key, sorted(entries.clone())))
            .collect();
        assert_eq!(seen, expected, "reverse maps");
        for page in all.pages.values() {
            let parents = all.parents.get(&page.hpa.0).map_or(0, |all| all.len());
            assert_eq!(page.parents, parents as u64, "parents of {page:x?}");
        }
        for child in all.parents.keys() {
            assert!(all.pages.contains_key(child), "a link to a page not in use");
        }
    }

    /// A page above an unsync page knows.
    fn check_marks(&self, all: &All, page: &PageInfo) {
        if page.unsync {
            assert_eq!(page.role.level(), Level::L4K);
            assert!(page.role.has_guest_entries());
            assert!(!page.unsync_children, "an unsync page has nothing below");
        }
        for index in 0..512 {
            let spte = self.entry(page.hpa, index);
            if spte.is_nonleaf(page.role.level()) {
                let child = &all.pages[&spte.hpa(self.machine.format()).0];
                assert!(
                    page.unsync_children || !child.unsync && !child.unsync_children,
                    "{page:x?} does not know of what is unsync in {child:x?}"
                );
            }
        }
    }

    /// What a leaf maps is what the host and its own page allow.
    fn check_leaf(&self, all: &All, page: &PageInfo, index: usize, spte: Spte) {
        let format = self.machine.format();
        let level = page.role.level();
        let gfn = self.gfn_of(page, index);
        let pfn = spte.pfn(format);
        let access = self.access_of(page, index);
        assert_eq!(format.reserved(spte.raw(), level), 0);
        assert_eq!(gfn.0 & level.gfn_mask(), 0, "{gfn:x?} is not aligned");
        for i in 0..level.pages() {
            let backing = self.ram.backing(gfn.add(i)).unwrap();
            assert_eq!(
                backing.pfn.0,
                pfn.0 + i,
                "{gfn:x?} is backed by another page"
            );
            assert!(backing.writable && !self.ram.is_rom(gfn) || !spte.is_writable());
        }
        assert!(spte.is_consistent(format));
        assert!(!spte.is_writable() || access & ACC_WRITE != 0);
        let (user, exec) = if format.xs != 0 {
            assert_eq!(spte.memtype(format), write_back(format));
            (spte.raw() & format.xu != 0, spte.raw() & format.xs != 0)
        } else {
            (spte.raw() & USER != 0, spte.raw() & NO_EXEC == 0)
        };
        assert!(!user || access & ACC_USER != 0);
        assert!(!exec || access & ACC_EXEC != 0);
        if level > Level::L4K && self.machine.nx.get() {
            assert!(!exec, "a huge page is executable");
        }
        if spte.is_mmu_writable(format) {
            for other in all.pages.values() {
                let shadows = other.role.has_guest_entries() && !other.unsync;
                let inside = other.gfn.0 >> level.gfn_shift() == gfn.0 >> level.gfn_shift();
                assert!(
                    !(shadows && inside),
                    "{spte:x?} makes the table of {other:x?} writable"
                );
            }
        }
    }

    /// How a vCPU pages for which a page is.
    fn paging_for(&self, page: &PageInfo) -> Paging {
        let role = page.role;
        let flag = |bit: u32| role.0 >> bit & 1 != 0;
        let mut paging = self.paging;
        if !paging.is_ept() {
            paging.mode = match role.has_small_entries() {
                true => Mode::Bits32,
                false => Mode::Level4,
            };
            paging.nx = flag(13);
        }
        paging.wp = flag(14);
        paging.ad = !flag(16);
        paging.smep = flag(20);
        paging
    }

    /// A page that is not unsync says what the guest's table says.
    fn check_guest_entry(&self, all: &All, page: &PageInfo, index: usize, spte: Spte) {
        let paging = &self.paging_for(page);
        let rom = self.ram.is_rom(page.gfn);
        let level = page.role.level();
        let guest_level = level.get();
        let mut guest_index = index as u64;
        if page.role.has_small_entries() {
            guest_index |= u64::from(page.role.quadrant()) << 9;
            if guest_level == 2 {
                guest_index >>= 1;
            }
        }
        let gpa = paging.entry_gpa(page.gfn, guest_index);
        let entry = self.ram.load(gpa, paging.width());
        let what = || format!("{spte:x?} of {page:x?}, number {index}, shadows {entry:#x}");
        assert!(paging.is_present(entry), "{}", what());
        assert!(!paging.is_reserved(entry, guest_level), "{}", what());
        let mut access = page.role.access() & paging.access(entry);
        let frame = paging.frame(entry, guest_level);
        let leaf = paging.is_leaf(entry, guest_level);
        if leaf && paging.ad && !rom && entry & paging.dirty() == 0 {
            access &= !ACC_WRITE;
        }
        let (gfn, recorded) = if spte.is_leaf(level) {
            assert!(leaf, "{}", what());
            (self.gfn_of(page, index), self.access_of(page, index))
        } else {
            let child = &all.pages[&spte.hpa(self.machine.format()).0];
            assert_eq!(child.role.is_direct(), leaf, "{}", what());
            (child.gfn, child.role.access())
        };
        let mut expected = frame;
        if leaf && page.role.has_small_entries() && guest_level == 2 {
            // Half of 4 MiB.
            expected.0 |= (index as u64 & 1) << 9;
        }
        assert_eq!(gfn, expected, "{}", what());
        // A walk may have set the dirty bit since. And CR0.WP may be clear.
        let mut supervisor = (access | ACC_WRITE) & !ACC_USER;
        if paging.smep {
            supervisor &= !ACC_EXEC;
        }
        let fits = recorded == access
            || leaf && recorded == access & !ACC_WRITE
            || leaf && !paging.wp && recorded == supervisor;
        assert!(fits, "{}: {recorded:#x} for {access:#x}", what());
    }
}

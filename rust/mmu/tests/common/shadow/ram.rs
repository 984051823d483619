// SPDX-License-Identifier: GPL-2.0

//! The guest's memory: what is in it, and which frames of the host back it.

use crate::common::format::physical_bits;
use rmmu_engine::mmu::{
    shadow::{
        guest::{Exchange, GuestMemory, Width, GROUP},
        PagePtr, Shadow,
    },
    Gfn, Host, Pfn, SpteFormat,
};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap},
    ops::Range,
};

/// The host's page behind a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backing {
    pub pfn: Pfn,
    pub writable: bool,
}

fn any_contains(ranges: &RefCell<Vec<Range<u64>>>, gfn: Gfn) -> bool {
    ranges.borrow().iter().any(|range| range.contains(&gfn.0))
}

/// See the module.
pub struct Ram {
    frames: u64,
    words: RefCell<HashMap<u64, u64>>,
    backing: RefCell<HashMap<u64, Backing>>,
    /// The frames that a page of the host backs: more than one if they share it, as
    /// frames do that KSM merged, or that are the zero page.
    owners: RefCell<HashMap<u64, BTreeSet<u64>>>,
    next: Cell<u64>,
    /// Frames that no slot has now.
    absent: RefCell<Vec<Range<u64>>>,
    /// Frames of read-only slots.
    read_only: RefCell<Vec<Range<u64>>>,
    /// Frames of 2 MiB that the host maps by a huge page.
    pub huge: RefCell<BTreeSet<u64>>,
    /// Frames that were written to since they were last taken from here.
    pub written: RefCell<BTreeSet<u64>>,
    /// Something in memory changed since this was last cleared.
    pub changed: Cell<bool>,
    /// The root that a vCPU brings up to date now, which was unsync.
    pub syncing: Cell<Option<PagePtr>>,
}

impl Ram {
    pub fn new(frames: u64, format: &SpteFormat) -> Ram {
        let ram = Ram {
            frames,
            words: RefCell::default(),
            backing: RefCell::default(),
            owners: RefCell::default(),
            // In the upper quarter of what there can be.
            next: Cell::new(3 << (physical_bits(format) - 14)),
            absent: RefCell::default(),
            read_only: RefCell::default(),
            huge: RefCell::default(),
            written: RefCell::default(),
            changed: Cell::new(false),
            syncing: Cell::new(None),
        };
        for gfn in 0..frames {
            ram.back(Gfn(gfn), true);
        }
        ram
    }

    /// Backs a frame by a new page of the host.
    pub fn back(&self, gfn: Gfn, writable: bool) -> Backing {
        let pfn = Pfn(self.next.get());
        self.next.set(pfn.0 + 1);
        self.set(gfn, Backing { pfn, writable });
        Backing { pfn, writable }
    }

    /// Backs 2 MiB by a huge page.
    pub fn back_huge(&self, gfn: Gfn) {
        let first = self.next.get().next_multiple_of(512);
        self.next.set(first + 512);
        self.huge.borrow_mut().insert(gfn.0 >> 9);
        for i in 0..512 {
            let backing = Backing {
                pfn: Pfn(first + i),
                writable: true,
            };
            self.set(Gfn(gfn.0 + i), backing);
        }
    }

    /// Backs a frame by the page of the host that backs another one already.
    pub fn share(&self, gfn: Gfn, with: Gfn) {
        let backing = self.backing(with).unwrap();
        self.set(gfn, backing);
    }

    fn set(&self, gfn: Gfn, backing: Backing) {
        let old = self.backing.borrow_mut().insert(gfn.0, backing);
        let mut owners = self.owners.borrow_mut();
        if let Some(old) = old {
            owners.entry(old.pfn.0).or_default().remove(&gfn.0);
        }
        owners.entry(backing.pfn.0).or_default().insert(gfn.0);
    }

    pub fn backing(&self, gfn: Gfn) -> Option<Backing> {
        self.backing.borrow().get(&gfn.0).copied()
    }

    pub fn is_huge(&self, gfn: Gfn) -> bool {
        self.huge.borrow().contains(&(gfn.0 >> 9))
    }

    /// The frames that a page of the host backs now.
    pub fn owners(&self, pfn: Pfn) -> Vec<Gfn> {
        let owners = self.owners.borrow();
        let frames = owners.get(&pfn.0).into_iter().flatten();
        frames.map(|&gfn| Gfn(gfn)).collect()
    }

    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn.0 < self.frames && !any_contains(&self.absent, gfn)
    }

    /// The frame is in a read-only slot.
    pub fn is_rom(&self, gfn: Gfn) -> bool {
        any_contains(&self.read_only, gfn)
    }

    /// No slot has these frames any more.
    pub fn remove(&self, range: Range<u64>) {
        for gfn in range.clone() {
            if let Some(old) = self.backing.borrow_mut().remove(&gfn) {
                let mut owners = self.owners.borrow_mut();
                owners.entry(old.pfn.0).or_default().remove(&gfn);
            }
            self.huge.borrow_mut().remove(&(gfn >> 9));
        }
        self.read_only.borrow_mut().retain(|one| *one != range);
        self.absent.borrow_mut().push(range);
        self.changed.set(true);
    }

    /// A slot has these frames again, backed by other pages of the host.
    pub fn add(&self, range: Range<u64>, read_only: bool) {
        for gfn in range.clone() {
            self.back(Gfn(gfn), true);
        }
        self.absent.borrow_mut().retain(|one| *one != range);
        if read_only {
            self.read_only.borrow_mut().push(range);
        }
        self.changed.set(true);
    }

    /// Reads memory.
    pub fn load(&self, gpa: u64, width: Width) -> u64 {
        let word = self.words.borrow().get(&(gpa & !7)).copied().unwrap_or(0);
        match width {
            Width::Eight => word,
            Width::Four => word >> (8 * (gpa & 4)) & 0xffff_ffff,
        }
    }

    /// Writes to memory.
    pub fn store(&self, gpa: u64, width: Width, value: u64) {
        let mut words = self.words.borrow_mut();
        let word = words.entry(gpa & !7).or_default();
        *word = match width {
            Width::Eight => value,
            Width::Four => {
                let shift = 8 * (gpa & 4);
                *word & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift
            }
        };
        self.changed.set(true);
        self.written.borrow_mut().insert(gpa >> 12);
    }
}

/// Memory as the vCPUs' slots show it.
pub struct Seen<'a> {
    pub ram: &'a Ram,
    pub machine: &'a super::host::Machine,
    pub shadow: &'a Shadow,
}

impl Seen<'_> {
    /// The engine relies on an entry: if the table's pages are not unsync, no CPU
    /// may be able to write to it any more.
    fn assert_settled(&self, gpa: u64) {
        let gfn = Gfn(gpa >> 12);
        let format = self.machine.format();
        let pfn = self.ram.backing(gfn).unwrap().pfn;
        if self.ram.owners(pfn).len() > 1 {
            // It may be written to as another frame, which nobody can notice.
            return;
        }
        let tlbs = self.machine.tlbs.borrow();
        if !tlbs.iter().any(|tlb| tlb.may_write(format, pfn)) {
            return;
        }
        let (mut pages, mut unsync) = (0, 0);
        self.machine.write(|lock| {
            self.shadow.visit_pages(lock, |page| {
                if page.gfn == gfn && page.role.has_guest_entries() {
                    pages += 1;
                    unsync += u32::from(page.unsync);
                }
            });
        });
        assert!(
            pages == 0 || unsync > 0,
            "an entry of {gfn:x?} is read that a CPU can still write to unseen"
        );
    }

    /// The engine reads an entry. If that is for a sync, a vCPU that asks now, without
    /// the lock, must not believe that all is done.
    fn assert_unsync(&self) {
        if let Some(root) = self.ram.syncing.get() {
            assert!(
                self.shadow.is_unsync(root),
                "a root is unsync until its sync ends"
            );
        }
    }
}

impl GuestMemory for Seen<'_> {
    type Page = Gfn;

    fn page(&self, table: Gfn) -> Option<Gfn> {
        self.machine.valid_slot(table).map(|_| table)
    }

    fn is_writable(&self, page: Gfn) -> bool {
        !self.ram.is_rom(page)
    }

    fn read(&self, page: Gfn, offset: u16, width: Width) -> Option<u64> {
        Some(self.ram.load(page.to_gpa() | u64::from(offset), width))
    }

    fn compare_exchange(
        &self,
        page: Gfn,
        offset: u16,
        width: Width,
        old: u64,
        new: u64,
    ) -> Exchange {
        let gpa = page.to_gpa() | u64::from(offset);
        if self.ram.load(gpa, width) != old {
            return Exchange::Changed;
        }
        self.ram.store(gpa, width, new);
        if let Some(slot) = self.machine.valid_slot(page) {
            slot.dirty.borrow_mut().insert(page.0);
        }
        Exchange::Done
    }

    fn read_now(&self, gpa: u64, width: Width) -> Option<u64> {
        self.page(Gfn(gpa >> 12))?;
        self.assert_settled(gpa);
        self.assert_unsync();
        Some(self.ram.load(gpa, width))
    }

    fn read_group_now(&self, gpa: u64, width: Width, group: &mut [u64; GROUP]) -> bool {
        let bytes = match width {
            Width::Four => 4,
            Width::Eight => 8,
        };
        assert_eq!(gpa % (8 * bytes), 0, "a group is aligned");
        if self.page(Gfn(gpa >> 12)).is_none() {
            return false;
        }
        self.assert_settled(gpa);
        self.assert_unsync();
        for (i, place) in group.iter_mut().enumerate() {
            *place = self.ram.load(gpa + bytes * i as u64, width);
        }
        true
    }
}

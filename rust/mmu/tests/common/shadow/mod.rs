// SPDX-License-Identifier: GPL-2.0

//! A VM under shadow paging: guest tables in a model memory, vCPUs that use them,
//! and what KVM does around the engine.

// Every test crate uses its own part of this.
#![allow(dead_code)]

pub mod access;
pub mod acting;
pub mod check;
pub mod cpu;
pub mod direct;
pub mod host;
pub mod paging;
pub mod ram;

pub use access::Touch;
use acting::Acting;
use cpu::Roots;
use host::{Caches, Machine, Slot};
use paging::{Mode, Paging, Translation, P};
use ram::{Ram, Seen};
use rmmu_engine::mmu::{
    shadow::{
        guest::{Guest, GuestContext, Paging32, Paging64, PagingEpt},
        Buckets, GuestTables, PageInfo, PagePtr, PageRole, Root, Shadow,
    },
    Flush, Gfn, GfnRange, Host, Level, MmuWrite, SpteFormat,
};
use std::{
    alloc::{alloc_zeroed, dealloc, Layout},
    cell::Cell,
    collections::{BTreeMap, BTreeSet, HashSet},
    ptr::NonNull,
    rc::Rc,
};

/// What a page-directory pointer may have set.
const PDPTE: u64 = 0xf_ffff_ffff_f001;

/// A vCPU.
#[derive(Default)]
pub struct Vcpu {
    /// The guest's CR3.
    pub cr3: u64,
    pub pdptrs: [u64; 4],
    pub roots: Option<Roots>,
    /// Roots it had before, by CR3.
    pub previous: Vec<(u64, Roots)>,
    /// Its registers, if they are not those of the VM.
    pub paging: Option<Paging>,
    /// For each address that is watched, what it may translate to: all that the
    /// guest's tables said since it was flushed.
    pub history: BTreeMap<u64, Vec<Translation>>,
}

/// See the module.
pub struct Vm {
    pub machine: Machine,
    /// Shared with those who ask it something without the lock.
    pub shadow: Rc<Shadow>,
    pub ram: Rc<Ram>,
    pub paging: Paging,
    pub vcpus: Vec<Vcpu>,
    /// Pages of addresses that are watched.
    pub watched: BTreeSet<u64>,
    /// The caches of the next fault.
    pub cache: Cell<(u64, u64)>,
    pub prefetch: Cell<bool>,
    pub generation: Cell<u64>,
    /// Write faults on tables: zap what shadows them and let the guest go on,
    /// rather than emulate.
    pub unprotect: Cell<bool>,
    /// The guest's frames that the host looked up for a prefetch.
    pub prefetched: Cell<u64>,
    pub sync_requests: Cell<u64>,
    /// Frames that were written to while their slot logged that.
    pub logged_writes: BTreeSet<u64>,
    pub faults: u64,
    /// How often the quota of pages had to be raised.
    pub raised: Cell<u64>,
}

/// Writes an entry of one of the guest's tables, as its own CPU would, and tells nobody.
pub fn set(vm: &Vm, table: u64, index: u64, value: u64) {
    let gpa = vm.paging.entry_gpa(Gfn(table), index);
    vm.ram.store(gpa, vm.paging.width(), value);
}

impl Vm {
    pub fn new(format: SpteFormat, paging: Paging, slots: Vec<Slot>, vcpus: usize) -> Vm {
        let frames = slots.iter().map(|slot| slot.range.end.0).max().unwrap();
        let shadow = Shadow::new(1000);
        let layout = Layout::new::<Buckets>();
        // SAFETY: The layout is not empty; zeroes are an empty hash table, which is
        // taken back when the VM ends.
        unsafe {
            let buckets = NonNull::new(alloc_zeroed(layout).cast()).unwrap();
            shadow.set_buckets(buckets);
        }
        Vm {
            machine: Machine::new(format, slots, vcpus),
            shadow: Rc::new(shadow),
            ram: Rc::new(Ram::new(frames, &format)),
            paging,
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            watched: BTreeSet::new(),
            cache: Cell::new((5, 14)),
            prefetch: Cell::new(true),
            generation: Cell::new(2),
            unprotect: Cell::new(false),
            prefetched: Cell::new(0),
            sync_requests: Cell::new(0),
            logged_writes: BTreeSet::new(),
            faults: 0,
            raised: Cell::new(0),
        }
    }

    /// How a vCPU pages.
    pub fn paging_of(&self, vcpu: usize) -> Paging {
        self.vcpus[vcpu].paging.unwrap_or(self.paging)
    }

    /// The vCPU as the engine sees it.
    pub fn acting(&self, vcpu: usize) -> Acting<'_> {
        let (pages, descs) = self.cache.get();
        Acting {
            caches: Caches {
                pages,
                descs,
                ..Caches::full(&self.machine)
            },
            ram: &self.ram,
            root_role: self.paging_of(vcpu).root_role(),
            generation: self.generation.get(),
            may_prefetch: self.prefetch.get(),
            prefetched: &self.prefetched,
            sync_requests: &self.sync_requests,
            held: 0,
        }
    }

    fn seen(&self) -> Seen<'_> {
        Seen {
            ram: &self.ram,
            machine: &self.machine,
            shadow: &self.shadow,
        }
    }

    fn context(&self, vcpu: usize) -> GuestContext {
        let paging = self.paging_of(vcpu);
        let vcpu = &self.vcpus[vcpu];
        paging.context(vcpu.cr3, vcpu.pdptrs)
    }

    /// The guest's first table on the way to an address: with PAE, what a PDPTE leads to.
    pub fn first_table(&self, vcpu: usize, va: u64) -> Gfn {
        let cpu = &self.vcpus[vcpu];
        let entry = match self.paging_of(vcpu).mode {
            paging::Mode::Pae => cpu.pdptrs[(va >> 30 & 3) as usize],
            _ => cpu.cr3,
        };
        Gfn(entry >> 12)
    }

    /// What the guest's tables say about an address now.
    pub fn translate(&self, vcpu: usize, va: u64) -> Option<Translation> {
        let paging = self.paging_of(vcpu);
        let vcpu = &self.vcpus[vcpu];
        paging.translate(&self.ram, vcpu.cr3, &vcpu.pdptrs, va)
    }

    /// Notes what the guest's tables say, if they changed.
    pub fn note_tables(&mut self) {
        if !self.ram.changed.replace(false) {
            return;
        }
        for vcpu in 0..self.vcpus.len() {
            for &page in &self.watched {
                let now = self.translate(vcpu, page << 12);
                if let Some(now) = now {
                    let known = self.vcpus[vcpu].history.entry(page).or_default();
                    if !known.contains(&now) {
                        known.push(now);
                    }
                }
            }
        }
    }

    /// The guest flushes an address: `INVLPG`.
    pub fn invlpg(&mut self, vcpu: usize, va: u64) {
        self.machine.tlbs.borrow_mut()[vcpu].flush_address(va);
        let mut roots: Vec<Roots> = self.vcpus[vcpu].roots.iter().cloned().collect();
        if !matches!(self.paging_of(vcpu).mode, Mode::Pae | Mode::Bits32) {
            roots.extend(
                self.vcpus[vcpu]
                    .previous
                    .iter()
                    .map(|(_, root)| root.clone()),
            );
        }
        for roots in roots {
            self.with_guest(
                vcpu,
                Invlpg {
                    vcpu,
                    va,
                    roots: &roots,
                },
            );
        }
        let now = self.translate(vcpu, va);
        let known = self.vcpus[vcpu].history.entry(va >> 12).or_default();
        known.clear();
        known.extend(now);
    }

    /// The guest loads a root: `MOV CR3`. With `keep`, the old root is remembered.
    pub fn load_cr3(&mut self, vcpu: usize, cr3: u64, keep: bool) {
        let old = self.vcpus[vcpu].cr3;
        let roots = self.vcpus[vcpu].roots.take();
        match roots {
            Some(Roots::Page(page)) if keep && old != cr3 => {
                self.vcpus[vcpu]
                    .previous
                    .insert(0, (old, Roots::Page(page)));
                if self.vcpus[vcpu].previous.len() > 2 {
                    let (_, last) = self.vcpus[vcpu].previous.pop().unwrap();
                    self.put(&last);
                }
            }
            Some(roots) => self.put(&roots),
            None => {}
        }
        self.vcpus[vcpu].cr3 = cr3;
        let paging = self.paging_of(vcpu);
        if paging.mode == Mode::Pae {
            let table = cr3 >> 12;
            self.vcpus[vcpu].pdptrs = core::array::from_fn(|i| {
                let gpa = (table << 12) + 8 * i as u64;
                self.ram.load(gpa, paging.width()) & PDPTE
            });
        }
        let cached = self.vcpus[vcpu]
            .previous
            .iter()
            .position(|(pgd, _)| *pgd == cr3);
        if let Some(at) = cached {
            let (_, roots) = self.vcpus[vcpu].previous.remove(at);
            self.vcpus[vcpu].roots = Some(roots);
            self.drop_obsolete(vcpu);
        }
        self.vcpus[vcpu].history.clear();
        self.ram.changed.set(true);
        self.machine.tlbs.borrow_mut()[vcpu].flush();
        self.ensure_roots(vcpu);
        self.sync(vcpu);
        self.note_tables();
    }

    /// Brings the roots up to date, as the guest's flush of everything does.
    pub fn sync(&mut self, vcpu: usize) {
        let Some(roots) = self.vcpus[vcpu].roots.clone() else {
            return;
        };
        for root in roots.pages(&self.machine) {
            if matches!(roots, Roots::Pae(_)) || self.shadow.is_unsync(root) {
                self.with_guest(vcpu, Sync { vcpu, root });
            }
        }
    }

    fn put(&self, roots: &Roots) {
        let pages = roots.pages(&self.machine);
        self.machine
            .write(|lock| self.shadow.put_roots(&self.machine, lock, pages));
    }

    /// Lets go of roots that were zapped, as a vCPU does before it enters the guest.
    pub fn drop_obsolete(&mut self, vcpu: usize) {
        let obsolete = |vm: &Vm, roots: &Roots| {
            let pages = roots.pages(&vm.machine);
            pages.iter().any(|&page| vm.shadow.is_obsolete(page))
        };
        if let Some(roots) = self.vcpus[vcpu].roots.clone() {
            if obsolete(self, &roots) {
                self.vcpus[vcpu].roots = None;
                self.machine.tlbs.borrow_mut()[vcpu].flush();
                self.put(&roots);
            }
        }
        let previous = std::mem::take(&mut self.vcpus[vcpu].previous);
        for (cr3, roots) in previous {
            if obsolete(self, &roots) {
                self.put(&roots);
            } else {
                self.vcpus[vcpu].previous.push((cr3, roots));
            }
        }
    }

    /// Lets go of the roots in use, so that the next entry loads them again.
    pub fn reload(&mut self, vcpu: usize) {
        if let Some(roots) = self.vcpus[vcpu].roots.take() {
            self.put(&roots);
        }
    }

    /// Loads roots if there are none, as a vCPU does before it enters the guest.
    pub fn ensure_roots(&mut self, vcpu: usize) {
        self.drop_obsolete(vcpu);
        if self.vcpus[vcpu].roots.is_some() {
            return;
        }
        self.machine.write(|lock| self.make_room(lock));
        let paging = self.paging_of(vcpu);
        let role = paging.root_role();
        let cr3 = self.vcpus[vcpu].cr3;
        let roots = match paging.mode {
            // As KVM's dummy root.
            _ if paging.mode != Mode::Pae && !self.has_slot(cr3) => Roots::Pae([0; 4]),
            Mode::Bits32 | Mode::Pae => {
                let mut entries = [0; 4];
                for (i, place) in entries.iter_mut().enumerate() {
                    let (gfn, quadrant) = if paging.mode == Mode::Pae {
                        let pdpte = self.vcpus[vcpu].pdptrs[i];
                        let table = Gfn(pdpte >> 12);
                        if pdpte & P == 0 || self.machine.valid_slot(table).is_none() {
                            continue;
                        }
                        (table, 0)
                    } else {
                        (Gfn(cr3 >> 12), i as u8)
                    };
                    let role = role.with_level(Level::L2M).with_quadrant(quadrant);
                    let page = self.alloc_root(vcpu, gfn, role);
                    *place = page.hpa().0 | P;
                }
                Roots::Pae(entries)
            }
            _ => {
                let gfn = Gfn(cr3 >> 12);
                let page = self.alloc_root(vcpu, gfn, role);
                Roots::Page(page)
            }
        };
        self.vcpus[vcpu].roots = Some(roots);
        self.machine.tlbs.borrow_mut()[vcpu].flush();
        self.sync(vcpu);
    }

    fn has_slot(&self, gpa: u64) -> bool {
        self.machine.valid_slot(Gfn(gpa >> 12)).is_some()
    }

    /// Makes room for a fault. If the quota is used up by roots in use the user has to
    /// raise it.
    pub fn make_room(&self, lock: &mut MmuWrite<'_>) {
        let (machine, shadow) = (&self.machine, &self.shadow);
        if shadow.make_available(machine, lock).is_ok() {
            return;
        }
        let held = self.held_roots();
        shadow.visit_pages(lock, |page| {
            assert!(
                held.contains(&page.hpa.0),
                "this could be zapped: {page:x?}"
            );
        });
        shadow.set_max_pages(machine, lock, shadow.pages() + 5);
        self.raised.set(self.raised.get() + 1);
    }

    /// A vCPU pages in another way from now on.
    pub fn set_paging(&mut self, vcpu: usize, paging: Paging, cr3: u64) {
        self.reload(vcpu);
        for (_, roots) in std::mem::take(&mut self.vcpus[vcpu].previous) {
            self.put(&roots);
        }
        self.vcpus[vcpu].paging = Some(paging);
        self.load_cr3(vcpu, cr3, false);
    }

    /// A slot goes, with its memory. With `all` everything is zapped for it.
    pub fn remove_slot(&mut self, number: usize, all: bool) {
        let slot = &self.machine.slots[number];
        slot.valid.set(false);
        if all {
            self.zap_fast();
        } else {
            let machine = &self.machine;
            machine.write(|lock| {
                let (range, none) = (slot.range, Flush::none());
                let flush = self
                    .shadow
                    .unmap_range(machine, lock, slot, range, true, none);
                self.shadow.zap_slot_pages(machine, lock, slot, flush);
            });
        }
        let slot = &self.machine.slots[number];
        slot.assert_unused();
        slot.gone.set(true);
        slot.logged.set(false);
        let range = slot.range.start.0..slot.range.end.0;
        self.logged_writes.retain(|gfn| !range.contains(gfn));
        self.ram.remove(range);
        self.generation.set(self.generation.get() + 2);
        self.note_tables();
    }

    /// A slot comes back, with other memory of the host, and what was in it.
    pub fn add_slot(&mut self, number: usize, read_only: bool) {
        let slot = &self.machine.slots[number];
        slot.gone.set(false);
        slot.valid.set(true);
        self.ram
            .add(slot.range.start.0..slot.range.end.0, read_only);
        self.generation.set(self.generation.get() + 2);
        self.note_tables();
    }

    /// Runs an operation of the engine with the guest's tables of a vCPU.
    pub fn with_guest<O: WithGuest>(&self, vcpu: usize, operation: O) -> O::Output {
        let (context, seen) = (self.context(vcpu), self.seen());
        match self.paging_of(vcpu).mode {
            Mode::Bits32 => operation.run(self, &Guest::<Paging32, _>::new(&context, &seen)),
            Mode::Ept => operation.run(self, &Guest::<PagingEpt, _>::new(&context, &seen)),
            _ => operation.run(self, &Guest::<Paging64, _>::new(&context, &seen)),
        }
    }

    /// The host takes pages away, as a notifier does.
    pub fn invalidate(&self, range: GfnRange, change: impl FnOnce(&Ram)) {
        for slot in &self.machine.slots {
            self.machine.write(|lock| {
                let flush =
                    self.shadow
                        .unmap_range(&self.machine, lock, slot, range, true, Flush::none());
                self.machine.spend(flush, lock);
            });
        }
        change(&self.ram);
    }

    /// Makes all pages obsolete and zaps them.
    pub fn zap_fast(&mut self) {
        self.machine.write(|lock| self.shadow.invalidate_all(lock));
        for tlb in self.machine.tlbs.borrow_mut().iter_mut() {
            tlb.flush();
        }
        self.machine
            .write(|lock| self.shadow.zap_obsolete(&self.machine, lock));
    }

    /// Ends the VM and checks that nothing is left of it.
    pub fn destroy(mut self) {
        for vcpu in 0..self.vcpus.len() {
            let roots = self.vcpus[vcpu].roots.take();
            let previous = std::mem::take(&mut self.vcpus[vcpu].previous);
            for roots in roots
                .into_iter()
                .chain(previous.into_iter().map(|(_, r)| r))
            {
                self.put(&roots);
            }
        }
        self.machine
            .write(|lock| self.shadow.uninit(&self.machine, lock));
        assert_eq!(self.shadow.pages(), 0);
        assert_eq!(self.shadow.nx_candidates(), 0);
        assert_eq!(self.shadow.indirect_pages(), 0);
        self.machine.assert_nothing_left();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let buckets = self.machine.write(|lock| self.shadow.take_buckets(lock));
        if let Some(buckets) = buckets {
            // SAFETY: Allocated with this layout in `new`.
            unsafe { dealloc(buckets.as_ptr().cast(), Layout::new::<Buckets>()) };
        }
    }
}

/// An operation that looks at the guest's tables, in whatever format they are.
pub trait WithGuest {
    type Output;

    fn run<G: GuestTables>(self, vm: &Vm, guest: &G) -> Self::Output;
}

struct Invlpg<'a> {
    vcpu: usize,
    va: u64,
    roots: &'a Roots,
}

impl WithGuest for Invlpg<'_> {
    type Output = ();

    fn run<G: GuestTables>(self, vm: &Vm, guest: &G) {
        vm.machine.write(|lock| {
            let root = self.roots.as_root();
            let mut acting = vm.acting(self.vcpu);
            vm.shadow
                .invalidate_addr(&vm.machine, lock, &mut acting, guest, root, self.va);
        });
    }
}

struct Sync {
    vcpu: usize,
    root: PagePtr,
}

impl WithGuest for Sync {
    type Output = ();

    fn run<G: GuestTables>(self, vm: &Vm, guest: &G) {
        let unsync = vm.shadow.is_unsync(self.root).then_some(self.root);
        vm.ram.syncing.set(unsync);
        vm.machine.write(|lock| {
            vm.shadow.sync_root(
                &vm.machine,
                lock,
                &mut vm.acting(self.vcpu),
                guest,
                self.root,
            );
        });
        vm.ram.syncing.set(None);
    }
}

impl Vm {
    /// A page as a root, with a reference.
    pub fn alloc_root(&self, vcpu: usize, gfn: Gfn, role: PageRole) -> PagePtr {
        self.machine
            .write(|lock| {
                let mut acting = self.acting(vcpu);
                acting.caches.pages = acting.caches.pages.max(1);
                self.shadow
                    .alloc_root(&self.machine, lock, &mut acting, gfn, role)
            })
            .expect("the caches are full")
    }

    /// All entries that are present, of all pages in use: page, index, entry.
    pub fn visit(&self, mut f: impl FnMut(&PageInfo)) {
        self.machine
            .write(|lock| self.shadow.visit_pages(lock, |page| f(page)));
    }

    /// The pages that vCPUs hold as roots.
    pub fn held_roots(&self) -> HashSet<u64> {
        let all = self.vcpus.iter().flat_map(|vcpu| {
            let previous = vcpu.previous.iter().map(|(_, roots)| roots);
            vcpu.roots.iter().chain(previous)
        });
        all.flat_map(|roots| roots.pages(&self.machine))
            .map(|page| page.hpa().0)
            .collect()
    }

    /// Marks the whole of a slot as clean, and takes write access away.
    pub fn start_logging(&mut self, slot: usize) {
        let slot = &self.machine.slots[slot];
        slot.logged.set(true);
        slot.dirty.borrow_mut().clear();
        self.machine.write(|lock| {
            let flush = self
                .shadow
                .write_protect_slot(&self.machine, lock, slot, Level::L4K);
            self.machine.spend(flush, lock);
        });
        self.logged_writes.clear();
    }

    /// Takes the dirty log; panics if a write is missing from it.
    pub fn harvest(&mut self, slot: usize) -> BTreeSet<u64> {
        let slot = &self.machine.slots[slot];
        let dirty = slot.dirty.take();
        for gfn in &self.logged_writes {
            assert!(dirty.contains(gfn), "a write to {gfn:#x} is not in the log");
        }
        self.logged_writes.clear();
        self.machine.write(|lock| {
            for &gfn in &dirty {
                self.shadow
                    .clear_dirty_masked(&self.machine, lock, slot, Gfn(gfn), 1, true);
            }
            self.machine.flush_all();
        });
        dirty
    }

    /// The root of a vCPU.
    pub fn root(&self, vcpu: usize) -> Root<'_> {
        self.vcpus[vcpu].roots.as_ref().unwrap().as_root()
    }
}

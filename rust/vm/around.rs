// SPDX-License-Identifier: GPL-2.0

//! Fault-around: how far around a page that faulted to map, and whether that pays.
//!
//! A window is an aligned part of guest memory, as large as the parameter `fault_around_bytes` says, or the VM's own file of
//! that name. Of the pages in it those are mapped with the one that faulted that the host has mapped already, outwards from
//! it and up to the first that is missing: see [`HostWindow`] and the engine's `around`.
//!
//! A neighbour costs a tenth of a fault or less, so it is enough if one in sixteen saves one. Each vCPU learns whether that
//! is so: now and then it remembers a window, and some faults later looks which of its pages have been accessed. What aging
//! and zapping found meanwhile counts as well. If too few were used, the next windows are smaller, down to none at all; if
//! many were, larger again. A vCPU that has no windows any more tries one after a while.
//!
//! A look costs something, too, where there is nothing to be found: in memory that is new to the host, no page that faults is
//! mapped there yet ([`Vm::worth_a_look`]), nor are its neighbours. After a few looks in vain most faults do without.
//!
//! All of that is bookkeeping without order between threads: a lost update makes a window smaller or larger than it would
//! have been.

use super::Vm;
use crate::{
    kvm::{
        host::AheadStats,
        page::{HostWindow, MAX_WINDOW},
        param, Slot, Vcpu,
    },
    mmu::{
        sync::{
            atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
            MmuRead,
        },
        table::TablePtr,
        tdp::{Around as AroundPages, Neighbour},
        types::{Gfn, GfnRange, PAGE_SHIFT},
    },
};
use kernel::prelude::*;

/// vCPUs whose number is the same modulo this share what they learn.
const STATES: usize = 16;
/// A remembered window is looked at after so many faults.
const PATIENCE: u32 = 16;
/// A vCPU without windows tries one after so many faults.
const RETRY: u32 = 64;
/// One page in so many has to be of use.
const ENOUGH: u64 = 16;
/// One in so many is a reason for larger windows.
const PLENTY: u64 = 4;
/// So often in a row it was no use to look at the host's page table.
const USELESS: u32 = 4;
/// Then only one fault in so many looks.
const AGAIN: u32 = 16;

/// What a vCPU has learnt. On a cache line of its own.
#[repr(align(64))]
struct State {
    /// Pages of a window; 0 at first, 1 for no fault-around.
    pages: AtomicU32,
    /// Faults without a window since the last one.
    skipped: AtomicU32,
    /// The window that is remembered, and after how many faults to look at it.
    sample_start: AtomicU64,
    sample_pages: AtomicU32,
    sample_left: AtomicU32,
    /// What had been found by aging and zapping at the last look.
    seen_used: AtomicU64,
    seen_unused: AtomicU64,
    /// Looks in which the page that faulted was not there.
    absent: Vain,
    /// Windows in which there was nothing to map.
    empty: Vain,
}

/// How often in a row something was in vain, and since when it is not done each time.
struct Vain(AtomicU32);

impl Vain {
    const fn new() -> Vain {
        Vain(AtomicU32::new(0))
    }

    /// Whether to try this time.
    #[inline]
    fn worth_it(&self) -> bool {
        let count = self.0.load(Relaxed);
        if count < USELESS {
            return true;
        }
        let due = count.wrapping_add(1) >= USELESS.wrapping_add(AGAIN);
        let next = if due { USELESS } else { count.wrapping_add(1) };
        self.0.store(next, Relaxed);
        due
    }

    #[inline]
    fn tried(&self, in_vain: bool) {
        let count = self.0.load(Relaxed);
        if !in_vain && count != 0 {
            self.0.store(0, Relaxed);
        } else if in_vain && count < USELESS {
            self.0.store(count.wrapping_add(1), Relaxed);
        }
    }
}

impl State {
    const fn new() -> State {
        State {
            pages: AtomicU32::new(0),
            skipped: AtomicU32::new(0),
            sample_start: AtomicU64::new(0),
            sample_pages: AtomicU32::new(0),
            sample_left: AtomicU32::new(0),
            seen_used: AtomicU64::new(0),
            seen_unused: AtomicU64::new(0),
            absent: Vain::new(),
            empty: Vain::new(),
        }
    }

    fn pages(&self, limit: u32) -> u32 {
        match self.pages.load(Relaxed) {
            0 => limit,
            pages => pages.min(limit),
        }
    }

    /// The pages of the window around the next fault; 1 for none.
    fn next(&self, limit: u32) -> u32 {
        let pages = self.pages(limit);
        if pages > 1 || limit == 1 {
            return pages;
        }
        let skipped = self.skipped.load(Relaxed).wrapping_add(1);
        self.skipped
            .store(if skipped < RETRY { skipped } else { 0 }, Relaxed);
        if skipped < RETRY {
            1
        } else {
            limit
        }
    }

    /// So many pages of windows were used, and so many were not.
    fn learn(&self, used: u64, unused: u64, limit: u32) {
        let pages = self.pages(limit);
        let all = used.saturating_add(unused);
        let next = if all == 0 {
            pages
        } else if used == 0 {
            pages / 4
        } else if used.saturating_mul(ENOUGH) < all {
            pages / 2
        } else if pages == 1 {
            limit
        } else if used.saturating_mul(PLENTY) >= all {
            pages.saturating_mul(2)
        } else {
            pages
        };
        self.pages.store(next.clamp(1, limit.max(1)), Relaxed);
    }
}

/// Fault-around of a VM.
pub(super) struct Around {
    /// Pages of a window, if the VM has a setting of its own; else 0.
    own: AtomicU32,
    states: [State; STATES],
    windows: AtomicU64,
    mapped: AtomicU64,
    pub(super) stats: AheadStats,
}

/// What `/sys/kernel/debug/rmmu/vms/*/fault_around` shows.
pub(super) struct Counters {
    pub(super) windows: u64,
    pub(super) mapped: u64,
    pub(super) used: u64,
    pub(super) unused: u64,
}

impl Around {
    pub(super) const fn new() -> Around {
        Around {
            own: AtomicU32::new(0),
            states: [const { State::new() }; STATES],
            windows: AtomicU64::new(0),
            mapped: AtomicU64::new(0),
            stats: AheadStats {
                used: AtomicU64::new(0),
                unused: AtomicU64::new(0),
            },
        }
    }

    /// The size of a window in bytes, as it is set.
    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.limit()) << PAGE_SHIFT
    }

    /// Sets the size for this VM, whatever the parameter says.
    pub(super) fn set_bytes(&self, bytes: u64) -> Result {
        if !valid_bytes(bytes) {
            return Err(EINVAL);
        }
        self.own.store((bytes >> PAGE_SHIFT) as u32, Relaxed);
        for state in &self.states {
            // What was learnt may have been learnt with windows that were too small to be of use.
            state.pages.store(0, Relaxed);
        }
        Ok(())
    }

    fn limit(&self) -> u32 {
        match self.own.load(Relaxed) {
            0 => (param::fault_around_bytes() >> PAGE_SHIFT) as u32,
            own => own,
        }
    }

    fn state(&self, vcpu: &Vcpu) -> &State {
        // The index is below the length, whatever the number is.
        &self.states[vcpu.index() % STATES]
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            windows: self.windows.load(Relaxed),
            mapped: self.mapped.load(Relaxed),
            used: self.stats.used.load(Relaxed),
            unused: self.stats.unused.load(Relaxed),
        }
    }

    /// The sizes of windows that vCPUs have come to, in pages; 0 where there was none yet.
    pub(super) fn learnt(&self) -> impl Iterator<Item = u32> + '_ {
        self.states.iter().map(|state| state.pages.load(Relaxed))
    }
}

/// Whether a window can have that size.
pub(super) fn valid_bytes(bytes: u64) -> bool {
    bytes.is_power_of_two() && (1..=MAX_WINDOW).contains(&(bytes >> PAGE_SHIFT))
}

/// A window, for the engine.
pub(super) struct Window<'w> {
    host: &'w HostWindow<'w>,
    slot: &'w Slot,
    lock: &'w MmuRead<'w>,
    vm: &'w Vm,
    state: &'w State,
}

impl AroundPages for Window<'_> {
    #[inline]
    fn range(&self) -> GfnRange {
        self.host.range()
    }

    #[inline]
    fn page(&self, gfn: Gfn) -> Option<Neighbour> {
        // A table of a nested hypervisor's, whose writes must be seen or whose shadow told.
        let tracked = self
            .vm
            .shadow
            .try_unsync(&self.vm.host(), self.lock, self.slot, gfn, true);
        if tracked.is_err() {
            return None;
        }
        self.host.page(gfn).map(|page| Neighbour {
            pfn: page.pfn,
            writable: page.writable,
        })
    }

    #[inline]
    fn mapped(&mut self, pages: u64) {
        self.state.empty.tried(pages == 0);
        if pages == 0 {
            return;
        }
        let around = &self.vm.around;
        around.windows.fetch_add(1, Relaxed);
        around.mapped.fetch_add(pages, Relaxed);
        if self.state.sample_left.load(Relaxed) == 0 {
            let range = self.range();
            self.state.sample_start.store(range.start.0, Relaxed);
            self.state.sample_pages.store(range.pages() as u32, Relaxed);
            self.state.sample_left.store(PATIENCE, Relaxed);
        }
    }
}

impl Vm {
    /// The frames to look at for a fault at `gfn`: an aligned window within the slot, or `gfn` alone.
    ///
    /// Looks at the remembered window when it is time. The vCPU holds `root`.
    pub(super) fn window(&self, vcpu: &Vcpu, root: TablePtr, slot: &Slot, gfn: Gfn) -> GfnRange {
        let alone = GfnRange::new(gfn, gfn.add(1));
        let limit = self.around.limit();
        if limit <= 1 {
            return alone;
        }
        let state = self.around.state(vcpu);
        match state.sample_left.load(Relaxed) {
            0 => {}
            1 => {
                self.look_at_sample(state, root, limit);
                state.sample_left.store(0, Relaxed);
            }
            left => state.sample_left.store(left.wrapping_sub(1), Relaxed),
        }
        let pages = u64::from(state.next(limit));
        if pages == 1 || !state.empty.worth_it() {
            return alone;
        }
        let start = Gfn(gfn.0 & !pages.wrapping_sub(1));
        GfnRange::new(start, start.add(pages)).intersect(slot.range())
    }

    #[cold]
    fn look_at_sample(&self, state: &State, root: TablePtr, limit: u32) {
        let start = Gfn(state.sample_start.load(Relaxed));
        let pages = state.sample_pages.load(Relaxed);
        let range = GfnRange::new(start, start.add(pages.into()));
        let (used, unused) = self.tdp.ahead_in_use(&self.host(), root, range);
        let found = self.around.counters();
        let found_used = found
            .used
            .wrapping_sub(state.seen_used.swap(found.used, Relaxed));
        let found_unused = found
            .unused
            .wrapping_sub(state.seen_unused.swap(found.unused, Relaxed));
        state.learn(
            // The page that faulted is one of those that were used.
            used.saturating_sub(1).saturating_add(found_used),
            unused.saturating_add(found_unused),
            limit,
        );
    }

    /// Whether the host is likely to have mapped a page that faults; asked before each look.
    #[inline]
    pub(super) fn worth_a_look(&self, vcpu: &Vcpu) -> bool {
        self.around.state(vcpu).absent.worth_it()
    }

    /// Whether it had.
    #[inline]
    pub(super) fn looked(&self, vcpu: &Vcpu, resident: bool) {
        self.around.state(vcpu).absent.tried(!resident);
    }

    /// A window was asked for, and the page that faulted has no neighbours in it.
    #[inline]
    pub(super) fn found_alone(&self, vcpu: &Vcpu) {
        self.around.state(vcpu).empty.tried(true);
    }

    /// What was looked at, for the engine to map.
    pub(super) fn around_of<'w>(
        &'w self,
        vcpu: &Vcpu,
        slot: &'w Slot,
        host: &'w HostWindow<'w>,
        lock: &'w MmuRead<'w>,
    ) -> Window<'w> {
        Window {
            host,
            slot,
            lock,
            vm: self,
            state: self.around.state(vcpu),
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The vCPU as the engine sees it.

use super::{
    host::{Caches, Machine, Slot},
    ram::Ram,
};
use crate::common::format;
use rmmu_engine::mmu::{
    shadow::{DescPtr, PagePtr, PageRole, PageSource, ShadowVcpu},
    sync::MmuWrite,
    Gfn, Host, Pfn,
};
use std::cell::Cell;

/// The vCPU as the engine sees it.
pub struct Acting<'m> {
    pub caches: Caches<'m>,
    pub ram: &'m Ram,
    pub root_role: PageRole,
    pub generation: u64,
    pub may_prefetch: bool,
    pub prefetched: &'m Cell<u64>,
    pub sync_requests: &'m Cell<u64>,
    /// Frames that were looked up and not released.
    pub held: usize,
}

// SAFETY: What the caches give is fresh.
unsafe impl PageSource for Acting<'_> {
    fn take_page(&mut self, translations: bool) -> Option<PagePtr> {
        self.caches.take_page(translations)
    }

    fn take_desc(&mut self) -> Option<DescPtr> {
        self.caches.take_desc()
    }
}

impl ShadowVcpu<Machine> for Acting<'_> {
    fn root_role(&self) -> PageRole {
        self.root_role
    }

    fn slot<'h>(&self, host: &'h Machine, gfn: Gfn) -> Option<&'h Slot> {
        host.valid_slot(gfn)
    }

    fn may_prefetch(&mut self) -> bool {
        self.may_prefetch
    }

    fn memtype(&self, _gfn: Gfn, _host_mmio: bool) -> u64 {
        format::write_back(self.caches.machine.format())
    }

    fn mmio_generation(&self) -> u64 {
        self.generation
    }

    fn prefetch_pages(
        &mut self,
        _host: &Machine,
        _lock: &MmuWrite<'_>,
        slot: &Slot,
        gfn: Gfn,
        pfns: &mut [Pfn],
    ) -> usize {
        assert_eq!(self.held, 0, "what was looked up before was not released");
        assert!(
            !slot.logged.get(),
            "nothing is mapped ahead in a logged slot"
        );
        for (i, place) in pfns.iter_mut().enumerate() {
            let gfn = gfn.add(i as u64);
            match self.ram.backing(gfn) {
                Some(page)
                    if page.writable && !self.ram.is_rom(gfn) && slot.range.contains(gfn) =>
                {
                    *place = page.pfn
                }
                _ => break,
            }
            self.held += 1;
        }
        self.prefetched
            .set(self.prefetched.get() + self.held as u64);
        self.held
    }

    fn release_prefetched(&mut self) {
        assert_ne!(self.held, 0, "nothing is to be released");
        self.held = 0;
    }

    fn request_sync(&mut self) {
        self.sync_requests.set(self.sync_requests.get() + 1);
    }
}

impl Drop for Acting<'_> {
    fn drop(&mut self) {
        assert!(
            self.held == 0 || std::thread::panicking(),
            "frames that were looked up are kept"
        );
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Roots of the shadow MMU, and keeping them in step with the guest's tables.
//!
//! A shadow root stands for the guest's root table, so that it is found by that table's frame. Where the guest has fewer
//! levels than the hardware, or two or three, there is no root page: the context has a page with four entries instead, each
//! with a reference on its page, and the pages that the hardware needs above it.

use super::{
    shadow::{with_guest, Paging},
    Vm,
};
use crate::{
    kvm::{
        paging::{table_gfn, VcpuMemory, WrittenEntry},
        root::{PaeEntry, RootHpa, RootKind},
        shadow::{alloc_buckets, ShadowCpu},
        Kvm, Mmu, RootSet, Vcpu,
    },
    mmu::{
        shadow::{guest::Guest, PagePtr, PageRole, Root},
        sync::atomic::smp_mb,
        types::{Gfn, Level, PAGE_SHIFT},
    },
};
use kernel::prelude::*;

/// Bits of an entry in the pages of a context that stand in for missing levels.
mod pae {
    pub(super) const PRESENT: u64 = 1 << 0;
    /// Writable, user, accessed: in entries of long mode only.
    pub(super) const LONG: u64 = 1 << 1 | 1 << 2 | 1 << 5;
}

/// The frame below the page table of PAE entry number `index`.
fn quarter(index: usize) -> Gfn {
    Gfn((index as u64) << (30 - PAGE_SHIFT))
}

/// The four PAE entries of a context, as the engine walks them.
fn pae_words(mmu: &Mmu) -> Option<[u64; 4]> {
    Some(mmu.pae_entries()?.map(PaeEntry::raw))
}

/// What up to four roots are to be: the frame of the table, and the page's role.
type Wanted = [Option<(Gfn, PageRole)>; 4];

/// The roots.
type Roots = [Option<PagePtr>; 4];

/// A root, with room for the entries that it may consist of.
pub(super) struct LoadedRoot {
    page: Option<PagePtr>,
    entries: [u64; 4],
}

impl LoadedRoot {
    /// The root of a context: its page, or its four PAE entries.
    #[inline]
    pub(super) fn of(mmu: &Mmu, page: Option<PagePtr>) -> LoadedRoot {
        let entries = match page {
            Some(_) => None,
            None => pae_words(mmu),
        };
        LoadedRoot {
            page,
            entries: entries.unwrap_or_default(),
        }
    }

    /// Where walks begin.
    pub(super) fn start(&self) -> Root<'_> {
        match self.page {
            Some(page) => Root::Page(page),
            None => Root::Pae(&self.entries),
        }
    }
}

impl Vm {
    /// The root of a context, if it is the shadow MMU's and no dummy.
    pub(super) fn shadow_root(&self, mmu: &Mmu) -> Option<LoadedRoot> {
        match mmu.root()?.kind() {
            RootKind::Shadow(page) => Some(LoadedRoot {
                page: Some(page),
                entries: [0; 4],
            }),
            RootKind::Special => Some(LoadedRoot {
                page: None,
                entries: pae_words(mmu)?,
            }),
            RootKind::Tdp(_) | RootKind::Dummy => None,
        }
    }

    /// Gives the vCPU a root of the shadow MMU.
    pub(super) fn load_shadow(&self, vcpu: &Vcpu, mmu: &Mmu) -> Result {
        let direct = mmu.direct();
        let role = PageRole(mmu.role_word());
        vcpu.topup_shadow_caches(!direct)?;
        if direct {
            self.prepare_slots()?;
            return self.load_direct(vcpu, mmu, role);
        }
        let guest_level = mmu.guest_level().ok_or(EIO)?;
        if guest_level < Level::L512G && role.level() >= Level::L512G {
            mmu.alloc_special_roots(role.level())?;
        }
        let pgd = vcpu.guest_root();
        let gfn = table_gfn(pgd);
        if !vcpu.sees(gfn) {
            mmu.set_root(Some(RootHpa::dummy()), 0);
            return Ok(());
        }
        // May sleep, so it comes before the lock.
        let mut tables = [Some(gfn); 4];
        if guest_level == Level::L1G {
            for (table, pdptr) in tables.iter_mut().zip(vcpu.guest_pdptrs()) {
                let present = pdptr & pae::PRESENT != 0;
                *table = Some(table_gfn(pdptr)).filter(|gfn| present && vcpu.sees(*gfn));
            }
        }
        self.prepare_slots()?;
        if guest_level >= Level::L512G {
            return self.load_page(vcpu, mmu, role, pgd, gfn);
        }
        // A guest's page directory of four-byte entries covers all four quarters, which are told apart by the role.
        let quadrants = if guest_level == Level::L2M {
            [0, 1, 2, 3]
        } else {
            [0; 4]
        };
        let mut wanted = [None; 4];
        for ((wanted, table), quadrant) in wanted.iter_mut().zip(tables).zip(quadrants) {
            *wanted = table.map(|gfn| (gfn, quadrant));
        }
        self.load_pae(vcpu, mmu, role, pgd, wanted)
    }

    fn load_direct(&self, vcpu: &Vcpu, mmu: &Mmu, role: PageRole) -> Result {
        if role.level() >= Level::L512G {
            return self.load_page(vcpu, mmu, role, 0, Gfn(0));
        }
        let wanted = [0, 1, 2, 3].map(|index| Some((quarter(index), 0)));
        self.load_pae(vcpu, mmu, role, 0, wanted)
    }

    /// Makes a page the root.
    fn load_page(&self, vcpu: &Vcpu, mmu: &Mmu, role: PageRole, pgd: u64, gfn: Gfn) -> Result {
        let mut cpu = ShadowCpu::new(vcpu);
        let mut lock = self.kvm.write_lock();
        let lock = lock.token();
        self.make_pages_available(lock)?;
        let root = self
            .shadow
            .alloc_root(&self.host(), lock, &mut cpu, gfn, role)
            .ok_or(ENOMEM)?;
        mmu.set_root(Some(RootHpa::of_page(root)), pgd);
        Ok(())
    }

    /// Fills the four PAE entries: with the frames and quadrants of tables, where there are any.
    fn load_pae(
        &self,
        vcpu: &Vcpu,
        mmu: &Mmu,
        role: PageRole,
        pgd: u64,
        wanted: [Option<(Gfn, u8)>; 4],
    ) -> Result {
        let level = role.level();
        let long = if level >= Level::L512G { pae::LONG } else { 0 };
        let bits = pae::PRESENT | long | self.format.me_value;
        let role = role.with_level(Level::L2M);
        let wanted = wanted.map(|table| {
            let (gfn, quadrant) = table?;
            Some((gfn, role.with_quadrant(quadrant)))
        });
        let roots = self.alloc_shadow_roots(vcpu, &wanted)?;
        mmu.set_pae_entries(
            roots.map(|root| root.map_or(PaeEntry::NONE, |root| PaeEntry::new(root, bits))),
        );
        let root = mmu.link_pae_root(level, bits);
        if root.is_none() {
            self.kvm.bug(c"a context has no page for PAE entries");
            return Err(EIO);
        }
        mmu.set_root(root, pgd);
        Ok(())
    }

    /// Shadow pages for the guest's tables, each with a reference for the caller.
    fn alloc_shadow_roots(&self, vcpu: &Vcpu, wanted: &Wanted) -> Result<Roots> {
        let mut cpu = ShadowCpu::new(vcpu);
        let host = self.host();
        let mut roots: Roots = [None; 4];
        let mut lock = self.kvm.write_lock();
        let lock = lock.token();
        // Room once for all of them: to exceed the quota by three pages does no harm.
        self.make_pages_available(lock)?;
        for (root, wanted) in roots.iter_mut().zip(wanted) {
            let Some((gfn, role)) = *wanted else {
                continue;
            };
            *root = self.shadow.alloc_root(&host, lock, &mut cpu, gfn, role);
            if root.is_none() {
                self.shadow
                    .put_roots(&host, lock, roots.into_iter().flatten());
                return Err(ENOMEM);
            }
        }
        Ok(roots)
    }

    /// Prepares the hash table of shadow pages and the slots' metadata, for the first shadow root. Sleeps.
    fn prepare_slots(&self) -> Result {
        if self.kvm.has_slot_metadata() {
            return Ok(());
        }
        self.kvm.alloc_slot_metadata(|| {
            if !self.shadow.has_buckets() {
                let buckets = alloc_buckets(self.kvm).ok_or(ENOMEM)?;
                // SAFETY: fresh, zeroed, and given back when the VM ends. One thread at a time gets here.
                unsafe { self.shadow.set_buckets(buckets) };
            }
            Ok(())
        })
    }

    /// Brings the roots in use up to date with the guest's tables; `kvm_mmu_sync_roots()`.
    pub fn sync_roots(&self, vcpu: &Vcpu) {
        let mmu = vcpu.mmu();
        if mmu.direct() {
            return;
        }
        let Some(root) = mmu.root() else {
            return;
        };
        vcpu.mmio_forget();
        match root.kind() {
            RootKind::Shadow(page) if self.shadow.is_unsync(page) => {
                self.sync_pages(vcpu, [Some(page), None, None, None]);
            }
            RootKind::Special => self.sync_pae_roots(vcpu, mmu),
            RootKind::Shadow(_) | RootKind::Tdp(_) | RootKind::Dummy => {}
        }
    }

    #[cold]
    #[inline(never)]
    fn sync_pae_roots(&self, vcpu: &Vcpu, mmu: &Mmu) {
        let pages = mmu.pae_entries().unwrap_or_default().map(PaeEntry::root);
        let unsync = |page: &PagePtr| self.shadow.is_unsync(*page);
        if pages.iter().flatten().any(unsync) {
            self.sync_pages(vcpu, pages);
        }
    }

    /// Out of line, as in most calls there is nothing to do.
    #[inline(never)]
    fn sync_pages(&self, vcpu: &Vcpu, pages: Roots) {
        let Some(paging) = Paging::of(self, vcpu) else {
            return;
        };
        let memory = VcpuMemory::new(vcpu);
        let host = self.host();
        let mut cpu = ShadowCpu::new(vcpu);
        let mut lock = self.kvm.write_lock();
        for page in pages.into_iter().flatten() {
            with_guest!(paging, memory, guest => {
                self.shadow.sync_root(&host, lock.token(), &mut cpu, &guest, page)
            });
        }
    }

    /// Drops the previous roots that are not up to date; `kvm_mmu_sync_prev_roots()`.
    pub fn sync_previous_roots(&self, vcpu: &Vcpu) {
        self.drop_roots(vcpu.mmu(), RootSet::PREVIOUS, |root| match root {
            RootKind::Shadow(root) => self.shadow.is_unsync(root),
            _ => false,
        });
    }

    /// The guest invalidates the translation of an address; `kvm_mmu_invalidate_addr()`, after the TLB was flushed.
    pub fn invalidate_addr(&self, vcpu: &Vcpu, mmu: &Mmu, addr: u64, set: RootSet) {
        if mmu.direct() || !core::ptr::eq(mmu, vcpu.mmu()) {
            return;
        }
        vcpu.mmio_forget_gva(addr);
        let Some(paging) = Paging::of(self, vcpu) else {
            return;
        };
        let memory = VcpuMemory::new(vcpu);
        let host = self.host();
        let mut cpu = ShadowCpu::new(vcpu);
        let mut invalidate = |root: Root<'_>| {
            let mut lock = self.kvm.write_lock();
            with_guest!(paging, memory, guest => {
                self.shadow.invalidate_addr(&host, lock.token(), &mut cpu, &guest, root, addr)
            });
        };
        if set.has(0) {
            if let Some(root) = self.shadow_root(mmu) {
                invalidate(root.start());
            }
        }
        for (bit, root) in (1..).zip(mmu.previous_roots()) {
            if let (true, Some(RootKind::Shadow(root))) = (set.has(bit), root.map(RootHpa::kind)) {
                invalidate(Root::Page(root));
            }
        }
    }

    /// The guest's memory at `gpa` was written to by emulation; `kvm_mmu_track_write()`.
    pub fn track_write(&self, vcpu: &Vcpu, gpa: u64, bytes: usize) {
        // What was written is seen by whoever shadows the table from now on, or the table's shadow is seen here.
        smp_mb();
        if self.shadow.indirect_pages() == 0 {
            return;
        }
        let mut lock = self.kvm.write_lock();
        let written = WrittenEntry::read(vcpu, gpa, bytes);
        self.shadow.track_write(
            &self.host(),
            lock.token(),
            written.gpa,
            written.bytes,
            written.nonzero,
        );
    }

    /// Stops shadowing the table that a write fault at `address` hit; `__kvm_mmu_unprotect_gfn_and_retry()`. True if that
    /// helps.
    pub fn unprotect_and_retry(&self, vcpu: &Vcpu, address: u64, always_retry: bool) -> bool {
        let unprotected = self.unprotect(vcpu, address);
        if unprotected || always_retry {
            vcpu.note_retry(address);
        }
        unprotected
    }

    fn unprotect(&self, vcpu: &Vcpu, address: u64) -> bool {
        if self.shadow.indirect_pages() == 0 {
            return false;
        }
        let gpa = if vcpu.mmu().direct() {
            Some(address)
        } else {
            vcpu.translate_write(address)
        };
        let Some(gpa) = gpa else {
            return false;
        };
        let mut lock = self.kvm.write_lock();
        self.shadow
            .unprotect_gfn(&self.host(), lock.token(), Gfn(gpa >> PAGE_SHIFT))
    }

    /// Sets the quota of shadow pages; `kvm_mmu_change_mmu_pages()`.
    pub fn set_max_pages(&self, kvm: &Kvm, pages: u64) {
        let mut lock = kvm.write_lock();
        self.shadow.set_max_pages(&self.host(), lock.token(), pages);
        kvm.set_max_mmu_pages(&lock, self.shadow.max_pages());
    }
}

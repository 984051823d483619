// SPDX-License-Identifier: GPL-2.0

//! Roots: how vCPUs get them, share them and lose them.
//!
//! KVM's `struct kvm_mmu` keeps the address of the root a vCPU runs on, and of up to three it ran on before. A vCPU holds a
//! reference on each. The TDP MMU serves direct roots, the shadow MMU (`shadow_roots`) all others, and direct ones too where
//! the TDP MMU is not in use. Invalidating is done under `mmu_lock` held for write, and every vCPU is then asked to drop
//! obsolete roots before it enters the guest again.

use super::Vm;
use crate::{
    kvm::{
        param,
        root::{PaeEntry, RootHpa, RootKind},
        table, trace, Kvm, Mmu, RootSet, Vcpu,
    },
    mmu::{shadow::PagePtr, sync::MmuWrite},
};
use kernel::prelude::*;

/// Room for the shadow pages of all roots of a context: previous ones, and four of PAE paging.
const SHADOW_ROOTS: usize = 8;

impl Vm {
    /// Gives the vCPU a root; `kvm_mmu_load()`.
    pub fn load(&self, vcpu: &Vcpu) -> i32 {
        match self.try_load(vcpu) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    pub(super) fn try_load(&self, vcpu: &Vcpu) -> Result {
        let mmu = vcpu.mmu();
        let role = mmu.root_role().ok_or(EIO)?;
        if mmu.direct() && param::tdp_mmu() {
            vcpu.topup_table_caches()?;
            let root = {
                let mut lock = self.kvm.read_lock();
                self.tdp
                    .find_or_alloc_root(
                        &self.host(),
                        lock.token(),
                        role,
                        &mut table::VcpuCache(vcpu),
                    )
                    .ok_or(ENOMEM)?
            };
            mmu.set_root(Some(RootHpa::of_table(root)), 0);
        } else {
            self.load_shadow(vcpu, mmu)?;
            self.sync_roots(vcpu);
        }
        if let Some(root) = mmu.root() {
            vcpu.load_pgd(root, role.level);
        }
        // A root is used again without a flush when it is dropped, so translations of its earlier use may be cached.
        vcpu.flush_tlb_current();
        Ok(())
    }

    /// Takes all roots from the vCPU; `kvm_mmu_unload()`.
    pub fn unload(&self, vcpu: &Vcpu) {
        self.free_roots(self.kvm, vcpu.root_mmu(), RootSet::ALL);
        self.free_roots(self.kvm, vcpu.guest_mmu(), RootSet::ALL);
        vcpu.mmio_forget();
    }

    /// Takes roots from a vCPU; `kvm_mmu_free_roots()`.
    pub fn free_roots(&self, _kvm: &Kvm, mmu: &Mmu, set: RootSet) {
        self.drop_roots(mmu, set, |_| true);
    }

    /// Takes roots of a nested guest; `kvm_mmu_free_guest_mode_roots()`. The root in use is the guest's own.
    pub fn free_guest_mode_roots(&self, _kvm: &Kvm, mmu: &Mmu) {
        self.drop_roots(mmu, RootSet::PREVIOUS, |root| match root {
            RootKind::Tdp(root) => table::role(root).guest_mode,
            RootKind::Shadow(root) => root.role().is_guest_mode(),
            RootKind::Special | RootKind::Dummy => true,
        });
    }

    /// Drops roots that were invalidated; `kvm_mmu_free_obsolete_roots()`.
    pub fn free_obsolete_roots(&self, vcpu: &Vcpu) {
        for mmu in [vcpu.root_mmu(), vcpu.guest_mmu()] {
            self.drop_roots(mmu, RootSet::ALL, |root| self.is_obsolete(root));
        }
    }

    /// The root is to be replaced. Of one that is no page nobody can tell, and it is replaced in any case.
    pub(super) fn is_obsolete(&self, root: RootKind) -> bool {
        match root {
            RootKind::Tdp(root) => table::invalid(root),
            RootKind::Shadow(root) => self.shadow.is_obsolete(root),
            RootKind::Special | RootKind::Dummy => true,
        }
    }

    /// Drops the roots of `set` for which `which` says so.
    pub(super) fn drop_roots(&self, mmu: &Mmu, set: RootSet, which: impl Fn(RootKind) -> bool) {
        let mut shadow: [Option<PagePtr>; SHADOW_ROOTS] = [None; SHADOW_ROOTS];
        let mut count: usize = 0;
        let mut collect = |root: Option<PagePtr>| {
            if let (Some(_), Some(place)) = (root, shadow.get_mut(count)) {
                *place = root;
                count = count.wrapping_add(1);
            }
        };
        mmu.take_roots(
            set,
            |root| which(root.kind()),
            |root| match root.kind() {
                RootKind::Tdp(root) => {
                    // Readers of the list of roots rely on mmu_lock.
                    let _lock = self.kvm.read_lock();
                    self.tdp.put_root(&self.host(), root);
                }
                RootKind::Shadow(root) => collect(Some(root)),
                RootKind::Special => {
                    for entry in mmu.pae_entries().unwrap_or_default() {
                        collect(entry.root());
                    }
                    mmu.set_pae_entries([PaeEntry::NONE; 4]);
                }
                RootKind::Dummy => {}
            },
        );
        if count != 0 {
            let mut lock = self.kvm.write_lock();
            let roots = shadow.iter().take(count).copied().flatten();
            self.shadow.put_roots(&self.host(), lock.token(), roots);
        }
    }

    /// Drops the root in use. Out of line: a switch that finds its root has no need of the registers this takes.
    #[cold]
    #[inline(never)]
    fn drop_root_in_use(&self, mmu: &Mmu) {
        self.drop_roots(mmu, RootSet::IN_USE, |_| true);
    }

    /// The guest loads CR3, or the context changed its role; `kvm_mmu_new_pgd()`.
    ///
    /// A root that was used for this before is used again. If there is none, the next entry loads one.
    pub fn new_pgd(&self, vcpu: &Vcpu, pgd: u64) {
        let mmu = vcpu.mmu();
        // PAE entries and what is above them are one set a context: they cannot be kept.
        if let Some(RootKind::Special | RootKind::Dummy) = mmu.root().map(RootHpa::kind) {
            self.drop_root_in_use(mmu);
        }
        let (role, direct) = (mmu.role_word(), mmu.direct());
        let mut shadow = None;
        let found = mmu.switch_root(|hpa, root_pgd| {
            shadow = None;
            if !direct && root_pgd != pgd {
                return false;
            }
            match hpa.kind() {
                RootKind::Tdp(root) => table::role(root).word == role && !table::invalid(root),
                RootKind::Shadow(root) => {
                    shadow = Some(root);
                    root.role().0 == role
                }
                RootKind::Special | RootKind::Dummy => false,
            }
        });
        if !found {
            return self.drop_root_in_use(mmu);
        }
        vcpu.request_load_pgd();
        if param::flush_on_reuse() {
            vcpu.request_sync();
            vcpu.request_flush();
        }
        vcpu.mmio_forget();
        // The last one that was looked at is the one that was found.
        if let Some(root) = shadow {
            self.shadow.note_root_in_use(root);
        }
    }

    /// Invalidates every root, and zaps what is the shadow MMU's; KVM's fast zap, first half. Yields.
    pub fn invalidate_roots(&self, kvm: &Kvm, lock: &mut MmuWrite<'_>) {
        trace::zap_all_fast(kvm);
        let host = self.host();
        self.tdp.invalidate_roots(&host, lock);
        self.shadow.invalidate_all(lock);
        // Before the lock is dropped for the first time: who takes it then must know.
        kvm.request_free_obsolete_roots();
        self.shadow.zap_obsolete(&host, lock);
    }

    /// Tears down what was invalidated; second half. Takes `mmu_lock` for read, and yields.
    pub fn zap_invalidated_roots(&self, kvm: &Kvm) {
        let mut lock = kvm.read_lock();
        self.tdp.zap_invalidated_roots(&self.host(), lock.token());
    }

    /// Both halves.
    pub(super) fn zap_all_fast(&self, kvm: &Kvm) {
        {
            let mut lock = kvm.write_lock();
            self.invalidate_roots(kvm, lock.token());
        }
        self.zap_invalidated_roots(kvm);
    }
}

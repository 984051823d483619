// SPDX-License-Identifier: GPL-2.0

//! Roots: how vCPUs get them, share them and lose them.
//!
//! KVM's `struct kvm_mmu` keeps the address of the root a vCPU runs on. A vCPU holds a reference on that root, the engine
//! one on every root that is not invalidated. Invalidating is done under `mmu_lock` held for write, and every vCPU is
//! then asked to drop obsolete roots before it enters the guest again.

use super::Vm;
use crate::{
    kvm::{table, trace, Kvm, Mmu, RootSet, Vcpu},
    mmu::{sync::MmuWrite, table::TablePtr, types::Hpa},
};
use core::sync::atomic::Ordering;
use kernel::prelude::*;

impl Vm {
    /// The table behind a root that a vCPU holds a reference on.
    pub(super) fn root_table(&self, root: Hpa) -> Option<TablePtr> {
        table::root_at(root)
    }

    /// Gives the vCPU a root; `kvm_mmu_load()`.
    pub fn load(&self, vcpu: &Vcpu) -> i32 {
        match self.try_load(vcpu) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    pub(super) fn try_load(&self, vcpu: &Vcpu) -> Result {
        let mmu = vcpu.mmu();
        if !mmu.direct() {
            if !self.refused_root.swap(true, Ordering::Relaxed) {
                pr_err!("KVM_RUN fails: a nested guest with its own nested paging needs shadow page tables, which rmmu does not \
                         have yet; set own_new_vms=0 before such a VM is created\n");
            }
            return Err(crate::kvm::not_supported());
        }
        let role = mmu.root_role().ok_or(EIO)?;
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
        mmu.set_root(Some(root.hpa()));
        vcpu.load_pgd(root.hpa(), role.level);
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
        let previous = RootSet(RootSet::ALL.0 & !1);
        self.drop_roots(mmu, previous, |root| table::role(root).guest_mode);
    }

    /// Drops roots that were invalidated; `kvm_mmu_free_obsolete_roots()`.
    pub fn free_obsolete_roots(&self, vcpu: &Vcpu) {
        for mmu in [vcpu.root_mmu(), vcpu.guest_mmu()] {
            self.drop_roots(mmu, RootSet::ALL, table::invalid);
        }
    }

    fn drop_roots(&self, mmu: &Mmu, set: RootSet, which: impl Fn(TablePtr) -> bool) {
        mmu.take_roots(
            set,
            |hpa| self.root_table(hpa).is_some_and(&which),
            |hpa| {
                if let Some(root) = self.root_table(hpa) {
                    // Readers of the list of roots rely on mmu_lock.
                    let _lock = self.kvm.read_lock();
                    self.tdp.put_root(&self.host(), root);
                }
            },
        );
    }

    /// The guest loads CR3, or the context changed its role; `kvm_mmu_new_pgd()`.
    ///
    /// A direct root maps the same whatever CR3 is: it is kept if its role still fits, and else dropped, so that the next
    /// entry loads one that fits.
    pub fn new_pgd(&self, vcpu: &Vcpu) {
        let mmu = vcpu.mmu();
        let Some(root) = mmu.root().and_then(|hpa| self.root_table(hpa)) else {
            return;
        };
        if !mmu.direct() || table::role(root).word != mmu.role_word() || table::invalid(root) {
            self.drop_roots(mmu, RootSet(1), |_| true);
            return;
        }
        vcpu.request_load_pgd();
        vcpu.mmio_forget();
    }

    /// Invalidates every root; KVM's fast zap, first half.
    pub fn invalidate_roots(&self, kvm: &Kvm, lock: &MmuWrite<'_>) {
        trace::zap_all_fast(kvm);
        self.tdp.invalidate_roots(&self.host(), lock);
        kvm.request_free_obsolete_roots();
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

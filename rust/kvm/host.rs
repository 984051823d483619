// SPDX-License-Identifier: GPL-2.0

//! KVM as the engine's [`Host`].

use crate::{
    kvm::{
        bindings, lock::RcuGuard, param, shadow::ShadowStats, slot::Slot, table, trace, vm::Kvm,
    },
    mmu::{
        host::{Event, Host},
        spte::SpteFormat,
        sync::{
            atomic::{AtomicI64, AtomicU64, Ordering},
            MmuRead, MmuWrite,
        },
        table::{Entries, TablePtr},
        tdp::Tdp,
        types::{Gfn, GfnRange, Hpa, Level},
    },
};
use core::ptr::NonNull;
use kernel::prelude::*;

/// What became of pages that were mapped ahead.
#[derive(Default)]
pub struct AheadStats {
    /// Pages that had been used when they were looked at.
    pub used: AtomicU64,
    /// Pages that had not.
    pub unused: AtomicU64,
}

/// One VM, for the engine.
#[derive(Clone, Copy)]
pub struct KvmHost<'a> {
    /// The VM.
    pub kvm: &'a Kvm,
    /// The format of its entries.
    pub format: &'a SpteFormat,
    /// Tables that are linked below roots, and shadow pages.
    pub tables: &'a AtomicI64,
    /// The TDP MMU, if it is in use.
    pub tdp: Option<&'a Tdp>,
    /// What the shadow MMU counts for us.
    pub shadow_stats: &'a ShadowStats,
    /// KVM uses nested paging.
    pub tdp_enabled: bool,
    /// Pages that were mapped ahead.
    pub ahead: &'a AheadStats,
}

// SAFETY: `alloc_table` adopts fresh memory; RCU frees go through call_rcu(); the header of a table page is found through
// the page's private word, which is set before the table is used and cleared when it is freed; tdp_mmu_pages_lock is a
// spinlock of the VM.
unsafe impl Host for KvmHost<'_> {
    type Slot = Slot;
    type Rcu<'a>
        = RcuGuard
    where
        Self: 'a;

    #[inline]
    fn rcu_read(&self) -> RcuGuard {
        RcuGuard::new()
    }

    #[inline]
    fn format(&self) -> &SpteFormat {
        self.format
    }

    #[inline]
    fn pml(&self) -> bool {
        self.kvm.cpu_dirty_log_size() != 0
    }

    #[inline]
    fn table_of(&self, hpa: Hpa) -> TablePtr {
        // SAFETY: the engine asks for tables that its entries point to, which live.
        let header = unsafe { table::header_at(hpa) };
        // SAFETY: the private word of a table page is its header, never null.
        unsafe { TablePtr::from_raw(NonNull::new_unchecked(header.cast())) }
    }

    #[inline]
    fn entries_of(&self, hpa: Hpa) -> NonNull<Entries> {
        table::entries_at(hpa)
    }

    fn alloc_table(&self) -> Option<TablePtr> {
        table::alloc()
    }

    fn free_table_now(&self, table: TablePtr) {
        // SAFETY: the engine's contract: never linked, so nobody else knows it.
        unsafe { table::free_now(table) }
    }

    fn free_table_rcu(&self, table: TablePtr) {
        // SAFETY: the engine's contract: unlinked, reachable by RCU readers only.
        unsafe { table::free_rcu(table) }
    }

    fn account_table(&self, table: TablePtr, delta: i32) {
        self.tables.fetch_add(delta.into(), Ordering::Relaxed);
        // SAFETY: the entries are a live page of the kernel's memory.
        unsafe { bindings::rmmu_table_account(table.entries().as_ptr().cast(), delta) }
    }

    fn account_ahead(&self, used: i64, unused: i64) {
        self.ahead.used.fetch_add(used as u64, Ordering::Relaxed);
        self.ahead
            .unused
            .fetch_add(unused as u64, Ordering::Relaxed);
    }

    fn account_leaf(&self, level: Level, delta: i64) {
        self.kvm.account_pages(level.get(), delta);
    }

    fn account_nx_split(&self, delta: i64) {
        self.kvm.account_nx_split(delta);
    }

    fn flush_all(&self) {
        self.kvm.flush_remote_tlbs();
    }

    fn flush_range(&self, range: GfnRange) {
        self.kvm
            .flush_remote_tlbs_range(range.start.0, range.pages());
    }

    #[inline]
    fn need_break(&self) -> bool {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_need_break(self.kvm.as_ptr()) }
    }

    fn relax_read(&self, _lock: &mut MmuRead<'_>) {
        // SAFETY: the token proves that the lock is held for read.
        unsafe { bindings::rmmu_relax_read(self.kvm.as_ptr()) }
    }

    fn relax_write(&self, _lock: &mut MmuWrite<'_>) {
        // SAFETY: the token proves that the lock is held for write.
        unsafe { bindings::rmmu_relax_write(self.kvm.as_ptr()) }
    }

    fn unlock_relock_read<R>(&self, _lock: &mut MmuRead<'_>, f: impl FnOnce() -> R) -> R {
        // SAFETY: the token proves that the lock is held for read, and is borrowed until it is again.
        unsafe { bindings::rmmu_read_unlock(self.kvm.as_ptr()) };
        let result = f();
        // SAFETY: as above.
        unsafe { bindings::rmmu_read_lock(self.kvm.as_ptr()) };
        result
    }

    fn unlock_relock_write<R>(&self, _lock: &mut MmuWrite<'_>, f: impl FnOnce() -> R) -> R {
        // SAFETY: the token proves that the lock is held for write, and is borrowed until it is again.
        unsafe { bindings::rmmu_write_unlock(self.kvm.as_ptr()) };
        let result = f();
        // SAFETY: as above.
        unsafe { bindings::rmmu_write_lock(self.kvm.as_ptr()) };
        result
    }

    fn with_pages_lock<R>(&self, f: impl FnOnce() -> R) -> R {
        // SAFETY: a spinlock of the VM, initialised by in-tree when the VM was created.
        unsafe { bindings::rmmu_pages_lock(self.kvm.as_ptr()) };
        let result = f();
        // SAFETY: taken above.
        unsafe { bindings::rmmu_pages_unlock(self.kvm.as_ptr()) };
        result
    }

    fn mark_dirty(&self, slot: &Slot, gfn: Gfn) {
        slot.mark_dirty(self.kvm, gfn);
    }

    fn nx_huge_pages(&self) -> bool {
        param::nx_huge_pages() && !self.kvm.nx_huge_pages_disabled()
    }

    fn host_mmio_mapped(&self) {
        // SAFETY: no precondition.
        if unsafe { bindings::rmmu_host_mmio_buffers() } {
            self.kvm.force_exit_all();
        }
    }

    #[inline(always)]
    fn trace(&self, event: Event<'_>) {
        trace::emit(event);
    }

    fn bug(&self, what: &'static str) {
        pr_err!("broken invariant: {}\n", what);
        self.kvm.bug(c"broken invariant, see the line before");
    }

    fn warn(&self, what: &'static str) {
        pr_warn!("{}\n", what);
        // SAFETY: a string that ends with a zero.
        unsafe {
            bindings::rmmu_warn(
                c"something was put right, see the line before"
                    .as_char_ptr()
                    .cast(),
            )
        };
    }
}

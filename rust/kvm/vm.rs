// SPDX-License-Identifier: GPL-2.0

//! `struct kvm`: the owner mark, locks, flushes, requests and statistics of a VM.
//!
//! # The owner mark
//!
//! A VM of ours must be told from others in O(1), without a field of its own in `struct kvm`. Two list heads of in-tree's
//! MMU stay empty for it, because every function that would add to them is hooked. A walk of an empty list, and
//! `list_empty()`, read `next` only, which keeps pointing at the head; the one backward walk that is not preceded by
//! `list_empty()` is in `__kvm_mmu_zap_all_fast_front_half()`, which is hooked. So `prev` is free: `active_mmu_pages.prev` holds the address of
//! [`rmmu_owner_mark`], which no list entry ever has, and `tdp_mmu_roots.prev` our own data of the VM. Both are put back
//! before in-tree code tears the VM down.

use crate::{
    kvm::{
        bindings, calls,
        lock::{HeldLock, ReadGuard, WriteGuard},
        slot::Slot,
    },
    mmu::{
        sync::atomic::{smp_rmb, AtomicI64, Ordering},
        types::{Gfn, GfnRange},
    },
};
use core::ptr::addr_of_mut;
use kernel::{
    error::to_result,
    ffi::{c_char, c_void},
    prelude::*,
    str::CStr,
    types::Opaque,
};

/// Its address marks VMs that are ours; its value means nothing. The stubs compare with it.
#[no_mangle]
pub static rmmu_owner_mark: c_char = 0;

// C's declaration of it has the same type.
const _: *const c_char = &raw const bindings::rmmu_owner_mark;

/// Takes a reference on this module.
pub fn get_module() -> Result {
    // SAFETY: the module is live: it is hooked, and runs.
    if unsafe { bindings::rmmu_get_module() } {
        Ok(())
    } else {
        Err(ENODEV)
    }
}

/// Gives a reference on this module back.
pub fn put_module() {
    // SAFETY: pairs with `get_module`.
    unsafe { bindings::rmmu_put_module() }
}

/// A VM.
#[repr(transparent)]
pub struct Kvm(Opaque<bindings::kvm>);

// SAFETY: `struct kvm` is shared between threads by design; what is behind a lock is reached through its guard.
unsafe impl Sync for Kvm {}

impl Kvm {
    /// Wraps KVM's pointer.
    ///
    /// # Safety
    ///
    /// `kvm` is a VM that KVM does not free during `'a`.
    pub unsafe fn from_raw<'a>(kvm: *mut bindings::kvm) -> &'a Kvm {
        // SAFETY: `Kvm` is a transparent wrapper, and the caller promises that the VM lives.
        unsafe { &*kvm.cast() }
    }

    /// KVM's pointer.
    pub fn as_ptr(&self) -> *mut bindings::kvm {
        self.0.get()
    }

    /// Our data of the VM, if the VM is ours.
    fn owner_data(&self) -> Option<*mut c_void> {
        let kvm = self.as_ptr();
        // SAFETY: the VM lives; both words are written only while the VM is created and destroyed, when no one else
        // can reach it. The data is asked for behind the mark.
        unsafe {
            let mark = (*kvm).arch.active_mmu_pages.prev.cast::<u8>();
            (mark.cast_const() == &raw const rmmu_owner_mark).then(|| self.data_of_owned())
        }
    }

    /// Our data of a VM that is ours.
    ///
    /// # Safety
    ///
    /// The VM has the owner mark.
    pub unsafe fn data_of_owned(&self) -> *mut c_void {
        // SAFETY: the VM lives; written only before it got the mark, and after it lost it.
        unsafe { (*self.as_ptr()).arch.tdp_mmu_roots.prev.cast() }
    }

    /// Marks the VM as ours, and hands our data of it over until [`take_from_owner`](Self::take_from_owner).
    ///
    /// # Safety
    ///
    /// The VM is being created by this thread, and in-tree has initialised its lists: no one else can reach it yet.
    pub unsafe fn give_to_owner<T>(&self, data: KBox<T>) {
        let kvm = self.as_ptr();
        // SAFETY: nobody else can reach the VM yet, as the caller promises; the lists are empty and stay so, see the
        // description of this file.
        unsafe {
            (*kvm).arch.tdp_mmu_roots.prev = KBox::into_raw(data).cast();
            (*kvm).arch.active_mmu_pages.prev = (&raw const rmmu_owner_mark).cast_mut().cast();
        }
    }

    /// Takes the mark off, so that the lists are plain empty lists again, and gives our data back.
    ///
    /// # Safety
    ///
    /// The VM is being destroyed by this thread: no one else can reach it any more. `T` is what was handed over.
    pub unsafe fn take_from_owner<T>(&self) -> Option<KBox<T>> {
        let data = self.owner_data()?;
        let kvm = self.as_ptr();
        // SAFETY: nobody else can reach the VM any more, as the caller promises, and `data` is the box that
        // `give_to_owner` took apart.
        unsafe {
            (*kvm).arch.active_mmu_pages.prev = addr_of_mut!((*kvm).arch.active_mmu_pages);
            (*kvm).arch.tdp_mmu_roots.prev = addr_of_mut!((*kvm).arch.tdp_mmu_roots);
            Some(KBox::from_raw(data.cast()))
        }
    }

    /// The VM, for data that [`take_from_owner`](Self::take_from_owner) ends before the VM does.
    ///
    /// # Safety
    ///
    /// Nothing else keeps the reference.
    pub unsafe fn for_lifetime_of_owner(&self) -> &'static Kvm {
        // SAFETY: used by the data of the VM only, as the caller promises, which the VM outlives.
        unsafe { Kvm::from_raw(self.as_ptr()) }
    }

    /// The type userspace asked for (`KVM_X86_*_VM`).
    pub fn vm_type(&self) -> u32 {
        // SAFETY: set when the VM is created, constant afterwards.
        unsafe { (*self.as_ptr()).arch.vm_type.into() }
    }

    /// The value of MMIO entries of this VM.
    pub fn mmio_value(&self) -> u64 {
        // SAFETY: set when the VM is created, constant afterwards.
        unsafe { (*self.as_ptr()).arch.shadow_mmio_value }
    }

    /// Takes `mmu_lock` for read.
    pub fn read_lock(&self) -> ReadGuard<'_> {
        ReadGuard::new(self)
    }

    /// Takes `mmu_lock` for write.
    pub fn write_lock(&self) -> WriteGuard<'_> {
        WriteGuard::new(self)
    }

    /// Complains if nobody holds `mmu_lock`. Lockdep knows; without it this is nothing.
    #[inline(always)]
    pub(super) fn assert_mmu_locked(&self) {
        #[cfg(CONFIG_LOCKDEP)]
        // SAFETY: the VM lives.
        unsafe {
            bindings::rmmu_assert_mmu_locked(self.as_ptr())
        };
    }

    /// The same of `mmu_lock` held for write.
    #[inline(always)]
    pub(super) fn assert_mmu_locked_for_write(&self) {
        #[cfg(CONFIG_LOCKDEP)]
        // SAFETY: the VM lives.
        unsafe {
            bindings::rmmu_assert_mmu_locked_for_write(self.as_ptr())
        };
    }

    /// Flushes every TLB of the guest.
    pub fn flush_remote_tlbs(&self) {
        // SAFETY: the VM lives.
        unsafe { calls::kvm_flush_remote_tlbs(self.as_ptr()) }
    }

    /// Flushes `pages` frames from `gfn` on from every TLB of the guest.
    pub fn flush_remote_tlbs_range(&self, gfn: u64, pages: u64) {
        // SAFETY: the VM lives.
        unsafe { calls::kvm_flush_remote_tlbs_range(self.as_ptr(), gfn, pages) }
    }

    /// Asks every vCPU to drop roots that were invalidated, before it enters the guest again.
    pub fn request_free_obsolete_roots(&self) {
        // SAFETY: the VM lives; the request number is KVM's own.
        unsafe {
            calls::kvm_make_all_cpus_request(
                self.as_ptr(),
                bindings::rmmu_req_free_obsolete_roots() as u32,
            );
        }
    }

    /// Asks every vCPU to look up the APIC access page again.
    pub fn request_apic_page_reload(&self) {
        // SAFETY: the VM lives; the request number is KVM's own.
        unsafe {
            calls::kvm_make_all_cpus_request(
                self.as_ptr(),
                bindings::rmmu_req_apic_page_reload() as u32,
            );
        }
    }

    /// The number of invalidations by the host's mm that have ended.
    pub fn invalidate_seq(&self) -> usize {
        // SAFETY: a plain word that others write under mmu_lock; read once.
        let seq =
            unsafe { core::ptr::read_volatile(&raw const (*self.as_ptr()).mmu_invalidate_seq) };
        // The pfn is looked up after the number: pairs with the smp_wmb() of kvm_mmu_invalidate_end().
        smp_rmb();
        seq as usize
    }

    /// Whether an invalidation touches `gfn` now or has ended since `seq`; a hint, to save work.
    pub fn invalidate_retry_hint(&self, seq: usize, gfn: u64) -> bool {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_invalidate_retry_unsafe(self.as_ptr(), seq, gfn) }
    }

    /// The same, exactly: `mmu_lock` is held, so that no invalidation begins or ends meanwhile.
    pub fn invalidate_retry<L: HeldLock>(&self, _lock: &L, seq: usize, gfn: u64) -> bool {
        // SAFETY: the VM lives and the lock is held.
        unsafe { bindings::rmmu_invalidate_retry(self.as_ptr(), seq, gfn) }
    }

    /// Whether any frame of the range is being invalidated. `mmu_lock` is held, so it stays as it is.
    #[inline]
    pub fn invalidates<L: HeldLock>(&self, _lock: &L, range: GfnRange) -> bool {
        self.invalidation_meets(range)
    }

    /// Whether `gfn` is being invalidated; a hint, to keep off the lock that the invalidation needs.
    #[inline]
    pub fn invalidating_hint(&self, gfn: Gfn) -> bool {
        self.invalidation_meets(GfnRange::new(gfn, gfn.add(1)))
    }

    #[inline]
    fn invalidation_meets(&self, range: GfnRange) -> bool {
        let kvm = self.as_ptr();
        // SAFETY: words of the VM that are written under mmu_lock held for write. Each is read once.
        unsafe {
            (&raw const (*kvm).mmu_invalidate_in_progress).read_volatile() != 0
                && range.start.0 < (&raw const (*kvm).mmu_invalidate_range_end).read_volatile()
                && range.end.0 > (&raw const (*kvm).mmu_invalidate_range_start).read_volatile()
        }
    }

    /// Runs `f`, which changes mappings of `[start, end)`, so that faults that race with it retry.
    pub fn invalidating<R>(
        &self,
        guard: &mut WriteGuard<'_>,
        start: u64,
        end: u64,
        f: impl FnOnce(&mut WriteGuard<'_>) -> R,
    ) -> R {
        // SAFETY: the VM lives and mmu_lock is held for write.
        unsafe {
            calls::kvm_mmu_invalidate_start(self.as_ptr());
            calls::kvm_mmu_invalidate_range_add(self.as_ptr(), start, end);
        }
        let result = f(guard);
        // SAFETY: as above; closes what was started.
        unsafe { calls::kvm_mmu_invalidate_end(self.as_ptr()) };
        result
    }

    /// Counts leaf entries of `level` (1 is 4K) in KVM's own statistics.
    pub fn account_pages(&self, level: u8, delta: i64) {
        // SAFETY: the statistics are 64-bit atomics of KVM's.
        unsafe {
            if let Some(counter) = (*self.as_ptr())
                .stat
                .__bindgen_anon_1
                .pages
                .get_mut((level as usize).wrapping_sub(1))
            {
                AtomicI64::from_ptr(addr_of_mut!(*counter).cast())
                    .fetch_add(delta, Ordering::Relaxed);
            }
        }
    }

    /// Mapped pages of `level` (1 is 4K), by KVM's statistics.
    pub fn pages(&self, level: u8) -> i64 {
        // SAFETY: as in `account_pages`.
        unsafe {
            match (*self.as_ptr())
                .stat
                .__bindgen_anon_1
                .pages
                .get_mut((level as usize).wrapping_sub(1))
            {
                Some(counter) => {
                    AtomicI64::from_ptr(addr_of_mut!(*counter).cast()).load(Ordering::Relaxed)
                }
                None => 0,
            }
        }
    }

    /// Counts tables that are there because of the NX huge page mitigation only.
    pub fn account_nx_split(&self, delta: i64) {
        // SAFETY: the statistic is a word of KVM's that has no lock of its own.
        unsafe {
            let counter = &raw mut (*self.as_ptr()).stat.nx_lpage_splits;
            AtomicI64::from_ptr(counter.cast()).fetch_add(delta, Ordering::Relaxed);
        }
    }

    /// Whether the VM asked for huge pages in spite of the NX mitigation.
    pub fn nx_huge_pages_disabled(&self) -> bool {
        // SAFETY: a flag that only ever goes from false to true.
        unsafe { (*self.as_ptr()).arch.disable_nx_huge_pages }
    }

    /// The size of the hardware's log of dirty pages; 0 if there is none.
    pub fn cpu_dirty_log_size(&self) -> u32 {
        // SAFETY: constant after creation.
        unsafe { (*self.as_ptr()).arch.cpu_dirty_log_size as u32 }
    }

    /// Whether userspace may map memory before the guest asks for it.
    pub fn pre_fault_allowed(&self) -> bool {
        // SAFETY: constant after creation.
        unsafe { (*self.as_ptr()).arch.pre_fault_allowed }
    }

    /// The number of address spaces (2 with SMM).
    pub fn address_spaces(&self) -> u32 {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_nr_address_spaces(self.as_ptr()) }
    }

    /// Whether dirty logging starts with every page taken as dirty.
    pub fn dirty_log_initially_set(&self) -> bool {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_manual_protect_init_set(self.as_ptr()) }
    }

    /// Whether deleting a slot zaps everything (`KVM_X86_QUIRK_SLOT_ZAP_ALL`).
    pub fn slot_zap_all(&self) -> bool {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_slot_zap_all_quirk(self.as_ptr()) }
    }

    /// Whether the virtual APIC page is in use.
    pub fn apicv_activated(&self) -> bool {
        // SAFETY: the VM lives.
        unsafe { calls::kvm_apicv_activated(self.as_ptr()) }
    }

    /// Sleeps until the next round of NX recovery is due. Returns false if it is due now.
    pub fn nx_wait(&self, period_ms: u32) -> bool {
        // SAFETY: called by the VM's own recovery task.
        unsafe { bindings::rmmu_nx_wait(self.as_ptr(), period_ms) }
    }

    /// The round is over.
    pub fn nx_done(&self) {
        // SAFETY: as above.
        unsafe { bindings::rmmu_nx_done(self.as_ptr()) }
    }

    /// Runs `f` while slots cannot go away.
    pub fn with_srcu<R>(&self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the VM lives; left below.
        let index = unsafe { bindings::rmmu_srcu_lock(self.as_ptr()) };
        let result = f();
        // SAFETY: entered above.
        unsafe { bindings::rmmu_srcu_unlock(self.as_ptr(), index) };
        result
    }

    /// Whether the slot of a frame logs dirty pages. Within [`with_srcu`](Self::with_srcu).
    pub fn gfn_dirty_tracked(&self, smm: bool, gfn: u64) -> bool {
        // SAFETY: the VM lives, and SRCU keeps the slots.
        unsafe { bindings::rmmu_gfn_dirty_tracked(self.as_ptr(), smm, gfn) }
    }

    /// The slot of a frame. Whoever asks is in an SRCU section or holds slots_lock, for as long as the slot is used.
    pub fn find_slot(&self, smm: bool, gfn: Gfn) -> Option<&Slot> {
        if smm && self.address_spaces() < 2 {
            return None;
        }
        // SAFETY: the VM lives, has that address space, and the caller keeps the slots.
        unsafe { Slot::from_raw(bindings::rmmu_find_slot(self.as_ptr(), smm, gfn.0)) }
    }

    /// Calls `f` with each slot that has a frame of the range, in both address spaces. slots_lock or SRCU is held.
    pub fn for_each_slot(&self, range: GfnRange, mut f: impl FnMut(&Slot)) {
        for smm in [false, true] {
            if smm && self.address_spaces() < 2 {
                return;
            }
            let mut start = range.start;
            while start < range.end {
                // SAFETY: the VM lives, and the caller keeps the slots.
                let slot = unsafe {
                    Slot::from_raw(bindings::rmmu_next_slot(
                        self.as_ptr(),
                        smm,
                        start.0,
                        range.end.0,
                    ))
                };
                let Some(slot) = slot else { break };
                f(slot);
                start = slot.range().end;
            }
        }
    }

    /// Whether all slots have what a shadow root needs.
    pub fn has_slot_metadata(&self) -> bool {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_shadow_root_allocated(self.as_ptr()) }
    }

    /// Runs `f`, and then allocates for all slots, those made from now on included, what a shadow root needs: the reverse
    /// maps, and the counters of tracked writes. One thread at a time. Sleeps.
    pub fn alloc_slot_metadata(&self, f: impl FnOnce() -> Result) -> Result {
        // SAFETY: the VM lives; the lock is dropped below.
        unsafe { bindings::rmmu_slots_arch_lock(self.as_ptr()) };
        let result = f().and_then(|()| {
            // SAFETY: the lock is held, so that no slot comes without what it needs.
            to_result(unsafe { bindings::rmmu_alloc_slot_metadata(self.as_ptr()) })
        });
        // SAFETY: as above.
        unsafe {
            if result.is_ok() {
                bindings::rmmu_set_shadow_root_allocated(self.as_ptr());
            }
            bindings::rmmu_slots_arch_unlock(self.as_ptr());
        }
        result
    }

    /// The quota of shadow pages, as KVM and userspace set it.
    pub fn max_mmu_pages(&self) -> u64 {
        // SAFETY: a word that changes under mmu_lock.
        unsafe { (&raw const (*self.as_ptr()).arch.n_max_mmu_pages).read_volatile() as u64 }
    }

    /// Notes the quota for KVM. `mmu_lock` is held for write.
    pub fn set_max_mmu_pages(&self, _lock: &WriteGuard<'_>, pages: u64) {
        // SAFETY: as above, and the lock is held.
        unsafe { (*self.as_ptr()).arch.n_max_mmu_pages = pages as usize }
    }

    /// Whether mappings of the host are being invalidated. `mmu_lock` is held.
    pub fn invalidating_now(&self) -> bool {
        self.assert_mmu_locked();
        // SAFETY: a word that changes under mmu_lock.
        unsafe { (*self.as_ptr()).mmu_invalidate_in_progress != 0 }
    }

    /// A broken invariant: warns once, and the VM runs no more.
    pub fn bug(&self, what: &'static CStr) {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_vm_bug(self.as_ptr(), what.as_char_ptr().cast()) }
    }

    /// Lets every vCPU leave the guest once.
    pub fn force_exit_all(&self) {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_force_exit_all(self.as_ptr()) }
    }
}

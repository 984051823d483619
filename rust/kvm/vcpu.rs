// SPDX-License-Identifier: GPL-2.0

//! `struct kvm_vcpu` and its `struct kvm_mmu`: roots, caches, requests and statistics of a vCPU.

use crate::{
    kvm::{
        bindings, calls,
        root::{PaeEntry, RootHpa, INVALID_PAGE},
        slot::Slot,
        table,
        vm::Kvm,
    },
    mmu::{role::Role, types::Gfn, types::Hpa, types::Level},
};
use core::ptr::NonNull;
use kernel::{error::to_result, ffi::c_void, prelude::*, types::Opaque};

/// A vCPU, held by this thread.
#[repr(transparent)]
pub struct Vcpu(Opaque<bindings::kvm_vcpu>);

/// The paging context and roots of a vCPU, for itself or for a nested guest.
#[repr(transparent)]
pub struct Mmu(Opaque<bindings::kvm_mmu>);

/// Which roots of an [`Mmu`]: KVM's `KVM_MMU_ROOT_*` bits.
#[derive(Clone, Copy)]
pub struct RootSet(pub u64);

/// The bytes of an instruction that faulted, as far as the hardware told.
///
/// # Invariants
///
/// What KVM gave with a fault that is being handled: `bytes` are `len` bytes, or null.
#[derive(Clone, Copy)]
pub struct Instruction {
    bytes: *mut c_void,
    len: i32,
}

impl Instruction {
    /// Takes what KVM gave.
    ///
    /// # Safety
    ///
    /// As the type's invariants say.
    #[inline]
    pub unsafe fn new(bytes: *mut c_void, len: i32) -> Self {
        // INVARIANT: the caller's promise.
        Instruction { bytes, len }
    }
}

impl RootSet {
    /// The root in use and all previous ones.
    pub const ALL: RootSet = RootSet(u64::MAX);
    /// The root in use.
    pub const IN_USE: RootSet = RootSet(bindings::RMMU_KVM_MMU_ROOT_CURRENT);
    /// The previous ones.
    pub const PREVIOUS: RootSet = RootSet(!Self::IN_USE.0);

    /// Whether a root is in the set: number 0 is the one in use.
    pub fn has(self, bit: u32) -> bool {
        self.0 & 1u64.wrapping_shl(bit) != 0
    }
}

impl Mmu {
    /// Wraps KVM's pointer.
    ///
    /// # Safety
    ///
    /// `mmu` lives during `'a` and belongs to a vCPU that this thread holds.
    pub unsafe fn from_raw<'a>(mmu: *mut bindings::kvm_mmu) -> &'a Mmu {
        // SAFETY: a transparent wrapper; the caller promises the rest.
        unsafe { &*mmu.cast() }
    }

    /// KVM's pointer.
    pub fn as_ptr(&self) -> *mut bindings::kvm_mmu {
        self.0.get()
    }

    /// Whether the root maps guest physical addresses, not a guest's own tables.
    pub fn direct(&self) -> bool {
        self.role_bits().direct() != 0
    }

    /// The role of the root that this context needs.
    pub fn root_role(&self) -> Option<Role> {
        let bits = self.role_bits();
        Some(Role {
            word: self.role_word(),
            level: Level::new(bits.level() as u8)?,
            smm: bits.smm() != 0,
            guest_mode: bits.guest_mode() != 0,
            ad_disabled: bits.ad_disabled() != 0,
            access: bits.access() as u8,
        })
    }

    /// KVM's word for that role.
    pub fn role_word(&self) -> u32 {
        // SAFETY: the context lives; any bits are a word.
        unsafe { (*self.0.get()).root_role.word }
    }

    fn role_bits(&self) -> bindings::kvm_mmu_page_role__bindgen_ty_1 {
        // SAFETY: the context lives; the union is one word of bits.
        unsafe { (*self.0.get()).root_role.__bindgen_anon_1 }
    }

    /// The root in use.
    pub fn root(&self) -> Option<RootHpa> {
        // SAFETY: the context lives and is this thread's.
        RootHpa::of_field(unsafe { &(*self.0.get()).root })
    }

    /// Sets the root in use, or none, and what the guest's root register holds for it (0 for direct roots).
    pub fn set_root(&self, root: Option<RootHpa>, pgd: u64) {
        // SAFETY: the context lives and is this thread's.
        unsafe {
            (*self.0.get()).root.hpa = root.map_or(INVALID_PAGE, |root| root.get().0);
            (*self.0.get()).root.pgd = pgd;
        }
    }

    /// The roots used before.
    pub fn previous_roots(&self) -> impl Iterator<Item = Option<RootHpa>> {
        // SAFETY: the context lives and is this thread's.
        let roots = unsafe { (*self.0.get()).prev_roots };
        roots.into_iter().map(|root| RootHpa::of_field(&root))
    }

    /// Makes a root that `usable` accepts, by address and root register, the one in use.
    ///
    /// The one in use until now, if there is one, becomes the first of the previous roots; the last of these is then in use
    /// if none is usable. Without one in use, the previous roots move up.
    pub fn switch_root(&self, mut usable: impl FnMut(RootHpa, u64) -> bool) -> bool {
        // SAFETY: the context lives and is this thread's, and no other reference into it exists.
        let (root, previous) =
            unsafe { (&mut (*self.0.get()).root, &mut (*self.0.get()).prev_roots) };
        let mut fits = |root: &bindings::kvm_mmu_root_info| {
            RootHpa::of_field(root).is_some_and(|hpa| usable(hpa, root.pgd))
        };
        if root.hpa != INVALID_PAGE {
            if fits(root) {
                return true;
            }
            for other in previous.iter_mut() {
                core::mem::swap(root, other);
                if fits(root) {
                    return true;
                }
            }
            return false;
        }
        let Some(found) = previous.iter().position(&mut fits) else {
            return false;
        };
        if let Some(tail) = previous.get_mut(found..) {
            if let Some(hit) = tail.first() {
                *root = *hit;
            }
            tail.rotate_left(1);
            if let Some(last) = tail.last_mut() {
                last.hpa = INVALID_PAGE;
            }
        }
        true
    }

    /// The four entries of PAE paging, if this context has them.
    pub fn pae_entries(&self) -> Option<[PaeEntry; 4]> {
        // SAFETY: the context lives and is this thread's; the page, if there is one, is as old as the context or made by
        // `alloc_special_roots`.
        let words = unsafe {
            (*self.0.get())
                .pae_root
                .cast::<[u64; 4]>()
                .as_ref()
                .copied()
        };
        // SAFETY: zeroes at first; all else is from `set_pae_entries`.
        words.map(|words| words.map(|word| unsafe { PaeEntry::from_raw(word) }))
    }

    /// Sets these entries; nothing happens if this context has none.
    pub fn set_pae_entries(&self, entries: [PaeEntry; 4]) {
        // SAFETY: as above. The hardware reads each of them whole.
        unsafe {
            let to = (*self.0.get()).pae_root;
            if !to.is_null() {
                for (index, entry) in entries.into_iter().enumerate() {
                    to.add(index).write_volatile(entry.raw());
                }
            }
        }
    }

    /// Makes the pages above the four PAE entries, and the page of these: for a nested guest's tables of two or three
    /// levels, when the hardware's have four or five. They last as long as the context. Sleeps.
    pub fn alloc_special_roots(&self, level: Level) -> Result {
        let mmu = self.0.get();
        // SAFETY: the context lives and is this thread's.
        let (pae, pml4, pml5) = unsafe {
            (
                &mut (*mmu).pae_root,
                &mut (*mmu).pml4_root,
                &mut (*mmu).pml5_root,
            )
        };
        for (root, needed) in [(pae, true), (pml4, true), (pml5, level == Level::L256T)] {
            if needed && root.is_null() {
                // SAFETY: no precondition. KVM frees the page with the context.
                *root = unsafe { bindings::rmmu_zeroed_page() }.cast();
                if root.is_null() {
                    return Err(ENOMEM);
                }
            }
        }
        Ok(())
    }

    /// Links the PAE entries to the pages above them, if the hardware has levels there, and returns the root: none if this
    /// context has no such pages. `bits` are what an entry needs besides an address.
    pub fn link_pae_root(&self, level: Level, bits: u64) -> Option<RootHpa> {
        let mmu = self.0.get();
        // SAFETY: the context lives and is this thread's.
        let (pae, pml4, pml5) = unsafe { ((*mmu).pae_root, (*mmu).pml4_root, (*mmu).pml5_root) };
        let address =
            |page: *mut u64| -> Option<u64> { Some(table::hpa_of(NonNull::new(page)?.cast()).0) };
        let mut root = address(pae)?;
        for (page, at) in [(pml4, Level::L512G), (pml5, Level::L256T)] {
            if level >= at {
                let above = address(page)?;
                // SAFETY: the page is this context's.
                unsafe { page.write_volatile(root | bits) };
                root = above;
            }
        }
        // SAFETY: the page of PAE entries, or one above it, which lasts as long as the context.
        Some(unsafe { RootHpa::new(Hpa(root)) })
    }

    /// Hands every root of `set` for which `drop_it` says so to `sink`, the one in use last, and forgets it.
    pub fn take_roots(
        &self,
        set: RootSet,
        mut drop_it: impl FnMut(RootHpa) -> bool,
        mut sink: impl FnMut(RootHpa),
    ) {
        // SAFETY: the context lives and is this thread's.
        let previous = unsafe { &mut (*self.0.get()).prev_roots };
        for (bit, root) in (1..).zip(previous.iter_mut()) {
            let Some(hpa) = RootHpa::of_field(root) else {
                continue;
            };
            if set.has(bit) && drop_it(hpa) {
                root.hpa = INVALID_PAGE;
                root.pgd = u64::MAX;
                sink(hpa);
            }
        }
        if let Some(root) = self.root().filter(|&hpa| set.has(0) && drop_it(hpa)) {
            sink(root);
            self.set_root(None, 0);
        }
    }
}

/// A counter of faults that KVM keeps for each vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultStat {
    /// Faults that went down the whole path.
    Taken,
    /// Faults that installed or changed an entry.
    Fixed,
    /// Faults fixed without a lock.
    Fast,
    /// Faults that had nothing left to do.
    Spurious,
    /// Faults whose instruction is emulated.
    Emulate,
    /// MMIO entries installed.
    MmioInstalled,
}

impl Vcpu {
    /// Wraps KVM's pointer.
    ///
    /// # Safety
    ///
    /// `vcpu` lives during `'a` and this thread holds it (its mutex, or it is being created or destroyed).
    pub unsafe fn from_raw<'a>(vcpu: *mut bindings::kvm_vcpu) -> &'a Vcpu {
        // SAFETY: a transparent wrapper; the caller promises the rest.
        unsafe { &*vcpu.cast() }
    }

    /// KVM's pointer.
    pub fn as_ptr(&self) -> *mut bindings::kvm_vcpu {
        self.0.get()
    }

    /// The VM.
    pub fn kvm(&self) -> &Kvm {
        // SAFETY: a vCPU's VM outlives it.
        unsafe { Kvm::from_raw((*self.as_ptr()).kvm) }
    }

    /// The number of the vCPU among those of its VM.
    pub fn index(&self) -> usize {
        // SAFETY: set when the vCPU was created, constant afterwards.
        unsafe { (*self.as_ptr()).vcpu_idx as usize }
    }

    /// The context in use.
    pub fn mmu(&self) -> &Mmu {
        // SAFETY: points into the vCPU, which lives.
        unsafe { Mmu::from_raw((*self.as_ptr()).arch.mmu) }
    }

    /// The context of the guest itself.
    pub fn root_mmu(&self) -> &Mmu {
        // SAFETY: part of the vCPU, which lives.
        unsafe { Mmu::from_raw(&raw mut (*self.as_ptr()).arch.root_mmu) }
    }

    /// The context of a nested guest's tables.
    pub fn guest_mmu(&self) -> &Mmu {
        // SAFETY: part of the vCPU, which lives.
        unsafe { Mmu::from_raw(&raw mut (*self.as_ptr()).arch.guest_mmu) }
    }

    /// Whether it is the context of a nested guest's tables.
    pub fn is_guest_mmu(&self, mmu: &Mmu) -> bool {
        core::ptr::eq(mmu, self.guest_mmu())
    }

    /// Fills the caches that tables of one fault come from. Sleeps.
    pub fn topup_table_caches(&self) -> Result {
        /// Tables between a root and a 4K entry, and a root.
        const TABLES: i32 = bindings::PT64_ROOT_MAX_LEVEL as i32;
        // SAFETY: the caches are this thread's.
        unsafe {
            let arch = &raw mut (*self.as_ptr()).arch;
            for cache in [
                &raw mut (*arch).mmu_shadow_page_cache,
                &raw mut (*arch).mmu_page_header_cache,
            ] {
                // Most faults need no table: only what they find missing is worth a call.
                if (*cache).nobjs < TABLES {
                    to_result(calls::kvm_mmu_topup_memory_cache(cache, TABLES))?;
                }
            }
        }
        Ok(())
    }

    /// A header and a page of entries out of the caches, or nothing if they are empty.
    pub(super) fn take_table(&self) -> Option<(*mut c_void, *mut c_void)> {
        // SAFETY: the caches are this thread's, and neither is empty.
        unsafe {
            let arch = &raw mut (*self.as_ptr()).arch;
            if (*arch).mmu_shadow_page_cache.nobjs == 0 || (*arch).mmu_page_header_cache.nobjs == 0
            {
                return None;
            }
            let page = calls::kvm_mmu_memory_cache_alloc(&raw mut (*arch).mmu_shadow_page_cache);
            let header = calls::kvm_mmu_memory_cache_alloc(&raw mut (*arch).mmu_page_header_cache);
            Some((header, page))
        }
    }

    /// Loads the root into the hardware's context.
    pub fn load_pgd(&self, root: RootHpa, level: Level) {
        // SAFETY: the vCPU is loaded by this thread; bound when the VM was taken.
        unsafe { calls::vendor::load_mmu_pgd(self.as_ptr(), root.get().0, level.get().into()) }
    }

    /// Flushes this vCPU's translations.
    pub fn flush_tlb_current(&self) {
        // SAFETY: as for `load_pgd`.
        unsafe { calls::vendor::flush_tlb_current(self.as_ptr()) }
    }

    /// The slot of a frame in the vCPU's current address space.
    pub fn slot(&self, gfn: Gfn) -> Option<&Slot> {
        // SAFETY: the vCPU's thread is in an SRCU section, which keeps slots alive.
        unsafe { Slot::from_raw(calls::kvm_vcpu_gfn_to_memslot(self.as_ptr(), gfn.0)) }
    }

    /// Emulates the instruction that faulted at `gpa`.
    pub fn emulate(&self, gpa: u64, kind: i32, insn: Instruction) -> i32 {
        // SAFETY: the vCPU is this thread's; the instruction is one by its invariants.
        unsafe { calls::x86_emulate_instruction(self.as_ptr(), gpa, kind, insn.bytes, insn.len) }
    }

    /// Counts a fault in KVM's statistics.
    pub fn count(&self, what: FaultStat) {
        // SAFETY: the vCPU's own statistics, which only its thread changes.
        let counter = unsafe {
            let stat = &mut (*self.as_ptr()).stat;
            match what {
                FaultStat::Taken => &mut stat.pf_taken,
                FaultStat::Fixed => &mut stat.pf_fixed,
                FaultStat::Fast => &mut stat.pf_fast,
                FaultStat::Spurious => &mut stat.pf_spurious,
                FaultStat::Emulate => &mut stat.pf_emulate,
                FaultStat::MmioInstalled => &mut stat.pf_mmio_spte_created,
            }
        };
        *counter = counter.wrapping_add(1);
    }

    /// The generation of the slots, which MMIO entries carry.
    pub fn memslots_generation(&self) -> u64 {
        // SAFETY: the vCPU's thread is in an SRCU section.
        unsafe { bindings::rmmu_memslots_generation(self.as_ptr()) }
    }

    /// Whether `address` is the MMIO address that was emulated last: of the guest's memory if its tables are not
    /// shadowed (`direct`), else a virtual one. Never of its own guest's.
    pub fn mmio_cached(&self, address: u64, direct: bool) -> bool {
        // SAFETY: the vCPU lives; this thread's cache.
        unsafe { bindings::rmmu_mmio_cached(self.as_ptr(), address, direct) }
    }

    /// Remembers `gfn` as MMIO, and the guest virtual address it was reached by; 0 if that is not known.
    pub fn mmio_cache(&self, gva: u64, gfn: Gfn, access: u64) {
        // SAFETY: as above.
        unsafe { bindings::rmmu_mmio_cache(self.as_ptr(), gva, gfn.0, access as u32) }
    }

    /// Forgets it.
    #[inline]
    pub fn mmio_forget(&self) {
        // SAFETY: as above. 0 is how KVM says that it remembers no address (vcpu_match_mmio_gva()).
        unsafe { (*self.as_ptr()).arch.mmio_gva = 0 }
    }

    /// Forgets it if it is at this guest virtual address.
    pub fn mmio_forget_gva(&self, gva: u64) {
        // SAFETY: as above.
        unsafe { bindings::rmmu_mmio_forget_gva(self.as_ptr(), gva) }
    }

    /// Whether the vCPU runs a nested guest.
    pub fn guest_mode(&self) -> bool {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_guest_mode(self.as_ptr()) }
    }

    /// KVM_RUN is to return because of a signal.
    pub fn signal_exit(&self) {
        // SAFETY: the vCPU's kvm_run page is mapped.
        unsafe { bindings::rmmu_signal_exit(self.as_ptr()) }
    }

    /// Fills in `KVM_EXIT_MEMORY_FAULT`.
    pub fn memory_fault_exit(&self, gfn: Gfn, write: bool, exec: bool) {
        // SAFETY: as above.
        unsafe { bindings::rmmu_memory_fault_exit(self.as_ptr(), gfn.0, write, exec) }
    }

    /// Lets the next entry bring the roots up to date.
    pub fn request_sync(&self) {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_request_sync(self.as_ptr()) }
    }

    /// Lets the next entry flush this vCPU's translations.
    pub fn request_flush(&self) {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_request_flush(self.as_ptr()) }
    }

    /// Lets the next entry drop obsolete roots.
    pub fn request_free_obsolete_roots(&self) {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_request_free_obsolete_roots(self.as_ptr()) }
    }

    /// Whether it is to do so.
    pub fn free_obsolete_roots_pending(&self) -> bool {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_free_obsolete_roots_pending(self.as_ptr()) }
    }

    /// Whether the instruction at this place was let go on before for a fault at this address.
    pub fn was_retried(&self, address: u64) -> bool {
        // SAFETY: the vCPU is loaded by this thread.
        unsafe {
            let arch = &raw const (*self.as_ptr()).arch;
            (*arch).last_retry_eip == bindings::rmmu_rip(self.as_ptr())
                && (*arch).last_retry_addr == address as usize
        }
    }

    /// Notes that it is let go on.
    pub fn note_retry(&self, address: u64) {
        // SAFETY: the vCPU is loaded by this thread.
        unsafe {
            let arch = &raw mut (*self.as_ptr()).arch;
            (*arch).last_retry_eip = bindings::rmmu_rip(self.as_ptr());
            (*arch).last_retry_addr = address as usize;
        }
    }

    /// Forgets that.
    pub fn forget_retry(&self) {
        // SAFETY: the vCPU is this thread's.
        unsafe {
            let arch = &raw mut (*self.as_ptr()).arch;
            (*arch).last_retry_eip = 0;
            (*arch).last_retry_addr = 0;
        }
    }

    /// Whether an event whose delivery the fault interrupted waits to be delivered again.
    pub fn event_needs_reinjection(&self) -> bool {
        // SAFETY: the vCPU is this thread's.
        unsafe { bindings::rmmu_event_needs_reinjection(self.as_ptr()) }
    }

    /// Lets the next entry load the root again.
    pub fn request_load_pgd(&self) {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_request_load_pgd(self.as_ptr()) }
    }

    /// Takes the request to drop obsolete roots.
    pub fn take_free_obsolete_roots(&self) -> bool {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_take_free_obsolete_roots(self.as_ptr()) }
    }

    /// Takes the request that says the VM is dead.
    pub fn is_vm_dead(&self) -> bool {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_is_vm_dead(self.as_ptr()) }
    }

    /// Whether a page that takes I/O may come in while the guest goes on.
    pub fn can_do_async_pf(&self) -> bool {
        // SAFETY: the vCPU lives.
        unsafe { calls::kvm_can_do_async_pf(self.as_ptr()) }
    }

    /// Whether the frame is on its way in already.
    pub fn async_pf_pending(&self, gfn: Gfn) -> bool {
        // SAFETY: the vCPU lives.
        unsafe { calls::kvm_find_async_pf_gfn(self.as_ptr(), gfn.0) }
    }

    /// Lets the guest wait for the frame that is on its way in.
    pub fn request_apf_halt(&self) {
        // SAFETY: the vCPU lives.
        unsafe { bindings::rmmu_request_apf_halt(self.as_ptr()) }
    }

    /// Starts to bring a frame in while the guest goes on. False if that cannot be.
    ///
    /// `address` is what faulted, and `root` what the guest's root register holds, none for a direct root.
    pub fn setup_async_pf(
        &self,
        address: u64,
        gfn: Gfn,
        error_code: u64,
        root: Option<u64>,
    ) -> bool {
        // SAFETY: the vCPU is this thread's, and so are its token counter and `arch`, which KVM copies.
        unsafe {
            let vcpu = self.as_ptr();
            let id = &raw mut (*vcpu).arch.apf.id;
            // A token of 0 means "wake all" to the guest, so the counter part is never 0.
            if (*id) << 12 == 0 {
                *id = 1;
            }
            let mut arch = bindings::kvm_arch_async_pf {
                token: ((*id) << 12) | (*vcpu).vcpu_id as u32,
                gfn: gfn.0,
                cr3: root.map_or(usize::MAX, |root| root as usize),
                direct_map: root.is_none(),
                error_code,
            };
            *id = (*id).wrapping_add(1);
            let hva = calls::kvm_vcpu_gfn_to_hva(vcpu, gfn.0);
            calls::kvm_setup_async_pf(vcpu, address, hva, &mut arch)
        }
    }
}

/// Whether a signal is pending for this thread.
pub fn signal_pending() -> bool {
    // SAFETY: no precondition.
    unsafe { bindings::rmmu_signal_pending() }
}

/// Lets other threads run.
pub fn cond_resched() {
    // SAFETY: process context without locks, as every caller of a handler that sleeps.
    unsafe { bindings::rmmu_cond_resched() }
}

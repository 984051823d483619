// SPDX-License-Identifier: GPL-2.0

//! KVM as the shadow MMU's [`ShadowHost`], and the caches its pages and descriptors come from.
//!
//! Headers, pages of entries and descriptors are objects of kvm.ko's own caches, as those of [`table`](super::table) are, and
//! the vCPU's caches are filled and freed by KVM. A header says in one byte what it is of; the page's private word leads to
//! it. Reverse maps are where KVM allocates them, in the slots, and in KVM's layout, so that KVM's statistics of them in
//! debugfs are right.

use crate::{
    kvm::{
        bindings, calls, host::KvmHost, page::Neighbours, param, slot::Slot, table, trace,
        vcpu::Vcpu, vm::Kvm,
    },
    mmu::{
        host::Host,
        shadow::{
            Buckets, Counter, Desc, DescPtr, Maximum, Page, PageEvent, PagePtr, PageRole,
            PageSource, ShadowHost, ShadowVcpu, SplitCaches, Translations, KIND_SHADOW,
        },
        spte::Spte,
        sync::{
            atomic::{AtomicU64, Ordering},
            Flush, MmuWrite,
        },
        table::{offset, Entries, ENTRIES},
        types::{Gfn, GfnRange, Hpa, Level, Pfn},
    },
};
use core::{
    mem::{offset_of, size_of},
    ptr::{addr_of_mut, NonNull},
};
use kernel::{error::to_result, ffi::c_void, prelude::*};

const _: () = assert!(size_of::<Page>() <= offset_of!(bindings::kvm_mmu_page, callback_head));
const _: () = assert!(size_of::<bindings::kvm_rmap_head>() == size_of::<AtomicU64>());

/// Entries that are prefetched together.
const PREFETCH: usize = 8;
/// What one fault can need: the entry's own, one for each level's parent, and those of prefetched entries.
const DESCS: i32 = 1 + TABLES + PREFETCH as i32;
/// Tables of one fault.
const TABLES: i32 = bindings::PT64_ROOT_MAX_LEVEL as i32;
/// Descriptors to split one huge page: each of its entries, and the table's parent.
const SPLIT_DESCS: i32 = ENTRIES as i32 + 1;
/// What KVM caches by default.
const DEFAULT_CAPACITY: i32 = bindings::KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE as i32;

/// Counts of what KVM's statistics do not have.
#[derive(Default)]
pub struct ShadowStats {
    /// Pages brought up to date.
    pub synced: AtomicU64,
    /// Entries installed in advance.
    pub prefetched: AtomicU64,
    /// Huge pages of nested guests split in advance.
    pub nested_splits: AtomicU64,
}

/// Whether a header is of a shadow page.
///
/// # Safety
///
/// It is the header of a table of the TDP MMU, or of a shadow page, that lives.
pub(super) unsafe fn is_shadow(header: NonNull<c_void>) -> bool {
    // SAFETY: both kinds of header are longer and have the byte there, which does not change once the header is in use.
    unsafe { header.cast::<u8>().byte_add(offset::KIND).read_volatile() == KIND_SHADOW }
}

/// Makes a page of fresh parts.
///
/// # Safety
///
/// All are valid and nobody else's; the header is zeroed, and the entries are all `NONPRESENT`.
unsafe fn join(
    header: NonNull<c_void>,
    entries: NonNull<c_void>,
    translations: Option<NonNull<c_void>>,
) -> PagePtr {
    // SAFETY: the entries are a whole page of the kernel's memory.
    unsafe { bindings::rmmu_table_join(header.as_ptr(), entries.as_ptr()) };
    table::count_live(1);
    // SAFETY: the caller's promise.
    unsafe {
        PagePtr::adopt(
            header.cast::<Page>(),
            entries.cast::<Entries>(),
            table::hpa_of(entries),
            translations.map(NonNull::cast::<Translations>),
        )
    }
}

/// Frees a page that nobody can reach.
///
/// # Safety
///
/// `page` was made by [`join`], and nothing points to it any more.
pub(super) unsafe fn free_now(page: PagePtr) {
    let entries = page.entries().as_ptr().cast::<c_void>();
    let translations = page.translations();
    // SAFETY: the caller's promise; all three came from where they go.
    unsafe {
        bindings::rmmu_table_part(entries);
        bindings::rmmu_page_free(entries);
        if let Some(translations) = translations {
            bindings::rmmu_page_free(translations.as_ptr().cast());
        }
        bindings::rmmu_header_free(page.as_ptr().as_ptr().cast());
    }
    table::count_live(-1);
}

impl KvmHost<'_> {
    /// A counter of KVM's that changes under `mmu_lock`.
    ///
    /// # Safety
    ///
    /// `counter` is a field of the VM's statistics.
    unsafe fn add_stat(counter: *mut u64, by: i64) {
        // SAFETY: the caller's promise; a word that readers read without a lock.
        unsafe { AtomicU64::from_ptr(counter) }.fetch_add(by as u64, Ordering::Relaxed);
    }
}

// SAFETY: a page is joined of fresh parts, and freed after call_rcu() or by hand; the header of a page's entries is found
// through the private word, which is set before the page is used and cleared when it is freed; reverse maps are in the
// slots, zeroed when KVM allocates them, and nobody else writes to them; mmu_unsync_pages_lock is a spinlock of the VM.
unsafe impl ShadowHost for KvmHost<'_> {
    #[inline]
    fn page_of(&self, hpa: Hpa) -> PagePtr {
        // SAFETY: the engine asks for pages that its entries point to, which live, and whose private word is the header.
        unsafe {
            let header = table::header_at(hpa);
            PagePtr::from_raw(NonNull::new_unchecked(header.cast()))
        }
    }

    #[inline]
    fn page_at(&self, entries: NonNull<Entries>) -> PagePtr {
        self.page_of(table::hpa_of(entries.cast()))
    }

    fn free_page_rcu(&self, page: PagePtr) {
        // SAFETY: the engine's contract; the header is an object of the cache of `struct kvm_mmu_page`, whose rcu_head the
        // engine leaves alone.
        unsafe { bindings::rmmu_table_free_rcu(page.as_ptr().as_ptr().cast()) }
    }

    fn free_desc(&self, desc: DescPtr) {
        // SAFETY: out of a cache of descriptors, and not in use any more.
        unsafe { bindings::rmmu_desc_free(self.kvm.as_ptr(), desc.as_ptr().as_ptr().cast()) }
    }

    fn account_page(&self, page: PagePtr, delta: i32) {
        self.tables.fetch_add(delta.into(), Ordering::Relaxed);
        // SAFETY: the VM's own statistics; the entries are a live page of the kernel's memory.
        unsafe {
            Self::add_stat(
                addr_of_mut!((*self.kvm.as_ptr()).stat.mmu_shadow_pages),
                delta.into(),
            );
            bindings::rmmu_table_account(page.entries().as_ptr().cast(), delta);
        }
    }

    fn account_indirect(&self, _delta: i64) {
        // KVM's own count, indirect_shadow_pages, is for code of KVM's MMU alone, which does not run for a VM of ours.
    }

    fn slot(&self, smm: bool, gfn: Gfn) -> Option<&Slot> {
        self.kvm.find_slot(smm, gfn)
    }

    fn slot_range(&self, slot: &Slot) -> GfnRange {
        slot.range()
    }

    #[inline]
    fn rmap<'s>(&'s self, slot: &'s Slot, gfn: Gfn, level: Level) -> Option<&'s AtomicU64> {
        slot.rmap(gfn, level)
    }

    #[inline]
    fn write_tracked(&self, slot: &Slot, gfn: Gfn) -> bool {
        slot.write_tracked(self.kvm, gfn)
    }

    fn track_writes(&self, slot: &Slot, gfn: Gfn, delta: i32) {
        slot.track_writes(gfn, delta);
    }

    fn disallow_lpage(&self, slot: &Slot, gfn: Gfn, delta: i32) {
        slot.disallow_lpage(gfn, delta);
    }

    fn lpage_allowed(&self, slot: &Slot, gfn: Gfn) -> bool {
        slot.lpage_allowed(self.kvm, gfn)
    }

    fn protect_in_tdp(&self, lock: &MmuWrite<'_>, slot: &Slot, gfn: Gfn) -> Flush {
        match self.tdp {
            Some(tdp) => tdp.write_protect_gfn(self, lock, slot.smm(), gfn, Level::L4K),
            None => Flush::none(),
        }
    }

    #[inline]
    fn dirty_logged(&self, slot: &Slot) -> bool {
        slot.dirty_tracked()
    }

    fn with_unsync_lock<R>(&self, f: impl FnOnce() -> R) -> R {
        // SAFETY: a spinlock of the VM, initialised by in-tree when the VM was created.
        unsafe { bindings::rmmu_unsync_lock(self.kvm.as_ptr()) };
        let result = f();
        // SAFETY: taken above.
        unsafe { bindings::rmmu_unsync_unlock(self.kvm.as_ptr()) };
        result
    }

    fn host_mmio_mapped_without_root(&self) {
        // The vendor module clears buffers at each entry if the root's header says so; of a root without one, such as that
        // of PAE paging, it asks the VM.
        // SAFETY: the VM lives.
        let noted = unsafe { &raw mut (*self.kvm.as_ptr()).arch.has_mapped_host_mmio };
        // SAFETY: a byte of the VM that is only ever set, and that everybody reads and writes as a whole.
        unsafe {
            if noted.read_volatile() {
                return;
            }
            noted.write_volatile(true);
        }
        self.host_mmio_mapped();
    }

    fn root_zapped(&self) {
        self.kvm.request_free_obsolete_roots();
    }

    fn recursive_nested_zap(&self) -> bool {
        self.tdp_enabled
    }

    #[inline]
    fn count(&self, counter: Counter, by: i64) {
        let stats = self.shadow_stats;
        let kvm = self.kvm.as_ptr();
        // SAFETY: fields of the VM's statistics, which live.
        unsafe {
            let field = match counter {
                Counter::ShadowZapped => addr_of_mut!((*kvm).stat.mmu_shadow_zapped),
                Counter::PteWrite => addr_of_mut!((*kvm).stat.mmu_pte_write),
                Counter::PdeZapped => addr_of_mut!((*kvm).stat.mmu_pde_zapped),
                Counter::Flooded => addr_of_mut!((*kvm).stat.mmu_flooded),
                Counter::Recycled => addr_of_mut!((*kvm).stat.mmu_recycled),
                Counter::CacheMiss => addr_of_mut!((*kvm).stat.mmu_cache_miss),
                Counter::Unsync => addr_of_mut!((*kvm).stat.mmu_unsync),
                Counter::Synced => stats.synced.as_ptr(),
                Counter::Prefetched => stats.prefetched.as_ptr(),
                Counter::NestedSplit => stats.nested_splits.as_ptr(),
            };
            Self::add_stat(field, by);
        }
    }

    #[inline(always)]
    fn trace_page(&self, event: PageEvent<'_>) {
        trace::page(event);
    }

    #[inline]
    fn maximum(&self, what: Maximum, n: u64) {
        let kvm = self.kvm.as_ptr();
        // SAFETY: fields of the VM's statistics, which live.
        let counter = unsafe {
            AtomicU64::from_ptr(match what {
                Maximum::RmapSize => addr_of_mut!((*kvm).stat.max_mmu_rmap_size),
                Maximum::HashCollisions => addr_of_mut!((*kvm).stat.max_mmu_page_hash_collisions),
            })
        };
        // Under mmu_lock, so that nobody else raises it meanwhile.
        if counter.load(Ordering::Relaxed) < n {
            counter.store(n, Ordering::Relaxed);
        }
    }
}

/// Memory for the hash table of shadow pages, zeroed. Sleeps.
pub fn alloc_buckets(kvm: &Kvm) -> Option<NonNull<Buckets>> {
    // SAFETY: the VM lives.
    let memory = unsafe { bindings::rmmu_take_page_hash(kvm.as_ptr(), size_of::<Buckets>()) };
    NonNull::new(memory.cast())
}

/// Frees it.
///
/// # Safety
///
/// From [`alloc_buckets`], and not in use.
pub unsafe fn free_buckets(buckets: NonNull<Buckets>) {
    // SAFETY: the caller's promise.
    unsafe { bindings::rmmu_free_page_hash(buckets.as_ptr().cast()) }
}

/// Whether a cache has so many objects.
///
/// # Safety
///
/// `cache` is a cache that nobody else uses now.
unsafe fn has(cache: *const bindings::kvm_mmu_memory_cache, objects: i32) -> bool {
    // SAFETY: the caller's promise.
    unsafe { (*cache).nobjs >= objects }
}

/// An object of a cache, if it has one.
///
/// # Safety
///
/// As for [`has`].
unsafe fn take(cache: *mut bindings::kvm_mmu_memory_cache) -> Option<NonNull<c_void>> {
    // SAFETY: the caller's promise; the cache is not empty, so that nothing is allocated under a lock.
    unsafe {
        if !has(cache, 1) {
            return None;
        }
        NonNull::new(calls::kvm_mmu_memory_cache_alloc(cache))
    }
}

impl Vcpu {
    /// Fills the caches that pages and descriptors of one fault come from. Sleeps.
    pub fn topup_shadow_caches(&self, indirect: bool) -> Result {
        // SAFETY: the caches are this thread's.
        unsafe {
            let arch = &raw mut (*self.as_ptr()).arch;
            to_result(calls::kvm_mmu_topup_memory_cache(
                &raw mut (*arch).mmu_pte_list_desc_cache,
                DESCS,
            ))?;
            if indirect {
                to_result(calls::kvm_mmu_topup_memory_cache(
                    &raw mut (*arch).mmu_shadowed_info_cache,
                    TABLES,
                ))?;
            }
        }
        self.topup_table_caches()
    }
}

/// The vCPU, for the shadow MMU.
pub struct ShadowCpu<'a> {
    vcpu: &'a Vcpu,
    /// Pages of the host for entries that are installed in advance.
    neighbours: Neighbours,
    /// Whether the host's page table is worth a look for them.
    look: bool,
    /// Those among them that a reference is held on.
    held: [*mut bindings::page; PREFETCH],
    held_count: usize,
}

impl<'a> ShadowCpu<'a> {
    /// The vCPU, whose caches have been filled.
    pub fn new(vcpu: &'a Vcpu) -> Self {
        Self::for_fault(vcpu, true)
    }

    /// The same, in a fault at a page that the host had mapped, `resident`, or had not. In the latter case its neighbours are
    /// most likely not mapped either.
    pub fn for_fault(vcpu: &'a Vcpu, resident: bool) -> Self {
        ShadowCpu {
            vcpu,
            neighbours: Neighbours::new(),
            look: resident,
            held: [core::ptr::null_mut(); PREFETCH],
            held_count: 0,
        }
    }

    /// Gets references on pages that the host lets us write, of those from `gfn` on; how many.
    fn hold(&mut self, slot: &Slot, gfn: Gfn, pfns: &mut [Pfn]) -> usize {
        let wanted = pfns.len().min(PREFETCH);
        if wanted == 0 {
            return 0;
        }
        // SAFETY: the slot lives, and the array has room for that many pages.
        let got = unsafe {
            calls::kvm_prefetch_pages(slot.as_ptr(), gfn.0, self.held.as_mut_ptr(), wanted as i32)
        };
        self.held_count = usize::try_from(got).unwrap_or(0).min(wanted);
        for (pfn, page) in pfns.iter_mut().zip(self.held.iter().take(self.held_count)) {
            // SAFETY: a page on which we hold a reference.
            *pfn = Pfn(unsafe { bindings::rmmu_page_to_pfn(*page) });
        }
        self.held_count
    }
}

// SAFETY: what the caches give is fresh; headers and descriptors are zeroed (gfp_zero), and pages of mmu_shadow_page_cache
// are filled with SHADOW_NONPRESENT_VALUE, which is the engine's NONPRESENT.
unsafe impl PageSource for ShadowCpu<'_> {
    fn take_page(&mut self, translations: bool) -> Option<PagePtr> {
        // SAFETY: the caches are this thread's.
        unsafe {
            let arch = &raw mut (*self.vcpu.as_ptr()).arch;
            let info = &raw mut (*arch).mmu_shadowed_info_cache;
            if translations && !has(info, 1) {
                return None;
            }
            let (header, entries) = self.vcpu.take_table()?;
            let translations = if translations { take(info) } else { None };
            Some(join(
                NonNull::new(header)?,
                NonNull::new(entries)?,
                translations,
            ))
        }
    }

    fn take_desc(&mut self) -> Option<DescPtr> {
        // SAFETY: the cache is this thread's, and what it gives is zeroed.
        unsafe {
            let arch = &raw mut (*self.vcpu.as_ptr()).arch;
            let desc = take(&raw mut (*arch).mmu_pte_list_desc_cache)?;
            Some(DescPtr::adopt(desc.cast::<Desc>()))
        }
    }
}

impl<'k> ShadowVcpu<KvmHost<'k>> for ShadowCpu<'_> {
    fn root_role(&self) -> PageRole {
        PageRole(self.vcpu.mmu().role_word())
    }

    fn slot<'h>(&self, _host: &'h KvmHost<'k>, gfn: Gfn) -> Option<&'h Slot> {
        // SAFETY: the vCPU's thread is in an SRCU section for longer than the host is borrowed.
        let slot =
            unsafe { Slot::from_raw(calls::kvm_vcpu_gfn_to_memslot(self.vcpu.as_ptr(), gfn.0)) };
        slot.filter(|slot| !slot.invalid())
    }

    fn may_prefetch(&mut self) -> bool {
        self.neighbours.forget();
        param::shadow_prefetch() && !self.vcpu.kvm().invalidating_now()
    }

    #[inline]
    fn memtype(&self, gfn: Gfn, host_mmio: bool) -> u64 {
        super::page::memtype(self.vcpu, gfn, host_mmio)
    }

    fn mmio_generation(&self) -> u64 {
        self.vcpu.memslots_generation()
    }

    /// If the page that faulted was there, the host's page table is looked at for these, too: no page is held, and none
    /// marked. Under the lock nothing is taken away, since no invalidation is in progress (`may_prefetch`), and a page that
    /// the host may write is dirty there already. One look covers the aligned group of frames, which most often is that of
    /// the guest's entries.
    ///
    /// Where that finds nothing the host is asked for a reference: it may have the page, but clean.
    fn prefetch_pages(
        &mut self,
        host: &KvmHost<'k>,
        lock: &MmuWrite<'_>,
        slot: &Slot,
        gfn: Gfn,
        pfns: &mut [Pfn],
    ) -> usize {
        if self.look && self.neighbours.writable(slot, gfn).is_none() {
            let start = Gfn(gfn.0 & !(PREFETCH as u64).wrapping_sub(1));
            let group = GfnRange::new(start, start.add(PREFETCH as u64));
            let group = group.intersect(slot.range());
            self.neighbours.look(host.kvm, slot, gfn, group, lock);
        }
        let mut known: usize = 0;
        for (i, pfn) in (0..).zip(pfns.iter_mut()) {
            let Some(found) = self.neighbours.writable(slot, gfn.add(i)) else {
                break;
            };
            *pfn = found;
            known = known.wrapping_add(1);
        }
        let rest = pfns.get_mut(known..).unwrap_or_default();
        known.wrapping_add(self.hold(slot, gfn.add(known as u64), rest))
    }

    fn release_prefetched(&mut self) {
        for page in self.held.iter().take(self.held_count) {
            // SAFETY: the reference is ours. The page is mapped writable, and may be made so without the host being told.
            unsafe { calls::kvm_release_page_dirty(*page) }
        }
        self.held_count = 0;
    }

    fn request_sync(&mut self) {
        self.vcpu.request_sync();
    }
}

/// The VM's caches for eager splitting, which whoever holds slots_lock owns.
pub struct SplitCache<'a>(pub &'a Kvm);

impl SplitCache<'_> {
    fn arch(&self) -> *mut bindings::kvm_arch {
        // SAFETY: part of the VM, which lives.
        unsafe { &raw mut (*self.0.as_ptr()).arch }
    }
}

// SAFETY: what the caches give is fresh, headers and descriptors are zeroed, and the entries are filled here.
unsafe impl PageSource for SplitCache<'_> {
    fn take_page(&mut self, translations: bool) -> Option<PagePtr> {
        // Huge pages are split into direct pages, which need none.
        if translations || !self.ready() {
            return None;
        }
        let arch = self.arch();
        // SAFETY: the holder of slots_lock owns the caches; a page of entries is fresh, and has that many.
        unsafe {
            let header = take(&raw mut (*arch).split_page_header_cache)?;
            let entries = take(&raw mut (*arch).split_shadow_page_cache)?;
            for index in 0..ENTRIES {
                entries
                    .cast::<u64>()
                    .add(index)
                    .write(Spte::NONPRESENT.raw());
            }
            Some(join(header, entries, None))
        }
    }

    fn take_desc(&mut self) -> Option<DescPtr> {
        // SAFETY: as above.
        unsafe {
            let desc = take(&raw mut (*self.arch()).split_desc_cache)?;
            Some(DescPtr::adopt(desc.cast::<Desc>()))
        }
    }
}

impl SplitCaches for SplitCache<'_> {
    fn ready(&self) -> bool {
        let arch = self.arch();
        // SAFETY: the holder of slots_lock owns the caches.
        unsafe {
            has(&raw const (*arch).split_desc_cache, SPLIT_DESCS)
                && has(&raw const (*arch).split_page_header_cache, 1)
                && has(&raw const (*arch).split_shadow_page_cache, 1)
        }
    }

    fn top_up(&mut self) -> bool {
        let arch = self.arch();
        // SAFETY: as above, and mmu_lock is not held.
        unsafe {
            bindings::rmmu_cond_resched();
            calls::__kvm_mmu_topup_memory_cache(
                &raw mut (*arch).split_desc_cache,
                SPLIT_DESCS + DEFAULT_CAPACITY,
                SPLIT_DESCS,
            ) == 0
                && calls::kvm_mmu_topup_memory_cache(&raw mut (*arch).split_page_header_cache, 1)
                    == 0
                && calls::kvm_mmu_topup_memory_cache(&raw mut (*arch).split_shadow_page_cache, 1)
                    == 0
        }
    }
}

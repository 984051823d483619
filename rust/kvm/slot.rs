// SPDX-License-Identifier: GPL-2.0

//! `struct kvm_memory_slot`.

use crate::{
    kvm::{bindings, calls, vm::Kvm},
    mmu::{
        sync::atomic::AtomicU64,
        types::{Gfn, GfnRange, Level, PAGE_SHIFT},
    },
};
use kernel::types::Opaque;

/// A memory slot, protected by KVM's SRCU or slots_lock for as long as a handler runs.
#[repr(transparent)]
pub struct Slot(Opaque<bindings::kvm_memory_slot>);

impl Slot {
    /// Wraps KVM's pointer; `None` for a null pointer.
    ///
    /// # Safety
    ///
    /// A slot that is not null lives during `'a`.
    pub unsafe fn from_raw<'a>(slot: *const bindings::kvm_memory_slot) -> Option<&'a Slot> {
        // SAFETY: a transparent wrapper; the caller promises the rest.
        unsafe { slot.cast::<Slot>().as_ref() }
    }

    /// KVM's pointer.
    pub fn as_ptr(&self) -> *mut bindings::kvm_memory_slot {
        self.0.get()
    }

    /// The frames of the slot.
    #[inline]
    pub fn range(&self) -> GfnRange {
        // SAFETY: the slot lives, and its place is constant.
        let (base, pages) = unsafe { ((*self.as_ptr()).base_gfn, (*self.as_ptr()).npages) };
        GfnRange::new(Gfn(base), Gfn(base.wrapping_add(pages as u64)))
    }

    /// Whether the slot is of the SMM address space.
    pub fn smm(&self) -> bool {
        // SAFETY: the slot lives.
        unsafe { (*self.as_ptr()).as_id == 1 }
    }

    /// Whether the slot is on its way out (deleted or moved).
    #[inline]
    pub fn invalid(&self) -> bool {
        self.has(bindings::KVM_MEMSLOT_INVALID)
    }

    #[inline]
    fn has(&self, flag: u32) -> bool {
        // SAFETY: the slot lives; a word that is read once.
        let flags = unsafe { core::ptr::read_volatile(&raw const (*self.as_ptr()).flags) };
        flags & flag != 0
    }

    /// Whether the guest may only read.
    #[inline]
    pub fn read_only(&self) -> bool {
        self.has(bindings::KVM_MEM_READONLY)
    }

    /// Whether the slot is KVM's own page for the APIC.
    pub fn is_apic_access_page(&self) -> bool {
        // SAFETY: the slot lives.
        unsafe { bindings::rmmu_slot_is_apic_access(self.as_ptr()) }
    }

    /// Whether writes to the slot are logged.
    #[inline]
    pub fn dirty_tracked(&self) -> bool {
        self.has(bindings::KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Whether all of the slot's memory is a guest_memfd.
    #[inline]
    pub fn gmem_only(&self) -> bool {
        self.has(bindings::KVM_MEMSLOT_GMEM_ONLY)
    }

    /// Whether writes to `gfn`, which lies in the slot, are tracked.
    #[inline]
    pub fn write_tracked(&self, kvm: &Kvm, gfn: Gfn) -> bool {
        // SAFETY: both live, and the frame is in the slot.
        self.has_write_tracking()
            && unsafe { calls::kvm_gfn_is_write_tracked(kvm.as_ptr(), self.as_ptr(), gfn.0) }
    }

    /// Whether writes to some frame of the slot can be tracked at all. Most slots never are.
    #[inline]
    pub fn has_write_tracking(&self) -> bool {
        // SAFETY: the slot lives. KVM allocates the array before the first frame is tracked, and never takes it away.
        unsafe {
            !(&raw const (*self.as_ptr()).arch.gfn_write_track)
                .read_volatile()
                .is_null()
        }
    }

    /// Counts who wants writes to `gfn`, which lies in the slot, tracked. `mmu_lock` is held for write.
    pub fn track_writes(&self, gfn: Gfn, delta: i32) {
        // SAFETY: the slot lives, has its counters since the first shadow root, and the frame is in it.
        unsafe { bindings::rmmu_slot_track_writes(self.as_ptr(), gfn.0, delta) }
    }

    /// Counts reasons for not mapping `gfn`, which lies in the slot, by a huge page. `mmu_lock` is held for write.
    pub fn disallow_lpage(&self, gfn: Gfn, delta: i32) {
        // SAFETY: the slot lives, and the frame is in it.
        unsafe { bindings::rmmu_slot_disallow_lpage(self.as_ptr(), gfn.0, delta) }
    }

    /// Whether nothing forbids a huge page at `gfn`, which lies in the slot, in either address space.
    pub fn lpage_allowed(&self, kvm: &Kvm, gfn: Gfn) -> bool {
        // SAFETY: both live, and whoever has the slot keeps the others, too.
        unsafe { bindings::rmmu_lpage_allowed(kvm.as_ptr(), self.as_ptr(), gfn.0) }
    }

    /// The head of the reverse map of `gfn`, for entries of `level`; none if the slot has no maps, or not this frame.
    #[inline]
    pub fn rmap(&self, gfn: Gfn, level: Level) -> Option<&AtomicU64> {
        let range = self.range();
        // A huge page may begin before the slot does, but then it is not mapped.
        if !range.contains(gfn) {
            return None;
        }
        // SAFETY: the slot lives. KVM sets the pointers before the first frame is mapped, and never takes them away.
        let maps = unsafe { &raw const (*self.as_ptr()).arch.rmap };
        // SAFETY: as above.
        let maps = unsafe { maps.read_volatile() };
        let heads = *maps.get(level.slot())?;
        // As gfn_to_index(): the first head is that of the huge page in which the slot begins.
        let shift = level.gfn_shift();
        let index = (gfn.0 >> shift).wrapping_sub(range.start.0 >> shift) as usize;
        if heads.is_null() {
            return None;
        }
        // SAFETY: an array with a head for each page of the level that has a frame in the slot; each is a word that lives as
        // long as the slot, and that KVM reads as an atomic.
        Some(unsafe { &*heads.cast::<AtomicU64>().add(index) })
    }

    /// How many reasons there are against mapping `gfn`, which lies in the slot, by a huge page of `level`. `mmu_lock` is
    /// held.
    pub fn lpage_count(&self, gfn: Gfn, level: Level) -> i32 {
        // SAFETY: the slot lives, the frame is in it, and the level is 2M or 1G.
        unsafe { bindings::rmmu_slot_lpage_count(self.as_ptr(), gfn.0, level.get().into()) }
    }

    /// The number of these that the slot was made with (`kvm_alloc_memslot_metadata()`): a huge page at either end would
    /// reach beyond the slot, and nowhere can there be one if frame and address are not aligned alike.
    pub fn lpage_count_at_first(&self, gfn: Gfn, level: Level) -> i32 {
        let (range, mask) = (self.range(), level.gfn_mask());
        // SAFETY: the slot lives, and its address is constant.
        let address = unsafe { (*self.as_ptr()).userspace_addr } as u64 >> PAGE_SHIFT;
        let last = Gfn(range.end.0.wrapping_sub(1));
        let beyond = |end: Gfn, frame: Gfn| {
            end.0 & mask != 0 && frame.round_down(level) == gfn.round_down(level)
        };
        let misaligned = (range.start.0 ^ address) & mask != 0;
        i32::from(misaligned || beyond(range.start, range.start) || beyond(range.end, last))
    }

    /// How many want writes to `gfn`, which lies in the slot, tracked; none if the slot does not count them. `mmu_lock` is
    /// held.
    pub fn write_track_count(&self, gfn: Gfn) -> Option<u16> {
        // SAFETY: the slot lives. KVM allocates the array before the first frame is tracked, and never takes it away.
        let counts = unsafe { (&raw const (*self.as_ptr()).arch.gfn_write_track).read_volatile() };
        let index = gfn.0.wrapping_sub(self.range().start.0) as usize;
        // SAFETY: an array with a count for each frame of the slot, of which this is one.
        (!counts.is_null()).then(|| unsafe { counts.add(index).read() })
    }

    /// Marks `gfn` in the dirty log.
    pub fn mark_dirty(&self, kvm: &Kvm, gfn: Gfn) {
        // SAFETY: both live.
        unsafe { calls::mark_page_dirty_in_slot(kvm.as_ptr(), self.as_ptr(), gfn.0) }
    }

    /// The highest level at which `gfn` may be mapped: what slot and host allow, at most `limit`.
    ///
    /// The caller holds `mmu_lock` and has checked, or will check, for an invalidation.
    pub fn max_mapping_level(&self, kvm: &Kvm, gfn: Gfn, limit: Level) -> Level {
        kvm.assert_mmu_locked();
        let level = self.max_level(gfn, limit);
        if level == Level::L4K {
            return level;
        }
        // SAFETY: both live; the VM's mm cannot go while a handler runs.
        let host = unsafe { bindings::rmmu_host_mapping_level(kvm.as_ptr(), self.as_ptr(), gfn.0) };
        Level::new(host as u8).unwrap_or(Level::L4K).min(level)
    }

    /// The highest level that the slot allows for `gfn`, at most `limit`.
    #[inline]
    pub fn max_level(&self, gfn: Gfn, limit: Level) -> Level {
        if limit == Level::L4K {
            return limit;
        }
        let range = self.range();
        let mut level = limit.min(Level::MAX_HUGE);
        // `gfn` of a table that starts before the slot has no lpage_info.
        if gfn < range.start || gfn >= range.end {
            return Level::L4K;
        }
        while level > Level::L4K {
            // SAFETY: the slot lives, the frame is in it, and the level is 2M or 1G.
            let disallowed = unsafe {
                bindings::rmmu_slot_lpage_disallowed(self.as_ptr(), gfn.0, level.get().into())
            };
            if !disallowed {
                break;
            }
            level = level.child().unwrap_or(Level::L4K);
        }
        if self.gmem_only() {
            return Level::L4K;
        }
        level
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The one central interface to the host's pages: from a frame of a slot to a host frame.

use crate::{
    kvm::{bindings, calls, slot::Slot, vcpu::Vcpu, vm::Kvm},
    mmu::{
        sync::{MmuLocked, MmuWrite},
        types::{Gfn, GfnRange, Level, Pfn, PAGE_SHIFT},
    },
};
use core::{
    marker::PhantomData,
    mem::MaybeUninit,
    ptr::{self, NonNull},
};
use kernel::error::code::EFAULT;

/// What the host maps at a frame, with a reference on the page until the value is released.
#[must_use = "the page's reference must be released"]
pub struct HostPage {
    /// The frame.
    pub pfn: Pfn,
    /// The host lets us write.
    pub writable: bool,
    /// The highest level the backing allows.
    pub max_level: Level,
    page: Option<NonNull<bindings::page>>,
}

/// Why there is no page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoPage {
    /// A signal is pending.
    Signal,
    /// A write to memory that is read-only in the host.
    ReadOnly,
    /// The memory is broken.
    Poisoned,
    /// The host would have to sleep for I/O, and was asked not to.
    NeedsIo,
    /// No page behind the address, or an errno of guest_memfd.
    Error(i32),
}

/// How to ask the host.
#[derive(Clone, Copy)]
pub struct Lookup {
    /// The guest wants to write.
    pub write: bool,
    /// Do not sleep for I/O.
    pub nowait: bool,
}

/// What a pfn that is none has set some of.
const NO_PFN: u64 = bindings::KVM_PFN_ERR_NOSLOT_MASK as u64;

/// KVM's word for "no slot, so no frame", in its events.
pub const NO_SLOT: Pfn = Pfn(bindings::KVM_PFN_NOSLOT as u64);

impl HostPage {
    /// Looks up, and if need be faults in, the host's page behind `gfn`. Sleeps.
    pub fn fault_in(slot: &Slot, gfn: Gfn, how: Lookup) -> Result<HostPage, NoPage> {
        let mut flags = 0;
        if how.write {
            flags |= bindings::FOLL_WRITE;
        }
        flags |= if how.nowait {
            bindings::FOLL_NOWAIT
        } else {
            bindings::FOLL_INTERRUPTIBLE
        };
        let mut writable = false;
        let mut page = ptr::null_mut();
        // SAFETY: the slot lives and the frame is in it; both out-pointers are ours.
        let pfn = unsafe {
            calls::__kvm_faultin_pfn(slot.as_ptr(), gfn.0, flags, &mut writable, &mut page)
        };
        if pfn & NO_PFN != 0 {
            return Err(match pfn {
                bindings::KVM_PFN_ERR_HWPOISON => NoPage::Poisoned,
                bindings::KVM_PFN_ERR_RO_FAULT => NoPage::ReadOnly,
                bindings::KVM_PFN_ERR_SIGPENDING => NoPage::Signal,
                bindings::KVM_PFN_ERR_NEEDS_IO => NoPage::NeedsIo,
                _ => NoPage::Error(EFAULT.to_errno()),
            });
        }
        Ok(HostPage {
            pfn: Pfn(pfn),
            writable,
            max_level: Level::MAX_HUGE,
            page: NonNull::new(page),
        })
    }

    /// The same for a slot whose memory is a guest_memfd.
    pub fn fault_in_gmem(kvm: &Kvm, slot: &Slot, gfn: Gfn) -> Result<HostPage, NoPage> {
        let (mut pfn, mut order, mut page) = (0, 0, ptr::null_mut());
        // SAFETY: VM and slot live and the frame is in the slot; the out-pointers are ours.
        let error = unsafe {
            calls::kvm_gmem_get_pfn(
                kvm.as_ptr(),
                slot.as_ptr(),
                gfn.0,
                &mut pfn,
                &mut page,
                &mut order,
            )
        };
        if error != 0 {
            return Err(NoPage::Error(error));
        }
        let max_level = match order {
            18.. => Level::L1G,
            9.. => Level::L2M,
            _ => Level::L4K,
        };
        Ok(HostPage {
            pfn: Pfn(pfn),
            writable: !slot.read_only(),
            max_level,
            page: NonNull::new(page),
        })
    }

    /// Gives the reference back; nothing was mapped.
    pub fn release_unused(self) {
        if let Some(page) = self.page {
            // SAFETY: the reference is ours, taken in `fault_in`.
            unsafe { bindings::rmmu_release_unused(page.as_ptr()) }
        }
    }

    /// Gives the reference back; the page was mapped, writable if the host allowed it.
    ///
    /// Under `mmu_lock`: marking a page dirty must not race with writeback, which takes mappings away first.
    pub fn release_mapped(self) {
        let Some(page) = self.page else { return };
        // SAFETY: the reference is ours, taken in `fault_in`.
        unsafe {
            if self.writable {
                calls::kvm_release_page_dirty(page.as_ptr())
            } else {
                calls::kvm_release_page_clean(page.as_ptr())
            }
        }
    }
}

/// How many frames one look at the host's page table can cover.
pub const MAX_WINDOW: u64 = bindings::RMMU_HOST_WINDOW as u64;

/// A page that the host has mapped, without a reference: it is as true as `mmu_lock` is held.
#[derive(Clone, Copy)]
pub struct MappedPage {
    /// The frame.
    pub pfn: Pfn,
    /// The host lets us write, and knows already that the page is dirty.
    pub writable: bool,
}

/// What the host's page table has for a frame and the frames around it.
pub struct HostWindow<'l> {
    window: &'l bindings::rmmu_host_window,
    asked: GfnRange,
    read_only: bool,
    /// The level at which the host maps the frame that was asked for; none if it does not, or does not allow the access.
    pub level: Option<Level>,
    _lock: PhantomData<&'l ()>,
}

/// Where a look at the host's page table goes. It is large, and not to be copied.
pub type WindowPlace = MaybeUninit<bindings::rmmu_host_window>;

impl<'l> HostWindow<'l> {
    /// A place for a look.
    pub const PLACE: WindowPlace = MaybeUninit::uninit();

    /// Looks at `range`, frames of the slot around `gfn`. Never sleeps, never faults the host.
    ///
    /// The caller holds `mmu_lock`, and no invalidation of the range is in progress: none can begin until the lock drops,
    /// so what is found here may be mapped as it is. `None` if the range is not one to look at.
    #[inline]
    pub fn look<L: MmuLocked>(
        kvm: &Kvm,
        slot: &Slot,
        gfn: Gfn,
        range: GfnRange,
        write: bool,
        _lock: &'l L,
        place: &'l mut WindowPlace,
    ) -> Option<Self> {
        let within = slot.range().intersect(range);
        if within != range || !range.contains(gfn) || range.pages() > MAX_WINDOW {
            return None;
        }
        let read_only = slot.read_only();
        if write && read_only {
            return None;
        }
        // SAFETY: VM and slot live, and so does the VM's mm, which is this thread's; the frames are in the slot, so that
        // their addresses follow each other; the place has room for them.
        let level = unsafe {
            bindings::rmmu_host_window(
                kvm.as_ptr(),
                slot.as_ptr(),
                gfn.0,
                gfn.0.wrapping_sub(range.start.0) as u32,
                range.pages() as u32,
                write,
                place.as_mut_ptr(),
            )
        };
        Some(HostWindow {
            // SAFETY: the function has written `first`, `end` and what is between; the rest is never read, and is numbers
            // whatever it holds.
            window: unsafe { place.assume_init_ref() },
            asked: range,
            read_only,
            level: Level::new(level as u8),
            _lock: PhantomData,
        })
    }

    /// Whether the frame that was asked for has no neighbours in the window, though it might have had.
    #[inline]
    pub fn is_alone(&self) -> bool {
        self.range().pages() == 1 && self.asked.pages() > 1
    }

    /// The frames that were found, the one that was asked for among them.
    #[inline]
    pub fn range(&self) -> GfnRange {
        GfnRange::new(
            self.asked.start.add(self.window.first.into()),
            self.asked.start.add(self.window.end.into()),
        )
    }

    /// The page at a frame.
    #[inline]
    pub fn page(&self, gfn: Gfn) -> Option<MappedPage> {
        let at = gfn.0.wrapping_sub(self.asked.start.0) as usize;
        if at < self.window.first as usize || at >= self.window.end as usize {
            return None;
        }
        let page = *self.window.pages.get(at)?;
        (page & u64::from(bindings::RMMU_HOST_PRESENT) != 0).then_some(MappedPage {
            pfn: Pfn(page >> PAGE_SHIFT),
            writable: page & u64::from(bindings::RMMU_HOST_WRITABLE) != 0 && !self.read_only,
        })
    }
}

/// Pages of the host around a frame, for entries that are installed in advance: one look serves them all.
///
/// # Invariants
///
/// If `found` is not empty, the place has the pages from its start to its end, of those that were asked for from `asked` on.
pub struct Neighbours {
    slot: *const Slot,
    asked: Gfn,
    found: GfnRange,
    place: WindowPlace,
}

impl Neighbours {
    const NOTHING: GfnRange = GfnRange {
        start: Gfn(0),
        end: Gfn(0),
    };

    /// Nothing is known.
    pub const fn new() -> Self {
        Neighbours {
            slot: ptr::null(),
            asked: Gfn(0),
            found: Self::NOTHING,
            place: HostWindow::PLACE,
        }
    }

    /// What was found may be true no more: the lock was dropped since.
    pub fn forget(&mut self) {
        self.found = Self::NOTHING;
    }

    /// Looks at `range`, frames of the slot around `gfn`, as [`HostWindow::look`] does, for pages that can be written.
    pub fn look(&mut self, kvm: &Kvm, slot: &Slot, gfn: Gfn, range: GfnRange, lock: &MmuWrite<'_>) {
        let found = HostWindow::look(kvm, slot, gfn, range, true, lock, &mut self.place)
            .filter(|window| window.level.is_some())
            .map(|window| window.range());
        // INVARIANT: what the look found, in the place it was given.
        self.slot = slot;
        self.asked = range.start;
        self.found = found.unwrap_or(Self::NOTHING);
    }

    /// The host's frame, if it is known and can be written.
    #[inline]
    pub fn writable(&self, slot: &Slot, gfn: Gfn) -> Option<Pfn> {
        if !self.found.contains(gfn) || !ptr::eq(self.slot, slot) {
            return None;
        }
        // SAFETY: the type's invariant. The rest of the place is never read, and is numbers whatever it holds.
        let window = unsafe { self.place.assume_init_ref() };
        let page = *window
            .pages
            .get(gfn.0.wrapping_sub(self.asked.0) as usize)?;
        const WANTED: u64 = (bindings::RMMU_HOST_PRESENT | bindings::RMMU_HOST_WRITABLE) as u64;
        (page & WANTED == WANTED).then_some(Pfn(page >> PAGE_SHIFT))
    }
}

/// Forgets what was learnt of the process's memory for a VM that ends.
pub fn forget_answers(kvm: &Kvm) {
    // SAFETY: only the address is of use.
    unsafe { bindings::rmmu_forget_answers(kvm.as_ptr()) }
}

/// Tells userspace that `gfn` is broken memory (SIGBUS).
pub fn signal_poison(slot: &Slot, gfn: Gfn) {
    // SAFETY: the slot lives and the frame is in it.
    unsafe { bindings::rmmu_hwpoison_signal(slot.as_ptr(), gfn.0) }
}

/// Whether the host maps `pfn` as a device's memory.
pub fn is_host_mmio(pfn: Pfn) -> bool {
    // SAFETY: any number will do.
    unsafe { bindings::rmmu_is_mmio_pfn(pfn.0) }
}

/// The memory type bits an entry for `gfn` takes (Intel SDM 31.3.7.2; none on AMD).
pub fn memtype(vcpu: &Vcpu, gfn: Gfn, host_mmio: bool) -> u64 {
    // SAFETY: the vCPU is loaded by this thread; bound when the VM was taken, or returns 0.
    unsafe { calls::vendor::get_mt_mask(vcpu.as_ptr(), gfn.0, host_mmio).into() }
}

// SPDX-License-Identifier: GPL-2.0

//! The one central interface to the host's pages: from a frame of a slot to a host frame.

use crate::{
    kvm::{bindings, calls, slot::Slot, vcpu::Vcpu, vm::Kvm},
    mmu::types::{Gfn, Level, Pfn},
};
use core::ptr::{self, NonNull};
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

/// Error bits of a pfn that is none: bits 52 to 62.
const PFN_ERROR: u64 = 0x7ff << 52;

/// KVM's word for "no slot, so no frame", in its events.
pub const NO_SLOT: Pfn = Pfn(1 << 63);

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
        if pfn & PFN_ERROR != 0 || pfn >> 63 != 0 {
            return Err(match pfn & 0xf {
                // The error numbers of kvm_host.h: FAULT 0, HWPOISON 1, RO_FAULT 2, SIGPENDING 3, NEEDS_IO 4.
                1 => NoPage::Poisoned,
                2 => NoPage::ReadOnly,
                3 => NoPage::Signal,
                4 => NoPage::NeedsIo,
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

// SPDX-License-Identifier: GPL-2.0

//! Where KVM keeps how a guest pages.
//!
//! Older kernels have it in the context that shadows the guest's tables, `struct kvm_mmu`. Newer ones have a
//! `struct kvm_pagewalk` for the guest's own addresses, one for those of a nested guest's memory, and in each context a
//! pointer to the one it shadows. The build looks which it is (`rmmu_has_pagewalk`, see Kbuild), and nothing outside of
//! this file has to know.

use crate::kvm::{
    bindings,
    vcpu::{Mmu, Vcpu},
};

/// The struct that says how a guest pages.
#[cfg(not(rmmu_has_pagewalk))]
pub type Walk = bindings::kvm_mmu;
/// The struct that says how a guest pages.
#[cfg(rmmu_has_pagewalk)]
pub type Walk = bindings::kvm_pagewalk;

/// What KVM computes of a guest's paging, for walks of its tables.
pub struct Format {
    /// Bits that must be clear, of entries that are no leaf above 4K and of those that are, by level.
    pub rsvd: [[u64; 5]; 2],
    /// EPT: combinations of memory type and permissions that must not be.
    pub bad_mt_xwr: u64,
    /// Which accesses fault, by error code and by what the entries allow.
    pub permissions: [u16; 16],
    /// The same for protection keys.
    pub pkru_mask: u32,
}

impl Mmu {
    /// How the guest pages whose tables the context shadows.
    #[cfg(not(rmmu_has_pagewalk))]
    pub(super) fn walk(&self) -> *mut Walk {
        self.as_ptr()
    }

    /// How the guest pages whose tables the context shadows.
    #[cfg(rmmu_has_pagewalk)]
    pub(super) fn walk(&self) -> *mut Walk {
        // SAFETY: the context lives; KVM sets the pointer when it creates the vCPU, and never again.
        unsafe { (*self.as_ptr()).w }
    }

    /// What KVM computed of that.
    #[cfg(not(rmmu_has_pagewalk))]
    pub(super) fn format(&self) -> Format {
        let walk = self.walk();
        // SAFETY: part of a vCPU that lives, and that only its own thread changes, which this is.
        unsafe {
            Format {
                rsvd: (*walk).guest_rsvd_check.rsvd_bits_mask,
                bad_mt_xwr: (*walk).guest_rsvd_check.bad_mt_xwr,
                permissions: (*walk).permissions,
                pkru_mask: (*walk).pkru_mask,
            }
        }
    }

    /// What KVM computed of that.
    #[cfg(rmmu_has_pagewalk)]
    pub(super) fn format(&self) -> Format {
        let walk = self.walk();
        // SAFETY: part of a vCPU that lives, and that only its own thread changes, which this is.
        unsafe {
            Format {
                rsvd: (*walk).fmt.rsvd_bits_mask,
                bad_mt_xwr: (*walk).fmt.bad_mt_xwr,
                permissions: (*walk).fmt.permissions,
                pkru_mask: (*walk).fmt.pkru_mask,
            }
        }
    }
}

impl Vcpu {
    /// The context that shadows the tables of a walk: one of this vCPU's.
    #[cfg(not(rmmu_has_pagewalk))]
    pub fn mmu_of_walk(&self, walk: *mut Walk) -> &Mmu {
        // SAFETY: KVM names a context of a vCPU that this thread holds.
        unsafe { Mmu::from_raw(walk) }
    }

    /// The context that shadows the tables of a walk: one of this vCPU's. The guest's own addresses are shadowed by its own
    /// context, or not at all; all others are those of a nested guest's memory.
    #[cfg(rmmu_has_pagewalk)]
    pub fn mmu_of_walk(&self, walk: *mut Walk) -> &Mmu {
        if core::ptr::eq(walk, self.instruction_walk()) {
            self.root_mmu()
        } else {
            self.guest_mmu()
        }
    }

    /// How the addresses that instructions use are translated.
    #[cfg(not(rmmu_has_pagewalk))]
    fn instruction_walk(&self) -> *mut Walk {
        // SAFETY: the vCPU lives and is this thread's.
        unsafe { (*self.as_ptr()).arch.walk_mmu }
    }

    /// How the addresses that instructions use are translated.
    #[cfg(rmmu_has_pagewalk)]
    fn instruction_walk(&self) -> *mut Walk {
        // SAFETY: the vCPU lives; only the address of a part of it is taken.
        unsafe { &raw mut (*self.as_ptr()).arch.gva_walk }
    }

    /// The current context does not translate the addresses that instructions use: a nested hypervisor made its tables.
    pub(super) fn mmu_is_not_walked(&self) -> bool {
        !core::ptr::eq(self.mmu().walk(), self.instruction_walk())
    }
}

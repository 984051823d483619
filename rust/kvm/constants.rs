// SPDX-License-Identifier: GPL-2.0

//! The engine's constants are KVM's.
//!
//! The engine is built for the host, too, and sees no header of the kernel. So it has numbers of its own where it shares a
//! layout with KVM, and a kernel in which one of them is another does not get a module. Where the fields of a role are, which no
//! constant says, `abi` compares.

use crate::{
    kvm::bindings::*,
    mmu::{
        shadow::{guest::ErrorCode, list, reclaim},
        spte::{self, Spte},
        types::{ACC_EXEC, ACC_READ, ACC_USER, ACC_WRITE, ENTRIES, PAGE_SHIFT},
    },
};

// Frames and tables.
const _: () = {
    assert!(1 << PAGE_SHIFT == kernel::page::PAGE_SIZE);
    assert!(ENTRIES == kernel::page::PAGE_SIZE / size_of::<u64>());
    assert!(ACC_READ as u64 == RMMU_ACC_READ_MASK);
    assert!(ACC_WRITE as u64 == RMMU_ACC_WRITE_MASK);
    assert!(ACC_USER as u64 == RMMU_ACC_USER_MASK);
    assert!(ACC_EXEC as u64 == RMMU_ACC_EXEC_MASK);
    assert!(list::BUCKETS_SHIFT == KVM_MMU_HASH_SHIFT);
    assert!(reclaim::MIN_FREE == KVM_MIN_FREE_MMU_PAGES as u64);
    assert!(reclaim::REFILL == KVM_REFILL_PAGES as u64);
};

// Entries: the format is KVM's own, so that whatever looks at entries understands ours.
const _: () = {
    assert!(spte::HW_PRESENT == RMMU_PT_PRESENT_MASK);
    assert!(spte::WRITABLE == RMMU_PT_WRITABLE_MASK);
    assert!(spte::LARGE == RMMU_PT_PAGE_SIZE_MASK);
    assert!(spte::MMU_PRESENT == RMMU_SPTE_MMU_PRESENT_MASK);
    assert!(spte::SUPPRESS_VE == RMMU_VMX_EPT_SUPPRESS_VE_BIT as u64);
    assert!(Spte::NONPRESENT.0 == RMMU_SHADOW_NONPRESENT_VALUE as u64);
    assert!(Spte::FROZEN.0 == RMMU_FROZEN_SPTE as u64);
    assert!(spte::AD_MASK == RMMU_SPTE_TDP_AD_MASK);
    assert!(spte::AD_DISABLED == RMMU_SPTE_TDP_AD_DISABLED);
    assert!(spte::AD_WRITE_PROTECT_ONLY == RMMU_SPTE_TDP_AD_WRPROT_ONLY);
    assert!(spte::TRACK_SAVED == RMMU_SHADOW_ACC_TRACK_SAVED_BITS_MASK);
    assert!(spte::TRACK_SHIFT as u64 == RMMU_SHADOW_ACC_TRACK_SAVED_BITS_SHIFT);
    assert!(spte::EPT_MEMTYPE == RMMU_VMX_EPT_MT_MASK | RMMU_VMX_EPT_IPAT_BIT);
    assert!(spte::EPT_EXECUTE == RMMU_VMX_EPT_EXECUTABLE_MASK);
    assert!(spte::EPT_USER_EXECUTE == RMMU_VMX_EPT_USER_EXECUTABLE_MASK);
    assert!(spte::GEN_LOW_MASK == RMMU_MMIO_SPTE_GEN_LOW_MASK);
    assert!(spte::GEN_LOW_SHIFT as u64 == RMMU_MMIO_SPTE_GEN_LOW_SHIFT);
    assert!(spte::GEN_HIGH_MASK == RMMU_MMIO_SPTE_GEN_HIGH_MASK);
    assert!(spte::GEN_HIGH_SHIFT as u64 == RMMU_MMIO_SPTE_GEN_HIGH_SHIFT);
    assert!(spte::NONPRESENT_GFN_SHIFT as u64 == RMMU_SHADOW_NONPRESENT_OR_RSVD_MASK_LEN);
};

// Error codes.
const _: () = {
    assert!(ErrorCode::PRESENT.0 == RMMU_PFERR_PRESENT_MASK);
    assert!(ErrorCode::WRITE.0 == RMMU_PFERR_WRITE_MASK);
    assert!(ErrorCode::USER.0 == RMMU_PFERR_USER_MASK);
    assert!(ErrorCode::RSVD.0 == RMMU_PFERR_RSVD_MASK);
    assert!(ErrorCode::FETCH.0 == RMMU_PFERR_FETCH_MASK);
    assert!(ErrorCode::PK.0 == RMMU_PFERR_PK_MASK);
    assert!(ErrorCode::SHADOW_STACK.0 == RMMU_PFERR_SS_MASK);
    assert!(ErrorCode::GUEST_FINAL.0 == RMMU_PFERR_GUEST_FINAL_MASK);
    assert!(ErrorCode::GUEST_PAGE.0 == RMMU_PFERR_GUEST_PAGE_MASK);
    assert!(ErrorCode::IMPLICIT.0 == RMMU_PFERR_IMPLICIT_ACCESS);
};

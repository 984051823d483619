/* SPDX-License-Identifier: GPL-2.0 */
/* Where KVM keeps how a guest pages: see walk.rs. */
#ifdef RMMU_HAS_PAGEWALK
#define rmmu_walk(mmu) ((mmu)->w)
/* The struct's name in BTF's words, for prototypes. */
#define RMMU_WALK "struct kvm_pagewalk"
#else
#define rmmu_walk(mmu) (mmu)
#define RMMU_WALK "struct kvm_mmu"
#endif

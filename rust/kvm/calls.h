/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The static calls that calls.c defines, and the handlers of rust/hook/entry.rs, each with the type that the kernel's own header
 * gives the function. bindgen reads this: Rust types none of them by hand.
 */
#ifndef RMMU_CALLS_H
#define RMMU_CALLS_H

#include <linux/btf.h>
#include <linux/ftrace.h>
#include <linux/kallsyms.h>
#include <linux/kvm_host.h>
#include <linux/static_call.h>
#include <asm/e820/api.h>
#include <asm/memtype.h>
#include "mmu.h"
#include "mmu/mmu_internal.h"
#include "mmu/page_track.h"
#include "mmu/tdp_mmu.h"
#include "x86.h"
#include "kvm_emulate.h"
#include "kvm_mm.h"

/* Static in kvm.ko: no header declares them. Like all prototypes, these are compared with BTF. */
bool kvm_nx_huge_page_recovery_worker(void *data);
void __kvm_mmu_zap_all_fast_front_half(struct kvm *kvm);

/* rmmu_FUNCTION: the handler, in Rust. rmmu_orig_FUNCTION: the function itself, past its patched entry. */
#define RMMU_HOOK(func, owner, proto)					\
	typeof(func) rmmu_##func;					\
	DECLARE_STATIC_CALL(rmmu_orig_##func, func);
#include "../hook/entry_points.h"
#undef RMMU_HOOK

/* rmmu_call_FUNCTION: a function of kvm.ko, from its first instruction. */
#define RMMU_CALL(func, proto) DECLARE_STATIC_CALL(rmmu_call_##func, func);
#include "callees.h"
#undef RMMU_CALL

/* rmmu_core_FUNCTION: a function of the core kernel that is not exported. */
#define RMMU_CORE(func, proto) DECLARE_STATIC_CALL(rmmu_core_##func, func);
#include "core_functions.h"
#undef RMMU_CORE

/* rmmu_x86_OPERATION: an operation of the vendor module, as kvm_x86_OPERATION is in kvm.ko. */
#define RMMU_X86_OP(op)		(*((struct kvm_x86_ops *)NULL)->op)
#define RMMU_NESTED_OP(op)	(*((struct kvm_x86_nested_ops *)NULL)->op)
DECLARE_STATIC_CALL(rmmu_x86_load_mmu_pgd, RMMU_X86_OP(load_mmu_pgd));
DECLARE_STATIC_CALL(rmmu_x86_flush_tlb_current, RMMU_X86_OP(flush_tlb_current));
DECLARE_STATIC_CALL(rmmu_x86_get_mt_mask, RMMU_X86_OP(get_mt_mask));
DECLARE_STATIC_CALL(rmmu_x86_cache_reg, RMMU_X86_OP(cache_reg));
DECLARE_STATIC_CALL(rmmu_x86_write_log_dirty, RMMU_NESTED_OP(write_log_dirty));

#endif

// SPDX-License-Identifier: GPL-2.0
/*
 * Static calls into kvm.ko, and the two tables Rust binds them from. Only C can define a static call.
 */
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
#include "glue.h"
#include "shadow_glue.h"
#include "walk.h"

/* Static in kvm.ko: no header declares them. */
bool kvm_nx_huge_page_recovery_worker(void *data);
void __kvm_mmu_zap_all_fast_front_half(struct kvm *kvm);

/* rmmu_orig_FUNCTION: the function itself, past its patched entry. */
#define RMMU_HOOK(func, owner, proto) DEFINE_STATIC_CALL_NULL(rmmu_orig_##func, func);
#include "../hook/entry_points.h"
#undef RMMU_HOOK

/* rmmu_call_FUNCTION: a function of kvm.ko, from its first instruction. */
#define RMMU_CALL(func, proto) DEFINE_STATIC_CALL_NULL(rmmu_call_##func, func);
#include "callees.h"
#undef RMMU_CALL

#define RMMU_HOOK(func, owner, proto) void rmmu_stub_##func(void);
#include "../hook/entry_points.h"
#undef RMMU_HOOK

#define RMMU_HOOK(func, owner, proto) {					\
	.name = #func, .prototype = proto, .stub = rmmu_stub_##func,	\
	.key = &STATIC_CALL_KEY(rmmu_orig_##func),			\
	.tramp = STATIC_CALL_TRAMP_ADDR(rmmu_orig_##func) },
const struct rmmu_function rmmu_entries[] = {
#include "../hook/entry_points.h"
};
#undef RMMU_HOOK
const unsigned long rmmu_entries_len = ARRAY_SIZE(rmmu_entries);

#define RMMU_CALL(func, proto) {					\
	.name = #func, .prototype = proto,				\
	.key = &STATIC_CALL_KEY(rmmu_call_##func),			\
	.tramp = STATIC_CALL_TRAMP_ADDR(rmmu_call_##func) },
const struct rmmu_function rmmu_callees[] = {
#include "callees.h"
};
#undef RMMU_CALL
const unsigned long rmmu_callees_len = ARRAY_SIZE(rmmu_callees);

/* Helpers of the core kernel that are not exported; bound once, at load. */
unsigned long rmmu_kallsyms(const char *name);
struct ftrace_hash *rmmu_hash_alloc(int size_bits);
void rmmu_hash_free(struct ftrace_hash *hash);
struct ftrace_func_entry *rmmu_hash_add(struct ftrace_hash *hash, unsigned long ip, unsigned long direct);
int rmmu_direct_add(struct ftrace_ops *ops, struct ftrace_hash *hash);
int rmmu_direct_del(struct ftrace_ops *ops, struct ftrace_hash *hash);
unsigned long rmmu_location(unsigned long ip);
unsigned long rmmu_find_direct(unsigned long ip);
void rmmu_btf_put(struct btf *btf);
void rmmu_vendor_load_pgd(struct kvm_vcpu *vcpu, hpa_t root_hpa, int root_level);
void rmmu_vendor_flush_current(struct kvm_vcpu *vcpu);
u8 rmmu_vendor_memtype(struct kvm_vcpu *vcpu, gfn_t gfn, bool is_mmio);

DEFINE_STATIC_CALL_NULL(rmmu_core_kallsyms_lookup_name, rmmu_kallsyms);
DEFINE_STATIC_CALL_NULL(rmmu_core_alloc_ftrace_hash, rmmu_hash_alloc);
DEFINE_STATIC_CALL_NULL(rmmu_core_free_ftrace_hash, rmmu_hash_free);
DEFINE_STATIC_CALL_NULL(rmmu_core_add_ftrace_hash_entry_direct, rmmu_hash_add);
DEFINE_STATIC_CALL_NULL(rmmu_core_update_ftrace_direct_add, rmmu_direct_add);
DEFINE_STATIC_CALL_NULL(rmmu_core_update_ftrace_direct_del, rmmu_direct_del);
DEFINE_STATIC_CALL_NULL(rmmu_core_ftrace_location, rmmu_location);
DEFINE_STATIC_CALL_NULL(rmmu_core_ftrace_find_rec_direct, rmmu_find_direct);
DEFINE_STATIC_CALL_NULL(rmmu_core_e820__mapped_raw_any, e820__mapped_raw_any);
DEFINE_STATIC_CALL_NULL(rmmu_core_pat_pfn_immune_to_uc_mtrr, pat_pfn_immune_to_uc_mtrr);
DEFINE_STATIC_CALL_NULL(rmmu_core_btf_put, rmmu_btf_put);

#define RMMU_CORE(func, proto) {					\
	.name = #func, .prototype = proto,					\
	.key = &STATIC_CALL_KEY(rmmu_core_##func),			\
	.tramp = STATIC_CALL_TRAMP_ADDR(rmmu_core_##func) }
const struct rmmu_function rmmu_core[] = {
	RMMU_CORE(kallsyms_lookup_name, "long unsigned int(const char *)"),
	RMMU_CORE(alloc_ftrace_hash, "struct ftrace_hash *(int)"),
	RMMU_CORE(free_ftrace_hash, "void(struct ftrace_hash *)"),
	RMMU_CORE(add_ftrace_hash_entry_direct, "struct ftrace_func_entry *(struct ftrace_hash *, long unsigned int, long unsigned int)"),
	RMMU_CORE(update_ftrace_direct_add, "int(struct ftrace_ops *, struct ftrace_hash *)"),
	RMMU_CORE(update_ftrace_direct_del, "int(struct ftrace_ops *, struct ftrace_hash *)"),
	RMMU_CORE(ftrace_location, "long unsigned int(long unsigned int)"),
	RMMU_CORE(ftrace_find_rec_direct, "long unsigned int(long unsigned int)"),
	RMMU_CORE(e820__mapped_raw_any, "bool(u64, u64, enum e820_type)"),
	RMMU_CORE(pat_pfn_immune_to_uc_mtrr, "bool(long unsigned int)"),
	RMMU_CORE(btf_put, "void(struct btf *)"),
};
const unsigned long rmmu_core_len = ARRAY_SIZE(rmmu_core);

/* The vendor module's operations rmmu needs; bound from kvm_x86_ops when a VM is taken. */
DEFINE_STATIC_CALL_NULL(rmmu_x86_load_mmu_pgd, rmmu_vendor_load_pgd);
DEFINE_STATIC_CALL_NULL(rmmu_x86_flush_tlb_current, rmmu_vendor_flush_current);
DEFINE_STATIC_CALL_RET0(rmmu_x86_get_mt_mask, rmmu_vendor_memtype);
DEFINE_STATIC_CALL_NULL(rmmu_x86_cache_reg, rmmu_vendor_cache_reg);
DEFINE_STATIC_CALL_RET0(rmmu_x86_write_log_dirty, rmmu_vendor_write_log_dirty);

/*
 * Each is bound to what the vendor module of the moment has, which may be nothing: the one before it may be gone, and with it
 * what was bound last time.
 */
#define RMMU_BIND_OPTIONAL(name, op)						\
	static_call_update(rmmu_x86_##name, (void *)(op) ?: (void *)__static_call_return0)

bool rmmu_bind_vendor(const struct kvm_x86_ops *ops, const struct kvm_x86_nested_ops *nested)
{
	static_call_update(rmmu_x86_load_mmu_pgd, ops->load_mmu_pgd);
	static_call_update(rmmu_x86_flush_tlb_current, ops->flush_tlb_current);
	static_call_update(rmmu_x86_cache_reg, ops->cache_reg);
	RMMU_BIND_OPTIONAL(write_log_dirty, nested ? nested->write_log_dirty : NULL);
	RMMU_BIND_OPTIONAL(get_mt_mask, ops->get_mt_mask);
	return ops->get_mt_mask;
}

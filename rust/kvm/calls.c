// SPDX-License-Identifier: GPL-2.0
/*
 * Static calls into kvm.ko, and the two tables Rust binds them from. Only C can define a static call.
 */
#include "calls.h"
#include "glue.h"
#include "walk.h"

#define RMMU_HOOK(func, owner, proto) DEFINE_STATIC_CALL_NULL(rmmu_orig_##func, func);
#include "../hook/entry_points.h"
#undef RMMU_HOOK

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

#define RMMU_CORE(func, proto) DEFINE_STATIC_CALL_NULL(rmmu_core_##func, func);
#include "core_functions.h"
#undef RMMU_CORE

#define RMMU_CORE(func, proto) {					\
	.name = #func, .prototype = proto,				\
	.key = &STATIC_CALL_KEY(rmmu_core_##func),			\
	.tramp = STATIC_CALL_TRAMP_ADDR(rmmu_core_##func) },
const struct rmmu_function rmmu_core[] = {
#include "core_functions.h"
};
#undef RMMU_CORE
const unsigned long rmmu_core_len = ARRAY_SIZE(rmmu_core);

/* The vendor module's operations rmmu needs; bound from kvm_x86_ops when a VM is taken. */
DEFINE_STATIC_CALL_NULL(rmmu_x86_load_mmu_pgd, RMMU_X86_OP(load_mmu_pgd));
DEFINE_STATIC_CALL_NULL(rmmu_x86_flush_tlb_current, RMMU_X86_OP(flush_tlb_current));
DEFINE_STATIC_CALL_RET0(rmmu_x86_get_mt_mask, RMMU_X86_OP(get_mt_mask));
DEFINE_STATIC_CALL_NULL(rmmu_x86_cache_reg, RMMU_X86_OP(cache_reg));
DEFINE_STATIC_CALL_RET0(rmmu_x86_write_log_dirty, RMMU_NESTED_OP(write_log_dirty));

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

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Functions of the core kernel that are not exported, one a line: RMMU_CORE(function, "prototype in BTF's words"). Each becomes
 * a static call that is bound once, at load.
 *
 * The first one finds all others: symbols.rs relies on it.
 *
 * Included several times, with different definitions of RMMU_CORE: no include guard.
 */
RMMU_CORE(kallsyms_lookup_name, "long unsigned int(const char *)")
RMMU_CORE(alloc_ftrace_hash, "struct ftrace_hash *(int)")
RMMU_CORE(free_ftrace_hash, "void(struct ftrace_hash *)")
RMMU_CORE(add_ftrace_hash_entry_direct, "struct ftrace_func_entry *(struct ftrace_hash *, long unsigned int, long unsigned int)")
RMMU_CORE(update_ftrace_direct_add, "int(struct ftrace_ops *, struct ftrace_hash *)")
RMMU_CORE(update_ftrace_direct_del, "int(struct ftrace_ops *, struct ftrace_hash *)")
RMMU_CORE(ftrace_location, "long unsigned int(long unsigned int)")
RMMU_CORE(ftrace_find_rec_direct, "long unsigned int(long unsigned int)")
RMMU_CORE(e820__mapped_raw_any, "bool(u64, u64, enum e820_type)")
RMMU_CORE(pat_pfn_immune_to_uc_mtrr, "bool(long unsigned int)")
RMMU_CORE(btf_put, "void(struct btf *)")

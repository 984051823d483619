/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What Rust needs of KVM's and the kernel's inline functions and macros. Each function is the thinnest wrapper of the C thing
 * it is named for; anything that decides something belongs into Rust.
 */
#ifndef RMMU_GLUE_H
#define RMMU_GLUE_H

#include <linux/jump_label.h>
#include <linux/kallsyms.h>
#include <linux/kvm_host.h>

/* Room for the name of a symbol, as sprint_symbol() wants it: bindgen does not evaluate the macro. */
enum { RMMU_SYMBOL_LEN = KSYM_SYMBOL_LEN };

/* From the private word of a page to that of the next. */
enum { RMMU_PAGE_STRIDE = sizeof(struct page) };

struct seq_file;
struct static_call_key;

/* A function of the kernel that is reached through a static call. */
struct rmmu_function {
	const char *name;
	const char *prototype;
	void (*stub)(void);	/* entry points only */
	struct static_call_key *key;
	void *tramp;
};

extern const struct rmmu_function rmmu_entries[];
extern const unsigned long rmmu_entries_len;
extern const struct rmmu_function rmmu_callees[];
extern const unsigned long rmmu_callees_len;
extern const struct rmmu_function rmmu_core[];
extern const unsigned long rmmu_core_len;

/* Returns whether memory types matter. */
bool rmmu_bind_vendor(const struct kvm_x86_ops *ops, const struct kvm_x86_nested_ops *nested);

/* A reference on this module. */
bool rmmu_get_module(void);
void rmmu_put_module(void);

/* The byte whose address marks the VMs that are ours. */
extern char rmmu_owner_mark;

/* Module parameters */
extern bool rmmu_own_new_vms;
extern bool rmmu_shadow_prefetch;
extern bool rmmu_audit_at_end;
extern bool rmmu_wants_tdp_mmu;
extern unsigned int rmmu_fault_around_bytes;
bool rmmu_valid_fault_around_bytes(u64 bytes);	/* Rust */
int rmmu_set_tdp_mmu(bool on);		/* Rust: refuses while owned VMs exist */
void rmmu_switch_tdp_mmu(bool on);
/* A struct, because Rust's static branch macro addresses the key by type and field. */
struct rmmu_tdp_mmu_key {
	struct static_key_true key;
};
extern struct rmmu_tdp_mmu_key rmmu_tdp_mmu_key;
#ifndef CONFIG_JUMP_LABEL
bool rmmu_tdp_mmu_enabled(void);
#endif

bool rmmu_may_log(void);

/* mmu_lock, RCU, scheduling */
void rmmu_synchronize_rcu_tasks(void);
void rmmu_read_lock(struct kvm *kvm);
void rmmu_read_unlock(struct kvm *kvm);
void rmmu_write_lock(struct kvm *kvm);
void rmmu_write_unlock(struct kvm *kvm);
void rmmu_assert_mmu_locked(struct kvm *kvm);
void rmmu_assert_mmu_locked_for_write(struct kvm *kvm);
void rmmu_relax_read(struct kvm *kvm);
void rmmu_relax_write(struct kvm *kvm);
bool rmmu_need_break(struct kvm *kvm);
void rmmu_pages_lock(struct kvm *kvm);
void rmmu_pages_unlock(struct kvm *kvm);
void rmmu_rcu_read_lock(void);
void rmmu_rcu_read_unlock(void);
void rmmu_rcu_barrier(void);
void rmmu_cond_resched(void);
bool rmmu_signal_pending(void);
int rmmu_current_pid(void);

/* Faults */
bool rmmu_invalidate_retry(struct kvm *kvm, unsigned long seq, gfn_t gfn);
bool rmmu_invalidate_retry_unsafe(struct kvm *kvm, unsigned long seq, gfn_t gfn);
u64 rmmu_memslots_generation(struct kvm_vcpu *vcpu);
unsigned int rmmu_nr_address_spaces(struct kvm *kvm);
bool rmmu_mmio_cached(struct kvm_vcpu *vcpu, u64 address, bool direct);
void rmmu_mmio_cache(struct kvm_vcpu *vcpu, u64 gva, gfn_t gfn, unsigned int access);
bool rmmu_guest_mode(struct kvm_vcpu *vcpu);
void rmmu_signal_exit(struct kvm_vcpu *vcpu);
void rmmu_memory_fault_exit(struct kvm_vcpu *vcpu, gfn_t gfn, bool write, bool exec);
void rmmu_hwpoison_signal(const struct kvm_memory_slot *slot, gfn_t gfn);
void rmmu_release_unused(struct page *page);
unsigned int rmmu_memory_encrypt_op(void);
void rmmu_request_load_pgd(struct kvm_vcpu *vcpu);
void rmmu_request_apf_halt(struct kvm_vcpu *vcpu);
bool rmmu_is_vm_dead(struct kvm_vcpu *vcpu);
bool rmmu_take_free_obsolete_roots(struct kvm_vcpu *vcpu);
int rmmu_req_free_obsolete_roots(void);
int rmmu_req_apic_page_reload(void);
bool rmmu_host_mmio_buffers(void);
void rmmu_force_exit_all(struct kvm *kvm);
bool rmmu_is_mmio_pfn(u64 pfn);

/* What the host's page table has for a frame: its pfn in bits 12 and up, and these. 0 is nothing. */
#define RMMU_HOST_PRESENT	1ULL
#define RMMU_HOST_WRITABLE	2ULL
#define RMMU_HOST_WINDOW	64

/* Frames next to each other; those from first up to end are there, around the one that was asked for. */
struct rmmu_host_window {
	u64 pages[RMMU_HOST_WINDOW];
	unsigned int first, end;
};

void rmmu_forget_answers(struct kvm *kvm);
int rmmu_host_mapping_level(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn);
int rmmu_host_window(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn, unsigned int at, unsigned int pages,
		     bool write, struct rmmu_host_window *window);

/* Memory slots */
bool rmmu_slot_is_apic_access(const struct kvm_memory_slot *slot);
bool rmmu_slot_lpage_disallowed(const struct kvm_memory_slot *slot, gfn_t gfn, int level);
bool rmmu_manual_protect_init_set(struct kvm *kvm);
bool rmmu_slot_zap_all_quirk(struct kvm *kvm);

/* Table pages: a page of SPTEs and the header that its struct page points to. */
void rmmu_table_join(void *header, void *spt);
void rmmu_table_part(void *spt);
unsigned long rmmu_direct_map(void);
unsigned long rmmu_first_private(void);
void rmmu_table_account(void *spt, int nr);
void *rmmu_header_alloc(void);
void rmmu_header_free(void *header);
void *rmmu_page_alloc(void);
void rmmu_page_free(void *spt);
void rmmu_table_free_rcu(void *header);
void rmmu_set_header_cache(struct kmem_cache **cache);
void *rmmu_claimed_header(unsigned long entries, size_t gfn_offset, u64 *gfn);
void rmmu_table_freed(void *header);	/* Rust: after the grace period */

/* NX huge page recovery */
bool rmmu_nx_wait(struct kvm *kvm, unsigned int period_ms);
void rmmu_nx_done(struct kvm *kvm);
int rmmu_srcu_lock(struct kvm *kvm);
void rmmu_srcu_unlock(struct kvm *kvm, int index);
bool rmmu_gfn_dirty_tracked(struct kvm *kvm, bool smm, gfn_t gfn);

void rmmu_vm_bug(struct kvm *kvm, const char *what);
void rmmu_warn(const char *what);

/* Says so in the log if this kernel's MMU is not one that rmmu was reviewed against. */
void rmmu_log_review(void);

/* debugfs */
void rmmu_show_audit(struct seq_file *m, void *vm);
struct dentry *rmmu_debugfs_init(void);
void rmmu_debugfs_exit(void);
struct dentry *rmmu_debugfs_add_vm(const char *name, void *vm);
void rmmu_debugfs_del_vm(struct dentry *dir);
void rmmu_show_hooks(struct seq_file *m);
void rmmu_show_stats(struct seq_file *m);
void rmmu_show_owner(struct seq_file *m, void *vm);
void rmmu_show_pages(struct seq_file *m, void *vm);
void rmmu_show_tables(struct seq_file *m, void *vm);
void rmmu_show_faults(struct seq_file *m, void *vm);
void rmmu_show_shadow(struct seq_file *m, void *vm);
void rmmu_show_page_table(struct seq_file *m, void *vm);
void rmmu_show_fault_around(struct seq_file *m, void *vm);
u64 rmmu_get_fault_around_bytes(void *vm);
int rmmu_set_fault_around_bytes(void *vm, u64 bytes);

#endif

// SPDX-License-Identifier: GPL-2.0
/*
 * Wrappers of inline functions and macros for Rust, the module's parameters and its debugfs files. See glue.h.
 */
#include <linux/debugfs.h>
#include <linux/jump_label.h>
#include <linux/module.h>
#include <linux/ratelimit.h>
#include <linux/rcupdate.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>
#include <asm/e820/api.h>
#include <asm/memtype.h>
#include "mmu.h"
#include "mmu/mmu_internal.h"
#include "lapic.h"
#include <asm/vmx.h>
#include "x86.h"
#include "calls.h"
#include "glue.h"

/* Messages that users of KVM can cause: some, and then some more after a while. */
static DEFINE_RATELIMIT_STATE(rmmu_messages, 5 * HZ, 10);

bool rmmu_may_log(void) { return __ratelimit(&rmmu_messages); }

/* Module parameters */

bool rmmu_own_new_vms = true;
module_param_named(own_new_vms, rmmu_own_new_vms, bool, 0644);
MODULE_PARM_DESC(own_new_vms, "Serve the page tables of VMs created from now on (default 1). VMs that exist keep their owner.");

unsigned int rmmu_fault_around_bytes = 64 * 1024;

static int rmmu_param_set_fault_around(const char *val, const struct kernel_param *kp)
{
	char *end;
	u64 bytes = memparse(val, &end);

	if (*skip_spaces(end) || !rmmu_valid_fault_around_bytes(bytes)) {
		pr_info("rmmu: fault_around_bytes is a power of two, from 4K (off) to 256K\n");
		return -EINVAL;
	}
	WRITE_ONCE(rmmu_fault_around_bytes, bytes);
	return 0;
}

static const struct kernel_param_ops rmmu_fault_around_ops = {
	.set = rmmu_param_set_fault_around,
	.get = param_get_uint,
};
module_param_cb(fault_around_bytes, &rmmu_fault_around_ops, &rmmu_fault_around_bytes, 0644);
MODULE_PARM_DESC(fault_around_bytes, "How much to map around a page that faults, where the host has it mapped already: a power of two from 4096 (off) to 256K (default 64K).");

bool rmmu_shadow_prefetch = true;
module_param_named(shadow_prefetch, rmmu_shadow_prefetch, bool, 0644);
MODULE_PARM_DESC(shadow_prefetch, "After a fault that the legacy MMU serves, install the entries around it (default 1). To see what that is worth.");

bool rmmu_audit_at_end;
module_param_named(audit_at_end, rmmu_audit_at_end, bool, 0644);
MODULE_PARM_DESC(audit_at_end, "Audit the page tables of each VM when it ends (default 0). For tests: it takes time.");

struct rmmu_tdp_mmu_key rmmu_tdp_mmu_key = { STATIC_KEY_TRUE_INIT };

#ifndef CONFIG_JUMP_LABEL
bool rmmu_tdp_mmu_enabled(void) { return static_key_enabled(&rmmu_tdp_mmu_key.key.key); }
#endif

void rmmu_switch_tdp_mmu(bool on)
{
	if (on)
		static_branch_enable(&rmmu_tdp_mmu_key.key);
	else
		static_branch_disable(&rmmu_tdp_mmu_key.key);
}

/* What the user wants; the key says whether KVM's configuration allows it, too. */
bool rmmu_wants_tdp_mmu = true;

static int rmmu_param_set_tdp_mmu(const char *val, const struct kernel_param *kp)
{
	bool on;
	int ret = kstrtobool(val, &on);

	return ret ?: rmmu_set_tdp_mmu(on);
}

static int rmmu_param_get_tdp_mmu(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%c\n", rmmu_wants_tdp_mmu ? 'Y' : 'N');
}

static const struct kernel_param_ops rmmu_tdp_mmu_ops = {
	.set = rmmu_param_set_tdp_mmu,
	.get = rmmu_param_get_tdp_mmu,
};
module_param_cb(tdp_mmu, &rmmu_tdp_mmu_ops, NULL, 0644);
MODULE_PARM_DESC(tdp_mmu, "Use the TDP MMU where KVM uses its own (default 1), else the legacy MMU. Fixed while VMs of ours exist.");

/* mmu_lock, RCU, scheduling */

void rmmu_read_lock(struct kvm *kvm) { read_lock(&kvm->mmu_lock); }
void rmmu_read_unlock(struct kvm *kvm) { read_unlock(&kvm->mmu_lock); }
void rmmu_write_lock(struct kvm *kvm) { write_lock(&kvm->mmu_lock); }
void rmmu_write_unlock(struct kvm *kvm) { write_unlock(&kvm->mmu_lock); }
void rmmu_assert_mmu_locked(struct kvm *kvm) { lockdep_assert_held(&kvm->mmu_lock); }
void rmmu_assert_mmu_locked_for_write(struct kvm *kvm) { lockdep_assert_held_write(&kvm->mmu_lock); }
void rmmu_relax_read(struct kvm *kvm) { cond_resched_rwlock_read(&kvm->mmu_lock); }
void rmmu_relax_write(struct kvm *kvm) { cond_resched_rwlock_write(&kvm->mmu_lock); }
bool rmmu_need_break(struct kvm *kvm) { return need_resched() || rwlock_needbreak(&kvm->mmu_lock); }
void rmmu_pages_lock(struct kvm *kvm) { spin_lock(&kvm->arch.tdp_mmu_pages_lock); }
void rmmu_pages_unlock(struct kvm *kvm) { spin_unlock(&kvm->arch.tdp_mmu_pages_lock); }
void rmmu_rcu_read_lock(void) { rcu_read_lock(); }
void rmmu_rcu_read_unlock(void) { rcu_read_unlock(); }
void rmmu_synchronize_rcu_tasks(void) { synchronize_rcu_tasks(); }
void rmmu_rcu_barrier(void) { rcu_barrier(); }
void rmmu_cond_resched(void) { cond_resched(); }
bool rmmu_signal_pending(void) { return signal_pending(current); }
int rmmu_current_pid(void) { return task_pid_nr(current); }

/* Faults */

bool rmmu_invalidate_retry(struct kvm *kvm, unsigned long seq, gfn_t gfn)
{
	return mmu_invalidate_retry_gfn(kvm, seq, gfn);
}

bool rmmu_invalidate_retry_unsafe(struct kvm *kvm, unsigned long seq, gfn_t gfn)
{
	return mmu_invalidate_retry_gfn_unsafe(kvm, seq, gfn);
}

u64 rmmu_memslots_generation(struct kvm_vcpu *vcpu) { return kvm_vcpu_memslots(vcpu)->generation; }
unsigned int rmmu_nr_address_spaces(struct kvm *kvm) { return kvm_arch_nr_memslot_as_ids(kvm); }

/* In one call: every exit for a device asks. What KVM remembers are addresses of the guest, not of its guest. */
notrace bool rmmu_mmio_cached(struct kvm_vcpu *vcpu, u64 address, bool direct)
{
	if (mmu_is_nested(vcpu))
		return false;
	return direct ? vcpu_match_mmio_gpa(vcpu, address) : vcpu_match_mmio_gva(vcpu, address);
}

void rmmu_mmio_cache(struct kvm_vcpu *vcpu, u64 gva, gfn_t gfn, unsigned int access)
{
	vcpu_cache_mmio_info(vcpu, gva, gfn, access);
}

bool rmmu_guest_mode(struct kvm_vcpu *vcpu) { return is_guest_mode(vcpu); }
void rmmu_signal_exit(struct kvm_vcpu *vcpu) { kvm_handle_signal_exit(vcpu); }

void rmmu_memory_fault_exit(struct kvm_vcpu *vcpu, gfn_t gfn, bool write, bool exec)
{
	kvm_prepare_memory_fault_exit(vcpu, gfn_to_gpa(gfn), PAGE_SIZE, write, exec, false);
}

void rmmu_hwpoison_signal(const struct kvm_memory_slot *slot, gfn_t gfn)
{
	send_sig_mceerr(BUS_MCEERR_AR, (void __user *)__gfn_to_hva_memslot(slot, gfn), PAGE_SHIFT, current);
}

unsigned int rmmu_memory_encrypt_op(void) { return KVM_MEMORY_ENCRYPT_OP; }
void rmmu_release_unused(struct page *page) { put_page(page); }
void rmmu_request_load_pgd(struct kvm_vcpu *vcpu) { kvm_make_request(KVM_REQ_LOAD_MMU_PGD, vcpu); }
void rmmu_request_apf_halt(struct kvm_vcpu *vcpu) { kvm_make_request(KVM_REQ_APF_HALT, vcpu); }
/* Tested, not taken: who is dead stays dead, and newer kernels refuse to build what takes it. */
bool rmmu_is_vm_dead(struct kvm_vcpu *vcpu) { return kvm_test_request(KVM_REQ_VM_DEAD, vcpu); }
bool rmmu_get_module(void) { return try_module_get(THIS_MODULE); }
void rmmu_put_module(void) { module_put(THIS_MODULE); }

bool rmmu_take_free_obsolete_roots(struct kvm_vcpu *vcpu)
{
	return kvm_check_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu);
}

int rmmu_req_free_obsolete_roots(void) { return KVM_REQ_MMU_FREE_OBSOLETE_ROOTS; }
int rmmu_req_apic_page_reload(void) { return KVM_REQ_APIC_PAGE_RELOAD; }
bool rmmu_host_mmio_buffers(void) { return cpu_feature_enabled(X86_FEATURE_CLEAR_CPU_BUF_VM_MMIO); }

void rmmu_force_exit_all(struct kvm *kvm)
{
	static_call(rmmu_call_kvm_make_all_cpus_request)(kvm, KVM_REQ_OUTSIDE_GUEST_MODE);
}

/* Whether the host maps @pfn uncached, i.e. it is a device's and not memory. */
bool rmmu_is_mmio_pfn(u64 pfn)
{
	if (pfn_valid(pfn))
		return !is_zero_pfn(pfn) && PageReserved(pfn_to_page(pfn)) &&
		       (!pat_enabled() || static_call(rmmu_core_pat_pfn_immune_to_uc_mtrr)(pfn));
	return !static_call(rmmu_core_e820__mapped_raw_any)(PFN_PHYS(pfn), PFN_PHYS(pfn + 1) - 1, E820_TYPE_RAM);
}

/* Memory slots */

bool rmmu_slot_is_apic_access(const struct kvm_memory_slot *slot)
{
	return slot->id == APIC_ACCESS_PAGE_PRIVATE_MEMSLOT;
}

bool rmmu_slot_lpage_disallowed(const struct kvm_memory_slot *slot, gfn_t gfn, int level)
{
	return slot->arch.lpage_info[level - 2][gfn_to_index(gfn, slot->base_gfn, level)].disallow_lpage;
}

bool rmmu_manual_protect_init_set(struct kvm *kvm) { return kvm_dirty_log_manual_protect_and_init_set(kvm); }
bool rmmu_slot_zap_all_quirk(struct kvm *kvm) { return kvm_check_has_quirk(kvm, KVM_X86_QUIRK_SLOT_ZAP_ALL); }

/* Table pages */

static struct kmem_cache **rmmu_header_cache;

void rmmu_set_header_cache(struct kmem_cache **cache) { rmmu_header_cache = cache; }
void rmmu_table_join(void *header, void *spt) { set_page_private(virt_to_page(spt), (unsigned long)header); }
void rmmu_table_part(void *spt) { set_page_private(virt_to_page(spt), 0); }
unsigned long rmmu_direct_map(void) { return PAGE_OFFSET; }

/* All struct pages are in one array (CONFIG_SPARSEMEM_VMEMMAP, which x86-64 always has), whatever memory there is. */
unsigned long rmmu_first_private(void) { return (unsigned long)&vmemmap->private; }

void rmmu_table_account(void *spt, int nr) { kvm_account_pgtable_pages(spt, nr); }
void *rmmu_header_alloc(void) { return kmem_cache_zalloc(*rmmu_header_cache, GFP_KERNEL_ACCOUNT); }
void rmmu_header_free(void *header) { kmem_cache_free(*rmmu_header_cache, header); }
void *rmmu_page_alloc(void) { return (void *)__get_free_page(GFP_KERNEL_ACCOUNT); }
void rmmu_page_free(void *spt) { free_page((unsigned long)spt); }

/*
 * What the memory at an address says of itself: that it is the page of entries of the header that is returned, which is for
 * the frame *gfn. The address may be of anything, so nothing of it is relied on, and nothing need be true.
 */
void *rmmu_claimed_header(unsigned long entries, size_t gfn_offset, u64 *gfn)
{
	void *header;

	if (!virt_addr_valid((void *)entries))
		return NULL;
	header = (void *)READ_ONCE(virt_to_page((void *)entries)->private);
	if (!virt_addr_valid(header) || copy_from_kernel_nofault(gfn, header + gfn_offset, sizeof(*gfn)))
		return NULL;
	return header;
}

static void rmmu_table_rcu(struct rcu_head *head)
{
	rmmu_table_freed(container_of(head, struct kvm_mmu_page, rcu_head));
}

void rmmu_table_free_rcu(void *header)
{
	call_rcu(&((struct kvm_mmu_page *)header)->rcu_head, rmmu_table_rcu);
}

/* NX huge page recovery */

/* Sleeps until the next round is due, or somebody wakes the worker; false if it is due now. */
bool rmmu_nx_wait(struct kvm *kvm, unsigned int period_ms)
{
	long left = kvm->arch.nx_huge_page_last + msecs_to_jiffies(period_ms) - get_jiffies_64();

	if (left <= 0) {
		/* The task's loop has set it to sleep before it called. */
		__set_current_state(TASK_RUNNING);
		return false;
	}
	schedule_timeout(left);
	return true;
}

void rmmu_nx_done(struct kvm *kvm) { kvm->arch.nx_huge_page_last = get_jiffies_64(); }
int rmmu_srcu_lock(struct kvm *kvm) { return srcu_read_lock(&kvm->srcu); }
void rmmu_srcu_unlock(struct kvm *kvm, int index) { srcu_read_unlock(&kvm->srcu, index); }

bool rmmu_gfn_dirty_tracked(struct kvm *kvm, bool smm, gfn_t gfn)
{
	const struct kvm_memory_slot *slot = __gfn_to_memslot(__kvm_memslots(kvm, smm), gfn);

	return slot && kvm_slot_dirty_track_enabled(slot);
}

/* A broken invariant: say so once, and let the VM run no further. */
void rmmu_vm_bug(struct kvm *kvm, const char *what)
{
	WARN_ONCE(1, "rmmu: %s\n", what);
	kvm->vm_bugged = true;
	kvm->vm_dead = true;
	static_call(rmmu_call_kvm_make_all_cpus_request)(kvm, KVM_REQ_VM_DEAD);
}

void rmmu_warn(const char *what)
{
	WARN_ONCE(1, "rmmu: %s\n", what);
}

/* debugfs */

static struct dentry *rmmu_dir, *rmmu_vms_dir;

#define RMMU_SHOW(name)							\
static int rmmu_##name##_show(struct seq_file *m, void *unused)		\
{									\
	rmmu_show_##name(m);						\
	return 0;							\
}									\
DEFINE_SHOW_ATTRIBUTE(rmmu_##name)

#define RMMU_SHOW_VM(name)						\
static int rmmu_##name##_show(struct seq_file *m, void *unused)		\
{									\
	rmmu_show_##name(m, m->private);				\
	return 0;							\
}									\
DEFINE_SHOW_ATTRIBUTE(rmmu_##name)

RMMU_SHOW(hooks);
RMMU_SHOW(stats);
RMMU_SHOW_VM(audit);
RMMU_SHOW_VM(owner);
RMMU_SHOW_VM(pages);
RMMU_SHOW_VM(tables);
RMMU_SHOW_VM(faults);
RMMU_SHOW_VM(shadow);
RMMU_SHOW_VM(page_table);
RMMU_SHOW_VM(fault_around);

static int rmmu_fault_around_get(void *vm, u64 *bytes)
{
	*bytes = rmmu_get_fault_around_bytes(vm);
	return 0;
}

DEFINE_DEBUGFS_ATTRIBUTE(rmmu_fault_around_bytes_fops, rmmu_fault_around_get, rmmu_set_fault_around_bytes, "%llu\n");

struct dentry *rmmu_debugfs_init(void)
{
	rmmu_dir = debugfs_create_dir("rmmu", NULL);
	debugfs_create_file("hooks", 0444, rmmu_dir, NULL, &rmmu_hooks_fops);
	debugfs_create_file("stats", 0444, rmmu_dir, NULL, &rmmu_stats_fops);
	rmmu_vms_dir = debugfs_create_dir("vms", rmmu_dir);
	return rmmu_dir;
}

void rmmu_debugfs_exit(void) { debugfs_remove(rmmu_dir); }

struct dentry *rmmu_debugfs_add_vm(const char *name, void *vm)
{
	struct dentry *dir = debugfs_create_dir(name, rmmu_vms_dir);

	debugfs_create_file("owner", 0444, dir, vm, &rmmu_owner_fops);
	debugfs_create_file("audit", 0400, dir, vm, &rmmu_audit_fops);
	debugfs_create_file("pages", 0444, dir, vm, &rmmu_pages_fops);
	debugfs_create_file("tables", 0444, dir, vm, &rmmu_tables_fops);
	debugfs_create_file("faults", 0444, dir, vm, &rmmu_faults_fops);
	debugfs_create_file("shadow", 0444, dir, vm, &rmmu_shadow_fops);
	debugfs_create_file("page_table", 0444, dir, vm, &rmmu_page_table_fops);
	debugfs_create_file("fault_around", 0444, dir, vm, &rmmu_fault_around_fops);
	debugfs_create_file("fault_around_bytes", 0644, dir, vm, &rmmu_fault_around_bytes_fops);
	return dir;
}

void rmmu_debugfs_del_vm(struct dentry *dir) { debugfs_remove(dir); }

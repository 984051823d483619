// SPDX-License-Identifier: GPL-2.0
/*
 * Gives KVM what its vendor module does not have, until it is unloaded: operations that only kvm_intel has, in the tables at
 * the address `kvm_x86_ops`; and the type of software-protected VMs, in the capabilities at `kvm_caps`.
 *
 * Newer kernels have the operations for nested guests in a table of their own, at `kvm_nested_ops`.
 *
 * The file `target` says where the static call goes whose trampoline is at `trampoline`.
 */
#include <linux/kallsyms.h>
#include <linux/kvm_host.h>
#include <linux/module.h>
#include <linux/uaccess.h>
#include "x86.h"

static unsigned long ops_address, nested_address, caps_address, trampoline;
module_param_named(kvm_x86_ops, ops_address, ulong, 0444);
module_param_named(kvm_nested_ops, nested_address, ulong, 0444);
module_param_named(kvm_caps, caps_address, ulong, 0444);
module_param(trampoline, ulong, 0644);

static unsigned int asked;
module_param(asked, uint, 0444);
MODULE_PARM_DESC(asked, "how often vendor_ops_memtype() was called");

static u8 vendor_ops_memtype(struct kvm_vcpu *vcpu, gfn_t gfn, bool is_mmio)
{
	WRITE_ONCE(asked, asked + 1);
	return 0;
}

static int vendor_ops_write_log_dirty(struct kvm_vcpu *vcpu, gpa_t l2_gpa) { return 0; }

static int show_target(char *buffer, const struct kernel_param *kp)
{
	struct { u8 opcode; s32 distance; } __packed jump;

	if (copy_from_kernel_nofault(&jump, (void *)trampoline, sizeof(jump)) || jump.opcode != 0xe9)
		return sysfs_emit(buffer, "no jump\n");
	return sysfs_emit(buffer, "%ps\n", (void *)(trampoline + sizeof(jump) + jump.distance));
}

static const struct kernel_param_ops target_ops = { .get = show_target };

module_param_cb(target, &target_ops, NULL, 0444);

#ifdef HAS_NESTED_OPS_TABLE
static int lend_nested(struct kvm_x86_ops *ops)
{
	struct kvm_x86_nested_ops *table = (void *)nested_address;

	if (!table || table->write_log_dirty)
		return -EINVAL;
	table->write_log_dirty = vendor_ops_write_log_dirty;
	return 0;
}

static void take_nested_back(struct kvm_x86_ops *ops)
{
	((struct kvm_x86_nested_ops *)nested_address)->write_log_dirty = NULL;
}
#else
static struct kvm_x86_nested_ops nested;
static const struct kvm_x86_nested_ops *nested_before;

static int lend_nested(struct kvm_x86_ops *ops)
{
	nested_before = ops->nested_ops;
	nested = *nested_before;
	nested.write_log_dirty = vendor_ops_write_log_dirty;
	ops->nested_ops = &nested;
	return 0;
}

static void take_nested_back(struct kvm_x86_ops *ops) { ops->nested_ops = nested_before; }
#endif

static int __init vendor_ops_init(void)
{
	struct kvm_x86_ops *ops = (void *)ops_address;
	struct kvm_caps *caps = (void *)caps_address;

	if (ops) {
		if (ops->get_mt_mask)
			return -EEXIST;
		if (lend_nested(ops))
			return -EINVAL;
		ops->get_mt_mask = vendor_ops_memtype;
	}
	if (caps)
		caps->supported_vm_types |= BIT(KVM_X86_SW_PROTECTED_VM);
	return 0;
}

static void __exit vendor_ops_exit(void)
{
	struct kvm_x86_ops *ops = (void *)ops_address;
	struct kvm_caps *caps = (void *)caps_address;

	if (ops) {
		ops->get_mt_mask = NULL;
		take_nested_back(ops);
	}
	if (caps)
		caps->supported_vm_types &= ~BIT(KVM_X86_SW_PROTECTED_VM);
}

module_init(vendor_ops_init);
module_exit(vendor_ops_exit);
MODULE_DESCRIPTION("Test: operations and VM types that the vendor module does not have");
MODULE_LICENSE("GPL");

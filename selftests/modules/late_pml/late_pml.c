// SPDX-License-Identifier: GPL-2.0
/*
 * Makes kvm_amd say of each new VM that the CPU logs writes, as kvm_intel does on a CPU with PML: at the end of the vendor
 * module's part of creating the VM, which is after kvm_mmu_init_vm(). Nothing logs the writes of the guest itself then. The
 * log of a nested guest must not rely on the CPU, which would log addresses of the wrong space, and is as ever.
 */
#include <linux/kprobes.h>
#include <linux/kvm_host.h>
#include <linux/module.h>

/* As many as Intel's CPUs log before they exit. */
#define ENTRIES	512

struct call {
	struct kvm *kvm;
};

static int begins(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	struct call *call = (void *)instance->data;

	call->kvm = (struct kvm *)regs_get_kernel_argument(regs, 0);
	return 0;
}

static int ends(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	struct call *call = (void *)instance->data;

	if (!regs_return_value(regs))
		call->kvm->arch.cpu_dirty_log_size = ENTRIES;
	return 0;
}

static struct kretprobe vm_init = {
	.kp.symbol_name = "svm_vm_init",
	.entry_handler = begins,
	.handler = ends,
	.data_size = sizeof(struct call),
};

static int __init late_pml_init(void)
{
	return register_kretprobe(&vm_init);
}

static void __exit late_pml_exit(void)
{
	unregister_kretprobe(&vm_init);
}

module_init(late_pml_init);
module_exit(late_pml_exit);
MODULE_DESCRIPTION("Test: the CPU logs writes, and KVM learns that late");
MODULE_LICENSE("GPL");

// SPDX-License-Identifier: GPL-2.0
/*
 * Another user of ftrace's direct calls: it takes the entry of one function, as a BPF fentry
 * program would, so that a test can see what happens to whoever comes second.
 */
#include <linux/ftrace.h>
#include <linux/module.h>
#include <linux/string.h>

extern void direct_user_stub(void);

static char *function = "kvm_mmu_page_fault";
module_param(function, charp, 0444);
MODULE_PARM_DESC(function, "the function to attach to");

static struct ftrace_ops ops;

static int __init direct_user_init(void)
{
	int ret = ftrace_set_filter(&ops, function, strlen(function), 1);

	if (ret)
		return ret;
	ret = register_ftrace_direct(&ops, (unsigned long)direct_user_stub);
	if (ret)
		ftrace_free_filter(&ops);
	return ret;
}

static void __exit direct_user_exit(void)
{
	unregister_ftrace_direct(&ops, (unsigned long)direct_user_stub, true);
}

module_init(direct_user_init);
module_exit(direct_user_exit);
MODULE_DESCRIPTION("Test: another user of ftrace direct calls");
MODULE_LICENSE("GPL");

// SPDX-License-Identifier: GPL-2.0
/*
 * A function of the kernel that fails: each call returns `error` at once, until 0 is written to `error`. The file `refused`
 * counts the calls.
 */
#include <linux/kprobes.h>
#include <linux/module.h>

static char *function = "";
module_param(function, charp, 0444);
static int error = -EBUSY;
module_param(error, int, 0644);
static unsigned int refused;
module_param(refused, uint, 0444);

/* In place of the function's first instruction: back to the caller. */
static int refuse(struct kprobe *probe, struct pt_regs *regs)
{
	int result = READ_ONCE(error);

	if (!result)
		return 0;
	WRITE_ONCE(refused, refused + 1);
	regs->ax = result;
	regs->ip = *(unsigned long *)regs->sp;
	regs->sp += sizeof(unsigned long);
	return 1;
}

/* A probe with this is never optimised to a jump, which could not change where the thread goes on. */
static void after(struct kprobe *probe, struct pt_regs *regs, unsigned long flags) { }

static struct kprobe probe = { .pre_handler = refuse, .post_handler = after };

static int __init refuse_call_init(void)
{
	probe.symbol_name = function;
	return register_kprobe(&probe);
}

static void __exit refuse_call_exit(void)
{
	unregister_kprobe(&probe);
}

module_init(refuse_call_init);
module_exit(refuse_call_exit);
MODULE_DESCRIPTION("Test: a function that fails");
MODULE_LICENSE("GPL");

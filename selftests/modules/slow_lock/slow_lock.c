// SPDX-License-Identifier: GPL-2.0
/*
 * Delays a thread each time it takes a read-write lock, so that what it saw before is likely to have changed when it has
 * the lock. For tests of what must be looked at again then: slow_lock.ko comm=NAME us=MICROSECONDS.
 */
#include <linux/delay.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/string.h>

static char *comm = "";
module_param(comm, charp, 0);
MODULE_PARM_DESC(comm, "name of the thread");

static unsigned int us = 100;
module_param(us, uint, 0);
MODULE_PARM_DESC(us, "microseconds before each lock");

static int delay(struct kprobe *probe, struct pt_regs *regs)
{
	if (!strcmp(current->comm, comm))
		udelay(us);
	return 0;
}

static struct kprobe for_read = { .symbol_name = "_raw_read_lock", .pre_handler = delay };
static struct kprobe for_write = { .symbol_name = "_raw_write_lock", .pre_handler = delay };
static struct kprobe *probes[] = { &for_read, &for_write };

static int __init slow_lock_init(void)
{
	return us > 1000 ? -EINVAL : register_kprobes(probes, ARRAY_SIZE(probes));
}

static void __exit slow_lock_exit(void)
{
	unregister_kprobes(probes, ARRAY_SIZE(probes));
}

module_init(slow_lock_init);
module_exit(slow_lock_exit);
MODULE_DESCRIPTION("Test: a thread that is slow to take read-write locks");
MODULE_LICENSE("GPL");

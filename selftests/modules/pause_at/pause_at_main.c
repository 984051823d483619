// SPDX-License-Identifier: GPL-2.0
/*
 * Stops two threads, each at the entry of a function, until they are told to go on: so that a test can have one thing happen
 * between two others. They sleep there, as a thread does that waits for memory or for a lock.
 *
 * The thread first_comm stops at first_function, but not until it has entered before_function; second_comm at second_function.
 * The files first_stopped and second_stopped say whether they are there; 1 to first_go and second_go lets them go on.
 */
#include <linux/completion.h>
#include <linux/ftrace.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/string.h>

extern void pause_at_before_stub(void);
extern void pause_at_first_stub(void);
extern void pause_at_second_stub(void);

asmlinkage void pause_at_before(void);
asmlinkage void pause_at_first(void);
asmlinkage void pause_at_second(void);

static char *before_function = "", *first_function = "", *first_comm = "", *second_function = "", *second_comm = "";
module_param(before_function, charp, 0444);
module_param(first_function, charp, 0444);
module_param(first_comm, charp, 0444);
module_param(second_function, charp, 0444);
module_param(second_comm, charp, 0444);

static bool armed, first_stopped, second_stopped;
module_param(first_stopped, bool, 0444);
module_param(second_stopped, bool, 0444);

static DECLARE_COMPLETION(first_may_go);
static DECLARE_COMPLETION(second_may_go);

static int let_go(const char *val, const struct kernel_param *kp)
{
	complete_all(kp->arg);
	return 0;
}

static const struct kernel_param_ops go_ops = { .set = let_go };

module_param_cb(first_go, &go_ops, &first_may_go, 0200);
module_param_cb(second_go, &go_ops, &second_may_go, 0200);

static void stop(bool *stopped, struct completion *may_go)
{
	if (!xchg(stopped, true))
		wait_for_completion(may_go);
}

void pause_at_before(void)
{
	if (!strcmp(current->comm, first_comm))
		WRITE_ONCE(armed, true);
}

void pause_at_first(void)
{
	if (READ_ONCE(armed) && !strcmp(current->comm, first_comm))
		stop(&first_stopped, &first_may_go);
}

void pause_at_second(void)
{
	if (!strcmp(current->comm, second_comm))
		stop(&second_stopped, &second_may_go);
}

static struct ftrace_ops ops[3];

static int attach(struct ftrace_ops *op, char *function, void (*stub)(void))
{
	int ret = ftrace_set_filter(op, function, strlen(function), 1);

	if (!ret)
		ret = register_ftrace_direct(op, (unsigned long)stub);
	return ret;
}

/* It has no exit: a thread may be on its way out of a stub whenever it was let go. */
static int __init pause_at_init(void)
{
	int ret = attach(&ops[0], before_function, pause_at_before_stub);

	if (ret)
		return ret;
	ret = attach(&ops[1], first_function, pause_at_first_stub);
	if (ret)
		goto first_failed;
	ret = attach(&ops[2], second_function, pause_at_second_stub);
	if (!ret)
		return 0;
	unregister_ftrace_direct(&ops[1], (unsigned long)pause_at_first_stub, true);
first_failed:
	unregister_ftrace_direct(&ops[0], (unsigned long)pause_at_before_stub, true);
	return ret;
}

module_init(pause_at_init);
MODULE_DESCRIPTION("Test: threads that stop at the entry of a function");
MODULE_LICENSE("GPL");

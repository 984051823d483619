// SPDX-License-Identifier: GPL-2.0
/*
 * Does wrong what the debug kernel must notice: insmod debug_traps.ko trap=NAME does it once, and fails to load. For
 * scripts/lib/traps.py, which looks whether the test harness would have failed a test for it.
 */
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

static char *trap = "";
module_param(trap, charp, 0);

static noinline int use_after_free(void)
{
	volatile int *number = kmalloc(sizeof(*number), GFP_KERNEL);

	if (!number)
		return 0;
	kfree((void *)number);
	return *number;
}

static noinline void sleep_in_atomic(void)
{
	static DEFINE_SPINLOCK(lock);

	spin_lock(&lock);
	might_sleep();
	spin_unlock(&lock);
}

static noinline void lock_in_two_orders(void)
{
	static DEFINE_MUTEX(first);
	static DEFINE_MUTEX(second);

	mutex_lock(&first);
	mutex_lock(&second);
	mutex_unlock(&second);
	mutex_unlock(&first);
	mutex_lock(&second);
	mutex_lock(&first);
	mutex_unlock(&first);
	mutex_unlock(&second);
}

static noinline int *dereference_without_rcu(void)
{
	static int __rcu *pointer;

	return rcu_dereference(pointer);
}

static noinline void delete_twice(void)
{
	LIST_HEAD(head);
	LIST_HEAD(entry);

	list_add(&entry, &head);
	list_del(&entry);
	list_del(&entry);
}

/* More than one, for a stale word somewhere may point to one of them. */
static noinline void leak(void)
{
	static const char text[] = "rmmu leaks this";

	for (int i = 0; i < 16; i++)
		memcpy(kmalloc(100, GFP_KERNEL | __GFP_NOFAIL), text, sizeof(text));
}

static int __init traps_init(void)
{
	if (!strcmp(trap, "use_after_free"))
		use_after_free();
	else if (!strcmp(trap, "sleep_in_atomic"))
		sleep_in_atomic();
	else if (!strcmp(trap, "lock_in_two_orders"))
		lock_in_two_orders();
	else if (!strcmp(trap, "dereference_without_rcu"))
		dereference_without_rcu();
	else if (!strcmp(trap, "delete_twice"))
		delete_twice();
	else if (!strcmp(trap, "leak"))
		leak();
	else if (strcmp(trap, "none"))
		return -EINVAL;
	return -ECANCELED;
}
module_init(traps_init);

MODULE_DESCRIPTION("Mistakes that a debug kernel notices");
MODULE_LICENSE("GPL");

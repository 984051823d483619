// SPDX-License-Identifier: GPL-2.0
/*
 * The version of rmmu, and what the build found out about KVM's MMU (scripts/review): for modinfo, and for the log if nobody
 * has reviewed it.
 */
#include <linux/module.h>
#include "mmu.h"
#include "glue.h"
#include "reviewed.h"

MODULE_VERSION(RMMU_VERSION);
MODULE_INFO(kvm_mmu, RMMU_REVIEW);

void rmmu_log_review(void)
{
	if (!RMMU_REVIEWED)
		pr_warn("rmmu: built with REVIEWED=no for a kernel that nobody has compared rmmu with: %s\n", RMMU_REVIEW);
}

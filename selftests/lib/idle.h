/* SPDX-License-Identifier: GPL-2.0 */
/* Which pages of memory were used, as the kernel's idle page tracking sees it (admin-guide/mm/idle_page_tracking.rst). */
#ifndef RMMU_IDLE_H
#define RMMU_IDLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vm.h"

/* Whether the kernel has it. */
bool idle_available(void);
/*
 * Marks resident pages of 4K as idle; bails out when one does not become it. The VM's TLBs are flushed, which the
 * kernel does not do: a CPU that has a translation need not set the accessed bit again. Takes slot 30 for that, of a VM that
 * does without KVM_X86_QUIRK_SLOT_ZAP_ALL.
 */
void idle_mark(struct vm *vm, const uint8_t *base, uint64_t pages);
/* Whether a page has not been used since. */
bool idle(const uint8_t *page);

#endif

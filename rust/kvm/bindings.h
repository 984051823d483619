/* SPDX-License-Identifier: GPL-2.0 */
/* The headers bindgen reads. All but the last five are the kernel's own, of the kernel being built for. */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/mm.h>
#include "mmu/spte.h"
#include "calls.h"
#include "constants.h"
#include "glue.h"
#include "shadow_glue.h"
#include "trace.h"

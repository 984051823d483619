/* SPDX-License-Identifier: GPL-2.0 */
/* The headers bindgen reads. Everything here is the kernel's own, of the kernel being built for. */
#include <linux/kvm_host.h>
#include <linux/ftrace.h>
#include <linux/kallsyms.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/static_call.h>
#include <linux/mm.h>
#include "mmu.h"
#include "mmu/mmu_internal.h"
#include "mmu/page_track.h"
#include "mmu/spte.h"
#include "x86.h"
#include "kvm_emulate.h"
#include "kvm_mm.h"
#include "glue.h"
#include "shadow_glue.h"
#include "trace.h"

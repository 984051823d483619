/* SPDX-License-Identifier: GPL-2.0 */
/* The machine that the VM runs on: its knobs in /proc and /sys, and its huge pages. */
#ifndef RMMU_HOST_H
#define RMMU_HOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KSM_DIR		"/sys/kernel/mm/ksm/"
#define KVM_PARAMETERS	"/sys/module/kvm/parameters/"
/* What rmmu maps along with a page that faults. "4096", a page, makes it do what in-tree KVM does, fault by fault. */
#define FAULT_AROUND	"/sys/module/kvm_rmmu/parameters/fault_around_bytes"

/* Whether the file was there and took the text. */
bool write_file(const char *path, const char *text);
bool write_number(const char *path, uint64_t value);
/* The first characters of a file, up to white space; `word` stays as it is when there is no file. */
void read_word(const char *path, char *word, size_t size);
/* The number in a file; 0 when there is none. */
uint64_t read_number(const char *path);
/* The number behind "name" or "name:" at the start of a line; `missing` when there is none. */
uint64_t read_field(const char *path, const char *name, uint64_t missing);

/* How KVM pages: its TDP MMU, or the shadow MMU with nested paging or without. */
enum kvm_paging { TDP_MMU, DIRECT, SHADOW };
enum kvm_paging kvm_paging(void);

/* Whether the CPU writes down which pages guests dirty (PML). */
bool kvm_has_pml(void);

/*
 * Whether KVM learns by faults what a guest uses (EPT without accessed and dirty bits): a page that was mapped ahead of its
 * use, and so counts as unused, costs a fault when it is used.
 */
bool kvm_tracks_use_by_faults(void);

/* Not where the CPU has 52 bits of physical address: no bit of an entry is reserved then. */
bool kvm_caches_mmio(void);

/* Memory of huge pages of hugetlbfs, which are set aside for it; NULL when there are none to be had. */
void *hugetlb_memory(size_t size);
void hugetlb_release(void *memory, size_t size);

/* A module by its file, with its parameters; and by its name. 0, or -1 with errno. */
long load_module(const char *path, const char *parameters);
long unload_module(const char *name);

#endif

// SPDX-License-Identifier: GPL-2.0
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define NR_HUGEPAGES "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
#define FREE_HUGEPAGES "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"

bool write_file(const char *path, const char *text)
{
	FILE *file = fopen(path, "w");
	bool taken;

	if (!file)
		return false;
	taken = fputs(text, file) >= 0;
	/* The kernel's answer comes when the buffer is written out. */
	return fclose(file) == 0 && taken;
}

bool write_number(const char *path, uint64_t value)
{
	char text[24];

	snprintf(text, sizeof(text), "%" PRIu64, value);
	return write_file(path, text);
}

void read_word(const char *path, char *word, size_t size)
{
	FILE *file = fopen(path, "r");
	char text[64];

	if (!file)
		return;
	if (fscanf(file, "%63s", text) == 1)
		snprintf(word, size, "%s", text);
	fclose(file);
}

uint64_t read_number(const char *path)
{
	unsigned long value = 0;
	FILE *file = fopen(path, "r");

	if (file) {
		if (fscanf(file, "%lu", &value) != 1)
			value = 0;
		fclose(file);
	}
	return value;
}

uint64_t read_field(const char *path, const char *name, uint64_t missing)
{
	size_t length = strlen(name);
	uint64_t value = missing;
	FILE *file = fopen(path, "r");
	char line[256];

	while (file && fgets(line, sizeof(line), file)) {
		const char *rest = line + length;

		if (strncmp(line, name, length))
			continue;
		rest += *rest == ':';
		if (*rest == ' ' || *rest == '\t') {
			value = strtoull(rest, NULL, 10);
			break;
		}
	}
	if (file)
		fclose(file);
	return value;
}

static bool is_off(const char *parameter)
{
	char value[8] = "";

	read_word(parameter, value, sizeof(value));
	return value[0] == 'N';
}

enum kvm_paging kvm_paging(void)
{
	if (is_off("/sys/module/kvm_amd/parameters/npt") || is_off("/sys/module/kvm_intel/parameters/ept"))
		return SHADOW;
	return is_off(KVM_PARAMETERS "tdp_mmu") ? DIRECT : TDP_MMU;
}

bool kvm_has_pml(void)
{
	char value[8] = "";

	read_word("/sys/module/kvm_intel/parameters/pml", value, sizeof(value));
	return value[0] == 'Y';
}

bool kvm_tracks_use_by_faults(void)
{
	return kvm_paging() != SHADOW && is_off("/sys/module/kvm_intel/parameters/eptad");
}

bool kvm_caches_mmio(void)
{
	return !is_off(KVM_PARAMETERS "mmio_caching");
}

/* How many huge pages the machine had before hugetlb_memory() asked for more. */
static uint64_t huge_pages_before;

void *hugetlb_memory(size_t size)
{
	uint64_t wanted = size / HUGE_SIZE, free = read_number(FREE_HUGEPAGES);
	void *memory;

	huge_pages_before = read_number(NR_HUGEPAGES);
	if (free < wanted)
		write_number(NR_HUGEPAGES, huge_pages_before + wanted - free);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	if (memory == MAP_FAILED) {
		write_number(NR_HUGEPAGES, huge_pages_before);
		return NULL;
	}
	return memory;
}

void hugetlb_release(void *memory, size_t size)
{
	munmap(memory, size);
	write_number(NR_HUGEPAGES, huge_pages_before);
}

long load_module(const char *path, const char *parameters)
{
	int file = must(open(path, O_RDONLY | O_CLOEXEC));
	long ret = syscall(SYS_finit_module, file, parameters, 0);

	close(file);
	return ret;
}

long unload_module(const char *name)
{
	return syscall(SYS_delete_module, name, O_NONBLOCK);
}

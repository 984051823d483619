// SPDX-License-Identifier: GPL-2.0
/*
 * The events of KVM's MMU (group kvmmmu): the same guest, once on in-tree KVM and once on rmmu,
 * shows the same events in the same order. Of an event everything is compared but addresses of
 * the host, the encoding of a frozen entry, and the VM's generations.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define OWN	"/sys/module/kvm_rmmu/parameters/own_new_vms"
#define TRACING	"/sys/kernel/tracing/"
#define SMALL	(16 * PAGE_SIZE)
#define LARGE	(4 * MIB)
#define LARGE_GPA (VM_TEST_GPA + GIB)
#define MMIO_GPA (3 * GIB)
#define MAX_EVENTS 20000

static const char * const events[] = {
	"kvm_mmu_get_page", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed",
	"mark_mmio_spte", "check_mmio_spte", "handle_mmio_page_fault", "fast_page_fault",
	"kvm_mmu_split_huge_page", "kvm_mmu_prepare_zap_page", "kvm_mmu_zap_all_fast",
};
#define EVENTS (sizeof(events) / sizeof(*events))

static void put(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_TRUNC);

	if (fd < 0 || write(fd, value, strlen(value)) != (ssize_t)strlen(value))
		bail("%s: %m", path);
	close(fd);
}

static void switch_events(const char *value)
{
	char path[160];

	for (size_t i = 0; i < EVENTS; i++) {
		snprintf(path, sizeof(path), TRACING "events/kvmmmu/%s/enable", events[i]);
		put(path, value);
	}
}

static guest_code void play(uint64_t shared)
{
	(void)shared;
	for (int pass = 0; pass < 3; pass++) {
		for (uint64_t at = 0; at < SMALL; at += PAGE_SIZE)
			store(VM_TEST_GPA + at, at);
		for (uint64_t at = 0; at < LARGE; at += HUGE_SIZE / 4)
			store(LARGE_GPA + at, at);
		guest_sync(1);
	}
	/* Two addresses, because KVM remembers the last one without a look at the tables. */
	for (int pass = 0; pass < 2; pass++) {
		load(MMIO_GPA);
		load(MMIO_GPA + 8 * PAGE_SIZE);
	}
	guest_sync(2);
	load(MMIO_GPA);
	guest_sync(3);
}

static void run_to_sync(struct vcpu *vcpu, uint32_t value)
{
	do {
		if (vcpu_run(vcpu))
			bail("KVM_RUN: %m");
	} while (vcpu->run->exit_reason == KVM_EXIT_MMIO);
	if (!exit_is_sync(vcpu, value))
		bail("the guest is not at %u", value);
}

static bool one_of(const char *word, const char * const *words)
{
	for (; *words; words++)
		if (!strcmp(word, *words))
			return true;
	return false;
}

/* What a line says, without what must differ. NULL if it is none of ours. */
static char *normal(char *line, int pid)
{
	/* Words before a value that is the host's business, or a generation. */
	static const char * const dropped[] = { "pfn", "sptep", "at", "gen", "kvm-mmu-valid-gen", "kvm_gen", "spte-gen",
						"vcpu", NULL };
	static const char * const entries[] = { "spte", "old_spte", "new_spte", "old", "new", NULL };
	const char *before = "";
	char task[32], *event, *out;
	size_t len = 0;

	snprintf(task, sizeof(task), "-%d ", pid);
	event = line[0] != '#' && strstr(line, task) ? strstr(line, ": ") : NULL;
	if (!event)
		return NULL;
	out = calloc(1, strlen(event) + 1);
	for (char *word = strtok(event + 2, " \n"); word; word = strtok(NULL, " \n")) {
		uint64_t spte = strtoull(word, NULL, 16);

		if (one_of(before, dropped) || !strncmp(word, "sptep:", 6))
			len += sprintf(out + len, "- ");
		else if (!one_of(before, entries))
			len += sprintf(out + len, "%s ", word);
		else if (spte & 1)
			/* The bits that say what is allowed, not the frame. */
			len += sprintf(out + len, "%lx ", spte & 0xfff0000000000fffUL);
		else
			/* Frozen, or an MMIO entry, which has the generation in it. */
			len += sprintf(out + len, "%s ", spte ? "?" : "0");
		before = word;
	}
	return out;
}

/* Plays the scene with a VM of one owner; returns how many events there were. */
static size_t scene(const char *owned, char **seen)
{
	uint8_t *small = memory(SMALL, false), *large = memory(LARGE, true);
	struct kvm_dirty_log log = { .slot = 1 };
	uint64_t bitmap[LARGE / PAGE_SIZE / 64];
	struct vcpu *vcpu;
	size_t count = 0;
	struct vm vm;
	char line[1024], *text;
	FILE *file;

	put(OWN, owned);
	put(TRACING "trace", "\n");
	memset(small, 1, SMALL);
	memset(large, 1, LARGE);
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SMALL, small, 0));
	must(vm_slot(&vm, 2, LARGE_GPA, LARGE, large, 0));
	vcpu = vm_vcpu(&vm, play, VM_SHARED_GPA);
	switch_events("1");
	run_to_sync(vcpu, 1);
	/* Write protection, a huge page taken apart, and writes that are logged without a lock. */
	must(vm_slot(&vm, 1, VM_TEST_GPA, SMALL, small, KVM_MEM_LOG_DIRTY_PAGES));
	must(vm_slot(&vm, 2, LARGE_GPA, LARGE, large, KVM_MEM_LOG_DIRTY_PAGES));
	log.dirty_bitmap = bitmap;
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	log.slot = 2;
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	run_to_sync(vcpu, 1);
	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	must(vm_slot(&vm, 2, LARGE_GPA, LARGE, large, 0));
	/* The host takes pages away. */
	must(madvise(small + PAGE_SIZE, 3 * PAGE_SIZE, MADV_DONTNEED));
	must(madvise(large, HUGE_SIZE, MADV_DONTNEED));
	run_to_sync(vcpu, 1);
	run_to_sync(vcpu, 2);
	/* Entries of MMIO become stale; then everything goes. */
	must(vm_slot(&vm, 3, 2 * LARGE_GPA, SMALL, small, 0));
	run_to_sync(vcpu, 3);
	must(vm_slot(&vm, 1, VM_TEST_GPA, 0, small, 0));
	switch_events("0");
	vm_destroy(&vm);

	file = fopen(TRACING "trace", "r");
	if (!file)
		bail(TRACING "trace: %m");
	while (fgets(line, sizeof(line), file))
		if ((text = normal(line, getpid()))) {
			if (count == MAX_EVENTS)
				bail("more than %u events", MAX_EVENTS);
			seen[count++] = text;
		}
	fclose(file);
	munmap(small, SMALL);
	munmap(large, LARGE);
	return count;
}

static size_t of_event(const char *event, char **seen, size_t count)
{
	size_t len = strlen(event), found = 0;

	for (size_t i = 0; i < count; i++)
		found += !strncmp(seen[i], event, len) && seen[i][len] == ':';
	return found;
}

int main(void)
{
	static char *in_tree[MAX_EVENTS], *rmmu[MAX_EVENTS];
	char around[16] = "65536";
	size_t count, others, first;

	if (access(OWN, W_OK))
		skip_all("kvm_rmmu is not loaded");
	if (access(TRACING "events/kvmmmu", F_OK))
		skip_all("this kernel has no tracefs at " TRACING ", or kvm.ko no events");
	plan(EVENTS + 1);
	put(TRACING "buffer_size_kb", "8192");
	put(TRACING "tracing_on", "1");
	read_word(FAULT_AROUND, around, sizeof(around));
	write_file(FAULT_AROUND, "4096");
	count = scene("0", in_tree);
	others = scene("1", rmmu);
	write_file(FAULT_AROUND, around);
	for (size_t i = 0; i < EVENTS; i++) {
		size_t want = of_event(events[i], in_tree, count), got = of_event(events[i], rmmu, others);

		ok(want && want == got, "%s: %zu on in-tree KVM, %zu on rmmu", events[i], want, got);
	}
	for (first = 0; first < count && first < others; first++)
		if (strcmp(in_tree[first], rmmu[first]))
			break;
	if (!ok(first == count && first == others, "all events are the same, in the same order"))
		for (size_t i = first > 3 ? first - 3 : 0; i < first + 5; i++)
			note("%s%zu: in-tree %s | rmmu %s", i == first ? "first difference, " : "", i,
			     i < count ? in_tree[i] : "-", i < others ? rmmu[i] : "-");
	return finish();
}

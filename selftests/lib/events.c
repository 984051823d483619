// SPDX-License-Identifier: GPL-2.0
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "events.h"
#include "host.h"
#include "tap.h"

#define OWN	"/sys/module/kvm_rmmu/parameters/own_new_vms"
#define TRACING	"/sys/kernel/tracing/"
/* Of a CPU's buffer. */
#define BUFFER_KIB "65536"
/* What is allowed in an entry: all but the frame, and the accessed bit, which the host may clear whenever it likes (DAMON
 * does, in kernels that watch their memory from the start). */
#define COMPARED (0xfff0000000000fffUL & ~(1UL << 5))
/* Of an entry that says that a frame is MMIO: all but the generation. The frame is the guest's, and the address bits
 * that are set against L1TF are to be the same. */
#define COMPARED_MMIO (~(0x7fUL << 3 | 0x7ffUL << 52))

static void put(const char *path, const char *value)
{
	if (!write_file(path, value))
		bail("%s: %m", path);
}

void own_new_vms(bool own)
{
	put(OWN, own ? "1" : "0");
}

void events_require(void)
{
	if (access(OWN, W_OK))
		skip_all("kvm_rmmu is not loaded");
	if (access(TRACING "events/kvmmmu", F_OK))
		skip_all("this kernel has no tracefs at " TRACING ", or kvm.ko no events");
}

static void switch_events(const char * const *names, const char *value)
{
	char path[160];

	for (; *names; names++) {
		snprintf(path, sizeof(path), TRACING "events/kvmmmu/%s/enable", *names);
		put(path, value);
	}
}

/* What FAULT_AROUND was. */
static char around[16] = "65536";

void events_start(const char * const *names)
{
	cpu_set_t here;

	read_word(FAULT_AROUND, around, sizeof(around));
	put(FAULT_AROUND, "4096");
	CPU_ZERO(&here);
	CPU_SET(sched_getcpu(), &here);
	must(sched_setaffinity(0, sizeof(here), &here));
	put(TRACING "buffer_size_kb", BUFFER_KIB);
	put(TRACING "trace", "\n");
	put(TRACING "tracing_on", "1");
	switch_events(names, "1");
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
	bool mmio;

	snprintf(task, sizeof(task), "-%d ", pid);
	event = line[0] != '#' && strstr(line, task) ? strstr(line, ": ") : NULL;
	if (!event)
		return NULL;
	out = calloc(1, strlen(event) + 1);
	mmio = strstr(event, "check_mmio_spte");
	for (char *word = strtok(event + 2, " \n"); word; word = strtok(NULL, " \n")) {
		uint64_t spte = strtoull(word, NULL, 16);

		if (one_of(before, dropped) || !strncmp(word, "sptep:", 6))
			len += sprintf(out + len, "- ");
		else if (!one_of(before, entries))
			len += sprintf(out + len, "%s ", word);
		else if (mmio)
			len += sprintf(out + len, "%lx ", spte & COMPARED_MMIO);
		else if (spte & 1)
			len += sprintf(out + len, "%lx ", spte & COMPARED);
		else
			/* Frozen, or an MMIO entry, which has the generation in it. */
			len += sprintf(out + len, "%s ", spte ? "?" : "0");
		before = word;
	}
	return out;
}

void events_stop(const char * const *names, struct events *events)
{
	unsigned long kept, written;
	char line[1024], *text;
	FILE *file;

	switch_events(names, "0");
	put(FAULT_AROUND, around);
	events->lines = calloc(MAX_EVENTS, sizeof(*events->lines));
	events->count = 0;
	file = fopen(TRACING "trace", "r");
	if (!file || !events->lines)
		bail(TRACING "trace: %m");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "# entries-in-buffer/entries-written: %lu/%lu", &kept, &written) == 2 && kept != written)
			bail("the trace buffer holds %lu of %lu events", kept, written);
		text = normal(line, getpid());
		if (!text)
			continue;
		if (events->count == MAX_EVENTS)
			bail("more than %u events", MAX_EVENTS);
		events->lines[events->count++] = text;
	}
	fclose(file);
}

void events_free(struct events *events)
{
	for (size_t i = 0; i < events->count; i++)
		free(events->lines[i]);
	free(events->lines);
}

size_t events_of(const struct events *events, const char *name)
{
	size_t len = strlen(name), found = 0;

	for (size_t i = 0; i < events->count; i++)
		found += !strncmp(events->lines[i], name, len) && events->lines[i][len] == ':';
	return found;
}

bool events_equal(const struct events *in_tree, const struct events *rmmu)
{
	size_t first = 0;

	while (first < in_tree->count && first < rmmu->count && !strcmp(in_tree->lines[first], rmmu->lines[first]))
		first++;
	if (first == in_tree->count && first == rmmu->count)
		return true;
	for (size_t i = first > 12 ? first - 12 : 0; i < first; i++)
		note("%zu: both: %s", i, in_tree->lines[i]);
	for (size_t i = first; i < first + 6; i++)
		note("%s%zu: in-tree %s | rmmu %s", i == first ? "first difference, " : "", i,
		     i < in_tree->count ? in_tree->lines[i] : "-", i < rmmu->count ? rmmu->lines[i] : "-");
	return false;
}

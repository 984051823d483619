// SPDX-License-Identifier: GPL-2.0
/*
 * The benchmark's workloads, each on a VM of in-tree KVM and on one of rmmu, alternating.
 *
 *   bench [--rounds N] [--dir DIR] [--in-tree] [--list] [ROW...]
 *
 * Prints a line a figure: "result", row, unit, owner, round, value, separated by tabs. Rows are chosen by a part of their
 * name; those of shadow paging run where KVM uses that, and the others where it does not. DIR is a directory of a file
 * system on a disk, for memory files (default: the current one). With --in-tree all VMs are in-tree KVM's, be kvm_rmmu
 * loaded or not.
 */
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

#define PARAMETERS	"/sys/module/kvm_rmmu/parameters/"
#define STATS		"/sys/kernel/debug/rmmu/stats"

/* Aging looks at all memory of this process, so it comes before the rows that keep some. */
static const struct row *const groups[] = {
	fault_rows, dirty_rows, age_rows, zap_rows, snapshot_rows, nested_rows, shadow_rows
};
static const char *const owners[] = { "in-tree", "rmmu" };

static int rounds = 3, round_number, owner;
static bool only_in_tree;
const char *bench_file_dir = ".";

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000UL + now.tv_nsec;
}

void report(const struct row *row, const char *what, const char *unit, double value)
{
	printf("result\t%s%s%s\t%s\t%s\t%d\t%.1f\n", row->name, what ? ": " : "", what ?: "", unit, owners[owner],
	       round_number, value);
	fflush(stdout);
}

static bool write_parameter(const char *name, const char *value)
{
	char path[128];
	int fd, ret;

	snprintf(path, sizeof(path), PARAMETERS "%s", name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ret = write(fd, value, strlen(value));
	close(fd);
	return ret > 0;
}

static unsigned long vms_owned(void)
{
	FILE *file = fopen(STATS, "r");
	unsigned long value;
	char name[64];

	if (!file)
		bail("%s: %m", STATS);
	while (fscanf(file, "%63s %lu", name, &value) == 2)
		if (!strcmp(name, "vms_owned_total")) {
			fclose(file);
			return value;
		}
	bail("%s has no vms_owned_total", STATS);
}

void bench_vm(struct vm *vm)
{
	unsigned long before;

	if (only_in_tree) {
		vm_create(vm);
		return;
	}
	before = vms_owned();
	vm_create(vm);
	if (vms_owned() - before != (unsigned long)owner)
		bail("the VM's owner is not %s", owners[owner]);
}

static void run(const struct row *row, const char *default_window)
{
	for (round_number = 0; round_number < rounds; round_number++)
		for (int turn = 0; turn < 2; turn++) {
			if (only_in_tree) {
				if (turn == 0)
					row->run(row);
				continue;
			}
			/* Whoever goes first finds the caches colder: take turns at that, too. */
			owner = turn ^ (round_number & 1);
			if (!write_parameter("own_new_vms", owner ? "1" : "0"))
				bail("kvm_rmmu is not loaded, or this is not root");
			if (default_window)
				write_parameter("fault_around_bytes", row->around == AROUND_OFF ? "4096" : default_window);
			row->run(row);
		}
}

static char *default_window(void)
{
	static char value[32];
	int fd = open(PARAMETERS "fault_around_bytes", O_RDONLY | O_CLOEXEC);
	ssize_t got;

	if (fd < 0)
		return NULL;
	got = read(fd, value, sizeof(value) - 1);
	close(fd);
	return got > 0 ? value : NULL;
}

static bool parameter_is_off(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	char value = 'Y';

	if (fd < 0)
		return false;
	if (read(fd, &value, 1) < 0)
		bail("%s: %m", path);
	close(fd);
	return value == 'N' || value == '0';
}

static bool shadow_paging(void)
{
	return parameter_is_off("/sys/module/kvm_amd/parameters/npt") ||
	       parameter_is_off("/sys/module/kvm_intel/parameters/ept");
}

static bool chosen(const struct row *row, char **names)
{
	if (!*names)
		return true;
	for (; *names; names++)
		if (strstr(row->name, *names))
			return true;
	return false;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "rounds", required_argument, NULL, 'r' },
		{ "dir", required_argument, NULL, 'd' },
		{ "in-tree", no_argument, NULL, 'i' },
		{ "list", no_argument, NULL, 'l' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	char *window, *end = "";
	bool list = false;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'r')
			rounds = strtol(optarg, &end, 10);
		else if (option == 'd')
			bench_file_dir = optarg;
		else if (option == 'i')
			only_in_tree = true;
		else if (option == 'l')
			list = true;
		else {
			printf("usage: bench [--rounds N] [--dir DIR] [--in-tree] [--list] [ROW...]\n");
			return option != 'h';
		}
	}
	if (*end || rounds < 1)
		bail("--rounds takes a number, 1 at least");
	window = default_window();
	for (unsigned int group = 0; group < sizeof(groups) / sizeof(*groups); group++)
		for (const struct row *row = groups[group]; row->name; row++) {
			if (!chosen(row, argv + optind))
				continue;
			if (list)
				printf("%s\n", row->name);
			else if (!strncmp(row->name, SHADOW, strlen(SHADOW)) == shadow_paging())
				run(row, window);
		}
	if (!list && !only_in_tree) {
		write_parameter("own_new_vms", "1");
		if (window)
			write_parameter("fault_around_bytes", window);
	}
	return 0;
}

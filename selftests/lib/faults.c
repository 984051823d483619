// SPDX-License-Identifier: GPL-2.0
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"
#include "tap.h"

static int nth_fd, all_fd;

static void set(const char *fault, const char *name, const char *value)
{
	char path[128];
	int file;

	snprintf(path, sizeof(path), "/sys/kernel/debug/%s/%s", fault, name);
	file = must(open(path, O_WRONLY | O_CLOEXEC));
	must(write(file, value, strlen(value)));
	close(file);
}

static void set_both(const char *name, const char *value)
{
	set("failslab", name, value);
	set("fail_page_alloc", name, value);
}

bool faults_possible(void)
{
	return !access("/proc/self/fail-nth", W_OK) && !access("/sys/kernel/debug/failslab", F_OK) &&
	       !access("/sys/kernel/debug/fail_page_alloc", F_OK);
}

void faults_set_up(void)
{
	/* Allocations that may sleep too, and single pages. */
	set_both("ignore-gfp-wait", "N");
	set("fail_page_alloc", "ignore-gfp-highmem", "N");
	set("fail_page_alloc", "min-order", "0");
	/* Besides fail-nth: only tasks that say make-it-fail, but those always. */
	set_both("task-filter", "Y");
	set_both("probability", "100");
	set_both("times", "-1");
	/* Its reports would look like trouble. */
	set_both("verbose", "0");
	nth_fd = must(open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC));
	all_fd = must(open("/proc/thread-self/make-it-fail", O_RDWR | O_CLOEXEC));
}

void faults_below(unsigned long start, unsigned long end)
{
	char text[32];

	snprintf(text, sizeof(text), "0x%lx", start);
	set_both("require-start", text);
	snprintf(text, sizeof(text), "0x%lx", end);
	set_both("require-end", text);
}

static void write_number(int file, unsigned int number)
{
	char text[16];
	int length = snprintf(text, sizeof(text), "%u", number);

	must(pwrite(file, text, length, 0));
}

void faults_arm(unsigned int number)
{
	if (number == FAULTS_ALL)
		write_number(all_fd, 1);
	else
		write_number(nth_fd, number);
}

bool faults_disarm(unsigned int number)
{
	char left[16] = "";

	if (number == FAULTS_ALL) {
		write_number(all_fd, 0);
		return true;
	}
	must(pread(nth_fd, left, sizeof(left) - 1, 0));
	write_number(nth_fd, 0);
	return atoi(left) == 0;
}

long number_after(const char *path, const char *name)
{
	char text[8192] = "", *found;
	int file = open(path, O_RDONLY | O_CLOEXEC);

	if (file < 0)
		return -1;
	must(read(file, text, sizeof(text) - 1));
	close(file);
	found = strstr(text, name);
	return found ? atol(found + strlen(name)) : -1;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/rmmu, which operators depend on: what it says of the module and of VMs, what can be set through it, and that all
 * that is documented to be set can be set under lockdown=integrity, which lets nobody write to debugfs. With -l it locks
 * the kernel down, for the rest of the boot.
 */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define DEVICE		"/dev/rmmu"
#define PARAMETERS	"/sys/module/kvm_rmmu/parameters/"
#define LOCKDOWN	"/sys/kernel/security/lockdown"
#define PAGES		256UL

static guest_code void touch(uint64_t unused)
{
	(void)unused;
	for (uint64_t page = 0; page < PAGES; page++)
		load(VM_TEST_GPA + page * PAGE_SIZE);
	for (;;)
		guest_sync(1);
}

/* The number of a line "subject name value". */
static uint64_t value_in(const char *text, const char *subject, const char *name)
{
	char start[128];
	const char *line;
	uint64_t value;
	int length = snprintf(start, sizeof(start), "%s %s ", subject, name);

	for (line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
		if (!strncmp(line, start, length) && sscanf(line + length, "%lu", &value) == 1)
			return value;
	return ~0UL;
}

/* All of the file, in reads of a few bytes each. */
static const char *text(void)
{
	static char buffer[1 << 16];
	size_t length = 0;
	ssize_t got;
	int fd = must(open(DEVICE, O_RDONLY | O_CLOEXEC));

	while (length < sizeof(buffer) - 1 && (got = must(read(fd, buffer + length, 61))) > 0)
		length += got;
	buffer[length] = 0;
	close(fd);
	return buffer;
}

static uint64_t value(const char *subject, const char *name)
{
	return value_in(text(), subject, name);
}

/* 0, or the error of writing a line. */
static int set(const char *format, const char *subject, const char *words)
{
	char line[512];
	int fd = must(open(DEVICE, O_WRONLY | O_CLOEXEC)), error = 0;

	snprintf(line, sizeof(line), format, subject, words);
	if (write(fd, line, strlen(line)) != (ssize_t)strlen(line))
		error = errno;
	close(fd);
	return error;
}

/* The name of this process's VM; there is one at a time. */
static const char *name_of_vm(void)
{
	static char name[64];
	const char *lines = text(), *line;
	char start[32];

	snprintf(start, sizeof(start), "\n%d-", getpid());
	line = strstr(lines, start);
	if (!line || sscanf(line + 1, "%63s", name) != 1)
		return NULL;
	return name;
}

static void check_statistics(struct vm *vm, struct vcpu *vcpu, const char *name)
{
	uint64_t before = value("module", "vms_owned");
	char start[64];
	char debugfs[256];

	ok(value("module", "format") == 1, "the format is 1");
	ok(before == read_field("/sys/kernel/debug/rmmu/stats", "vms_owned", 0) && before,
	   "the module's counters are those of debugfs (%lu VMs)", before);
	vcpu_run_to_sync(vcpu);
	ok(value(name, "pages_4K") == kvm_stat(vm->fd, "pages_4k"), "pages are those that KVM counts (%lu)",
	   value(name, "pages_4K"));
	snprintf(debugfs, sizeof(debugfs), "/sys/kernel/debug/rmmu/vms/%s/faults", name);
	ok(value(name, "faults_fixed") == read_field(debugfs, "fixed", 0) && value(name, "faults_fixed") >= PAGES / 16,
	   "faults are those of debugfs (%lu fixed)", value(name, "faults_fixed"));
	ok(value(name, "around_mapped_ahead") >= PAGES - PAGES / 16, "pages mapped ahead are counted (%lu)",
	   value(name, "around_mapped_ahead"));
	snprintf(start, sizeof(start), "%d-", getpid());
	ok(!strncmp(name, start, strlen(start)), "a VM has the name of its process (%s)", name);
}

static void check_settings(const char *name)
{
	static const char *const bad[] = { "fault_around_bytes 5000", "fault_around_bytes", "fault_around_bytes x",
					   "fault_around_bytes 4096 4096", "pages_4K 1", "nothing 1" };
	static char longest[300];
	int fd, refused = 0;

	ok(!set("%s fault_around_bytes %s\n", name, "16384") && value(name, "fault_around_bytes") == 16384,
	   "a VM's window can be set");
	for (unsigned int i = 0; i < sizeof(bad) / sizeof(*bad); i++)
		refused += set("%s %s\n", name, bad[i]) == EINVAL;
	ok(refused == sizeof(bad) / sizeof(*bad) && value(name, "fault_around_bytes") == 16384,
	   "what makes no sense is refused, and changes nothing (%d)", refused);
	ok(set("%s %s\n", "1-99999", "fault_around_bytes 4096") == ESRCH, "a VM that is not there is no such process");
	ok(set("%s %s\n", "abc", "fault_around_bytes 4096") == EINVAL, "a name that is none is refused");
	memset(longest, 'x', sizeof(longest) - 1);
	ok(set("%s%s", longest, "") == EINVAL, "a line that is too long is refused");
	fd = must(open(DEVICE, O_RDONLY));
	ok(unload_module("kvm_rmmu") < 0 && (errno == EAGAIN || errno == EBUSY), "an open file keeps the module loaded");
	close(fd);
}

/* The parameters that can be changed while the module is loaded, and two values of each. */
static const char *const parameters[][3] = {
	{ "own_new_vms", "0", "1" }, { "fault_around_bytes", "16K", "64K" }, { "shadow_prefetch", "0", "1" },
	{ "audit_at_end", "1", "0" }, { "tdp_mmu", "0", "1" },
};

static void check_parameters(void)
{
	char path[128], before[32], first[32], second[32];
	unsigned int changed = 0, there = 0;
	glob_t found;

	for (unsigned int i = 0; i < sizeof(parameters) / sizeof(*parameters); i++) {
		snprintf(path, sizeof(path), PARAMETERS "%s", parameters[i][0]);
		read_word(path, before, sizeof(before));
		changed += write_file(path, parameters[i][1]);
		read_word(path, first, sizeof(first));
		changed += write_file(path, parameters[i][2]);
		read_word(path, second, sizeof(second));
		changed += strcmp(first, second) != 0;
		changed += write_file(path, before);
	}
	ok(changed == 4 * sizeof(parameters) / sizeof(*parameters), "each parameter can be set (%u)", changed);
	if (!glob(PARAMETERS "*", 0, NULL, &found))
		there = found.gl_pathc;
	globfree(&found);
	ok(there == sizeof(parameters) / sizeof(*parameters), "and there are no others (%u)", there);
}

static void lock_down(void)
{
	mount("securityfs", "/sys/kernel/security", "securityfs", 0, NULL);
	if (access(LOCKDOWN, F_OK))
		skip_all("the kernel has no lockdown");
	if (!write_file(LOCKDOWN, "integrity"))
		bail("the kernel cannot be locked down: %m");
}

int main(int argc, char **argv)
{
	bool locked = argc > 1 && !strcmp(argv[1], "-l");
	char path[256], name[64];
	struct vcpu *vcpu;
	struct vm vm;
	uint8_t *base;

	if (access("/sys/module/kvm_rmmu", F_OK))
		skip_all("rmmu is not loaded");
	if (locked)
		lock_down();
	plan(16);
	check_parameters();
	base = memory(PAGES * PAGE_SIZE, false);
	memset(base, 1, PAGES * PAGE_SIZE);
	vm_create(&vm);
	must(vm_slot(&vm, 0, VM_TEST_GPA, PAGES * PAGE_SIZE, base, 0));
	vcpu = vm_vcpu(&vm, touch, 0);
	if (!name_of_vm())
		bail("the VM is not in " DEVICE);
	snprintf(name, sizeof(name), "%s", name_of_vm());
	check_statistics(&vm, vcpu, name);
	check_settings(name);
	snprintf(path, sizeof(path), "/sys/kernel/debug/rmmu/vms/%s/fault_around_bytes", name);
	ok(write_number(path, 4096) == !locked, "debugfs %s", locked ? "can be written by nobody" : "can be written, too");
	vm_destroy(&vm);
	ok(!name_of_vm(), "a VM that ended is not there any more");
	return finish();
}

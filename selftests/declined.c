// SPDX-License-Identifier: GPL-2.0
/*
 * Each VM that rmmu declines is counted, and some of them are in the log: who may create VMs cannot flood it. A test module
 * makes this kernel take a VM type that it does not have, and that rmmu declines.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#ifndef KVM_X86_SW_PROTECTED_VM
#define KVM_X86_SW_PROTECTED_VM	1
#endif
#define STATS		"/sys/kernel/debug/rmmu/stats"
#define MODULE		"/sys/module/kvm_rmmu"
#define VMS		200
/* What the kernel lets through: so many lines in so long. */
#define BURST		10
#define INTERVAL_MS	5000

static unsigned long symbol(const char *wanted, const char *of)
{
	FILE *symbols = fopen("/proc/kallsyms", "r");
	unsigned long address, found = 0;
	char line[512], name[256], module[64];

	if (!symbols)
		bail("kallsyms: %m");
	while (fgets(line, sizeof(line), symbols))
		if (sscanf(line, "%lx %*c %255s %63s", &address, name, module) == 3 && !strcmp(name, wanted) &&
		    !strcmp(module, of))
			found = address;
	fclose(symbols);
	return found;
}

static int lines(void)
{
	static char log[1 << 20];
	int count = 0;

	log[must(klogctl(3, log, sizeof(log) - 1))] = 0;
	for (char *at = log; (at = strstr(at, "VM declined")); at++)
		count++;
	return count;
}

int main(void)
{
	unsigned long caps = symbol("kvm_caps", "[kvm]"), declined;
	int kvm, before, made = 0, said;
	char parameters[64];
	uint64_t start, allowed;

	if (access(MODULE, F_OK))
		skip_all("kvm_rmmu is not loaded");
	if (!caps)
		bail("kvm.ko has no kvm_caps");
	snprintf(parameters, sizeof(parameters), "kvm_caps=0x%lx", caps);
	must(load_module("/selftests/modules/vendor_ops.ko", parameters));
	plan(4);
	kvm = must(open("/dev/kvm", O_RDWR));
	before = lines();
	declined = read_field(STATS, "vms_declined", 0);
	start = now_ms();
	for (int i = 0; i < VMS; i++) {
		int vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);

		made += vm >= 0;
		close(vm);
	}
	allowed = BURST * (2 + (now_ms() - start) / INTERVAL_MS);
	said = lines() - before;
	close(kvm);
	must(unload_module("vendor_ops"));
	ok(made == VMS, "VMs of another type are created");
	ok(read_field(STATS, "vms_declined", 0) == declined + VMS, "each is counted as declined");
	ok(said > 0, "the log says so");
	note("%d lines for %d VMs", said, VMS);
	ok((uint64_t)said <= allowed, "but no more than %lu times", (unsigned long)allowed);
	return finish();
}

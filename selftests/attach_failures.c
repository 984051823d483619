// SPDX-License-Identifier: GPL-2.0
/*
 * kvm.ko is loaded under rmmu, and unloaded, while each allocation that rmmu makes for it fails once, and then all of them.
 * rmmu hooks all of kvm.ko or nothing, unhooks all of it, and serves again at the next chance.
 *
 * Arguments: the directory of kvm.ko's modules, and how many allocations to go on each time (default 1).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"
#include "host.h"
#include "vm.h"

#define STATS	"/sys/kernel/debug/rmmu/stats"
#define ENOUGH	2000

static char kvm_path[512], vendor_path[512];

static bool attached(void)
{
	return number_after(STATS, "hooks_attached ") == 1;
}

/* Functions that ftrace diverts to rmmu's stubs. */
static int diverted(void)
{
	FILE *list = fopen("/sys/kernel/tracing/enabled_functions", "r");
	char line[512];
	int count = 0;

	if (!list)
		bail("enabled_functions: %m");
	while (fgets(line, sizeof(line), list))
		count += strstr(line, "rmmu_stub_") != NULL;
	fclose(list);
	return count;
}

static guest_code void hello(uint64_t shared)
{
	store(shared, 42);
	guest_sync(1);
}

/* A VM works; whether it is rmmu's. */
static bool owned_vm(void)
{
	long before = number_after(STATS, "vms_owned_total ");
	struct vm vm;

	must(load_module(vendor_path, ""));
	vm_create(&vm);
	if (vcpu_run_to_sync(vm_vcpu(&vm, hello, VM_SHARED_GPA)) != 1 || *(uint64_t *)vm.shared != 42)
		bail("the guest does not work");
	vm_destroy(&vm);
	must(unload_module("kvm_amd"));
	return number_after(STATS, "vms_owned_total ") > before;
}

static int hooks;

/* Only allocations with a function of rmmu on the stack. */
static void limit_to_rmmu(void)
{
	FILE *list = fopen("/proc/kallsyms", "r");
	unsigned long address, first = ~0UL, last = 0;
	char line[512], type;

	if (!list)
		bail("kallsyms: %m");
	while (fgets(line, sizeof(line), list)) {
		if (!strstr(line, "[kvm_rmmu]") || sscanf(line, "%lx %c", &address, &type) != 2 ||
		    (type != 't' && type != 'T'))
			continue;
		first = address < first ? address : first;
		last = address > last ? address : last;
	}
	fclose(list);
	if (!last)
		bail("rmmu is not loaded");
	faults_below(first, last + 0x1000);
}

static unsigned int failed, attaches_failed, wrong;

/* Loads kvm.ko with a failure. Returns whether the allocation was reached. */
static bool try_load(unsigned int number)
{
	bool reached, hooked;
	long ret;
	int left;

	faults_arm(number);
	ret = load_module(kvm_path, "force_emulation_prefix=1");
	reached = faults_disarm(number);
	if (ret)
		bail("kvm.ko does not load (allocation %u): %m", number);
	hooked = attached();
	left = diverted();
	failed += reached;
	attaches_failed += !hooked;
	if (left != (hooked ? hooks : 0)) {
		note("allocation %u: %d of %d functions are diverted", number, left, hooks);
		wrong++;
	}
	if (!hooked && owned_vm()) {
		note("allocation %u: a VM is rmmu's without hooks", number);
		wrong++;
	}
	must(unload_module("kvm"));
	return reached;
}

/* The same with a failure while it is unloaded. */
static bool try_unload(unsigned int number)
{
	bool reached;
	long ret;

	must(load_module(kvm_path, "force_emulation_prefix=1"));
	faults_arm(number);
	ret = unload_module("kvm");
	reached = faults_disarm(number);
	failed += reached;
	if (ret || diverted()) {
		note("allocation %u: unloading says %ld, %d functions are diverted", number, ret, diverted());
		wrong++;
	}
	return reached;
}

static void sweep(const char *name, bool (*try)(unsigned int), unsigned int step)
{
	unsigned int number = 1;

	failed = attaches_failed = wrong = 0;
	while (number < ENOUGH && wrong < 3 && try(number))
		number += step;
	note("%s: %u failures, after which it was not hooked %u times", name, failed, attaches_failed);
	ok(!wrong && failed && number < ENOUGH, "%s while allocations fail, one at a time: all or nothing", name);
}

int main(int argc, char **argv)
{
	unsigned int step = argc > 2 ? atoi(argv[2]) : 1;

	if (!faults_possible())
		skip_all("the kernel cannot make allocations fail");
	if (argc < 2 || !step || access(STATS, R_OK))
		bail("usage: attach_failures DIRECTORY [STEP], with rmmu loaded");
	snprintf(kvm_path, sizeof(kvm_path), "%s/kvm.ko", argv[1]);
	snprintf(vendor_path, sizeof(vendor_path), "%s/kvm-amd.ko", argv[1]);
	faults_set_up();
	limit_to_rmmu();
	plan(5);
	hooks = diverted();
	ok(hooks > 0 && attached(), "rmmu has hooked kvm.ko (%d functions)", hooks);
	must(unload_module("kvm_amd"));
	must(unload_module("kvm"));
	sweep("kvm.ko is loaded", try_load, step);
	sweep("kvm.ko is unloaded", try_unload, step);
	wrong = 0;
	try_load(FAULTS_ALL);
	ok(!wrong, "kvm.ko is loaded while all of rmmu's allocations fail");
	must(load_module(kvm_path, "force_emulation_prefix=1"));
	ok(attached() && diverted() == hooks && owned_vm(), "with memory again it is hooked, and served");
	must(load_module(vendor_path, ""));
	return finish();
}

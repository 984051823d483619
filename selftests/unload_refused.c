// SPDX-License-Identifier: GPL-2.0
/*
 * ftrace refuses to take rmmu's hooks out when the module is unloaded: the module stays, and says so, until they can be taken
 * out. KVM goes on meanwhile.
 *
 * Argument: the module's file. It is loaded again at the end.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/klog.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define MODULE	"/sys/module/kvm_rmmu"
#define REFUSE	"/sys/module/refuse_call/parameters/"
/* rmmu asks again after 1 ms, 2 ms and so on; by then it has been refused for a second, and says so. */
#define TIMES	13

static long unloaded = -1;

static void *unload(void *unused)
{
	(void)unused;
	unloaded = unload_module("kvm_rmmu");
	return NULL;
}

static bool wait_for(bool (*what)(void), unsigned int ms)
{
	for (uint64_t end = deadline_ms(ms); now_ms() < end; usleep(10000))
		if (what())
			return true;
	return what();
}

static bool gone(void) { return access(MODULE, F_OK) != 0; }
static bool refused_or_gone(void) { return read_number(REFUSE "refused") >= TIMES || gone(); }

static int hooks(void)
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

static bool said(const char *text)
{
	static char log[1 << 20];

	log[must(klogctl(3, log, sizeof(log) - 1))] = 0;
	return strstr(log, text) != NULL;
}

static guest_code void hello(uint64_t shared)
{
	store(shared, 42);
	guest_sync(1);
}

static bool works(void)
{
	struct vm vm;
	bool done;

	vm_create(&vm);
	done = vcpu_run_to_sync(vm_vcpu(&vm, hello, VM_SHARED_GPA)) == 1 && *(uint64_t *)vm.shared == 42;
	vm_destroy(&vm);
	return done;
}

int main(int argc, char **argv)
{
	pthread_t unloader;
	int before;

	if (argc != 2)
		bail("where is the module?");
	if (gone())
		skip_all("kvm_rmmu is not loaded");
	before = hooks();
	if (load_module("/selftests/modules/refuse_call.ko", "function=update_ftrace_direct_del error=-16"))
		skip_all("no function can be made to fail in this kernel: %m");
	plan(7);
	pthread_create(&unloader, NULL, unload, NULL);
	wait_for(refused_or_gone, 60000);
	if (!ok(!gone(), "the module stays while its hooks cannot be taken out"))
		bail("the hooks lead into memory that is free");
	ok(read_number(REFUSE "refused") >= TIMES && hooks() == before, "it asks again, and the hooks are in place");
	ok(said("hooks cannot be taken out"), "it says why it stays");
	ok(works(), "a VM works meanwhile");
	must(write_file(REFUSE "error", "0") ? 0 : -1);
	pthread_join(unloader, NULL);
	ok(!unloaded && gone(), "as soon as they can be taken out it is gone");
	ok(!hooks(), "and so are the hooks");
	must(unload_module("refuse_call"));
	must(load_module(argv[1], ""));
	ok(works() && hooks() == before, "loaded again, rmmu serves a VM");
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * A VM is created while rmmu is being unloaded: after the module has begun to go, and before its hooks are out. The thread that
 * creates it sleeps in a function of KVM's, which rmmu's handler has called, so the module's text has to stay until it is back.
 * The VM is in-tree KVM's, and nothing is said about it.
 *
 * Argument: the module's file. It is loaded again at the end.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define MODULE		"/sys/module/kvm_rmmu"
#define PAUSE		"/sys/module/pause_at/parameters/"
#define STATS		"/sys/kernel/debug/rmmu/stats"
#define PARAMETERS	"before_function=unregister_module_notifier " \
			"first_function=mutex_lock first_comm=unloads " \
			"second_function=kvm_mmu_init_tdp_mmu second_comm=creates"

static int created = -1;
static long unloaded = -1;

static void *unload(void *unused)
{
	(void)unused;
	pthread_setname_np(pthread_self(), "unloads");
	unloaded = unload_module("kvm_rmmu");
	return NULL;
}

static void *create_vm(void *kvm)
{
	pthread_setname_np(pthread_self(), "creates");
	created = ioctl(*(int *)kvm, KVM_CREATE_VM, 0);
	return NULL;
}

static bool stopped(const char *file)
{
	char word[8] = "";

	read_word(file, word, sizeof(word));
	return !strcmp(word, "Y");
}

static bool wait_for(bool (*what)(void), unsigned int ms)
{
	for (uint64_t end = deadline_ms(ms); now_ms() < end; usleep(10000))
		if (what())
			return true;
	return what();
}

static bool unloading(void) { return stopped(PAUSE "first_stopped"); }
static bool creating(void) { return stopped(PAUSE "second_stopped"); }
static bool gone(void) { return access(MODULE, F_OK) != 0; }

/* No function is diverted to rmmu's stubs. */
static bool unhooked(void)
{
	FILE *list = fopen("/sys/kernel/tracing/enabled_functions", "r");
	bool found = false;
	char line[512];

	if (!list)
		bail("enabled_functions: %m");
	while (fgets(line, sizeof(line), list))
		found |= strstr(line, "rmmu_stub_") != NULL;
	fclose(list);
	return !found;
}

/* How often rmmu has said something with this text. */
static int said(const char *text)
{
	static char log[1 << 20];
	int length = must(klogctl(3, log, sizeof(log) - 1)), count = 0;

	log[length] = 0;
	for (char *at = log; (at = strstr(at, text)); at++)
		count++;
	return count;
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
	pthread_t unloader, creator;
	int kvm, declined;

	if (argc != 2)
		bail("where is the module?");
	if (gone())
		skip_all("kvm_rmmu is not loaded");
	if (kvm_paging() != TDP_MMU)
		skip_all("KVM does not come by the function where the thread is stopped");
	if (load_module("/selftests/modules/pause_at.ko", PARAMETERS))
		skip_all("no thread can be stopped in this kernel: %m");
	plan(7);
	kvm = must(open("/dev/kvm", O_RDWR));
	declined = said("VM declined") + said("VM stays");

	pthread_create(&unloader, NULL, unload, NULL);
	if (!wait_for(unloading, 30000))
		bail("rmmu does not come to the point of taking its hooks out");
	pthread_create(&creator, NULL, create_vm, &kvm);
	ok(wait_for(creating, 30000), "a VM is being created while rmmu is being unloaded");
	must(write_file(PAUSE "first_go", "1") ? 0 : -1);
	ok(wait_for(unhooked, 60000), "the hooks are taken out");
	if (!ok(!wait_for(gone, 5000), "the module stays while a thread is to come back to it"))
		bail("the thread cannot go on: where it is to come back to is free memory");
	must(write_file(PAUSE "second_go", "1") ? 0 : -1);
	pthread_join(creator, NULL);
	pthread_join(unloader, NULL);
	ok(created >= 0, "the VM is created");
	ok(!unloaded && gone(), "and the module is gone");
	ok(said("VM declined") + said("VM stays") == declined, "nothing is said about the VM");
	close(created);
	close(kvm);
	must(load_module(argv[1], ""));
	ok(works() && read_field(STATS, "vms_owned_total", 0) == 1, "loaded again, rmmu serves a VM");
	return finish();
}

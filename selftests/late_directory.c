// SPDX-License-Identifier: GPL-2.0
/*
 * A guest with PAE whose page-directory pointers lead to memory that a slot backs only after they were loaded. With shadow
 * paging KVM has no root for such a directory. The guest has to get on, or KVM_RUN to fail; it must not fault for ever.
 * In-tree KVM warns and fails, so this is for VMs of rmmu.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "audit.h"
#include "host.h"
#include "tap.h"
#include "vm.h"

#define SLOT		1
#define DATA_SLOT	2
/* In the low slot: four pointers, and the directory that maps it. */
#define POINTERS	VM_SCRATCH_GPA
#define DIRECTORY	(VM_SCRATCH_GPA + PAGE_SIZE)
#define CODE		(VM_SCRATCH_GPA + 2 * PAGE_SIZE)
#define LATE_GPA	(2 * GIB)
#define DATA_GPA	(2 * GIB + 64 * MIB)
/* The first address that the late directory maps. */
#define ADDRESS		GIB
#define VALUE		4711
/* More faults than any way to get on takes. */
#define MANY_FAULTS	2000

#define P		1UL
#define ENTRY		0x67UL
#define LARGE_ENTRY	0xe7UL
#define CR0_WP_PG_PE	0x80010031UL
#define CR4_PAE		(1UL << 5)

/* A load of what ECX points to, and what it found is told. */
__asm__(".pushsection .rodata\n"
	".code32\n"
	"late_code: movl $0x3f0, %edx\n"
	"1: movl (%ecx), %eax\n"
	"outl %eax, %dx\n"
	"jmp 1b\n"
	"late_code_end:\n"
	".code64\n"
	".popsection");
extern char late_code[], late_code_end[];

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *directory, *data;
static pthread_t runner;
static _Atomic bool running;
static int faults_of;

static uint64_t faults(void)
{
	return kvm_stat_of(faults_of, "pf_taken");
}

static void nothing(int signal)
{
	(void)signal;
}

/* Ends KVM_RUN when there are faults without end. */
static void *watch(void *unused)
{
	uint64_t before = faults();

	while (running) {
		if (faults() - before > MANY_FAULTS) {
			vcpu->run->immediate_exit = 1;
			pthread_kill(runner, SIGUSR1);
		}
		usleep(1000);
	}
	return unused;
}

/* What the load found; -1 with errno when KVM_RUN failed, with EINTR after too many faults; -2 after another exit. */
static int64_t run(uint64_t address)
{
	struct kvm_regs regs;
	pthread_t watcher;
	int ret, error;

	must(ioctl(vcpu->fd, KVM_GET_REGS, &regs));
	regs.rcx = address;
	must(ioctl(vcpu->fd, KVM_SET_REGS, &regs));
	runner = pthread_self();
	running = true;
	if (pthread_create(&watcher, NULL, watch, NULL))
		bail("pthread_create failed");
	ret = vcpu_run(vcpu);
	error = errno;
	running = false;
	pthread_join(watcher, NULL);
	vcpu->run->immediate_exit = 0;
	errno = error;
	if (ret)
		return -1;
	if (vcpu->run->exit_reason != KVM_EXIT_IO)
		return -2;
	return *(uint32_t *)((uint8_t *)vcpu->run + vcpu->run->io.data_offset);
}

static struct kvm_segment segment(uint16_t selector, int type)
{
	return (struct kvm_segment) {
		.limit = ~0U, .selector = selector, .type = type, .present = 1, .s = 1, .g = 1, .db = 1,
	};
}

/* By KVM_SET_SREGS, as a MOV to CR3 would do it. */
static void load_pointers(void)
{
	struct kvm_sregs sregs;

	must(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs));
	sregs.cs = segment(8, 11);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(16, 3);
	sregs.cr0 = CR0_WP_PG_PE;
	sregs.cr3 = POINTERS;
	sregs.cr4 = CR4_PAE;
	sregs.efer = 0;
	must(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs));
}

static void begin(void)
{
	struct sigaction action = { .sa_handler = nothing };
	struct kvm_regs regs = { .rflags = 2, .rip = CODE };

	sigaction(SIGUSR1, &action, NULL);
	vm_create(&vm);
	directory = memory(HUGE_SIZE, false);
	data = memory(HUGE_SIZE, false);
	memset(directory, 0, PAGE_SIZE);
	((uint64_t *)directory)[0] = DATA_GPA | LARGE_ENTRY;
	*(uint32_t *)data = VALUE;
	must(vm_slot(&vm, DATA_SLOT, DATA_GPA, HUGE_SIZE, data, 0));
	memcpy(vm.low + CODE, late_code, late_code_end - late_code);
	((uint64_t *)(vm.low + POINTERS))[0] = DIRECTORY | P;
	((uint64_t *)(vm.low + POINTERS))[1] = LATE_GPA | P;
	for (uint64_t i = 0; i < VM_LOW_SIZE / HUGE_SIZE; i++)
		((uint64_t *)(vm.low + DIRECTORY))[i] = i * HUGE_SIZE | LARGE_ENTRY;
	*(uint32_t *)vm.shared = 1;
	vcpu = vm_vcpu(&vm, NULL, 0);
	load_pointers();
	must(ioctl(vcpu->fd, KVM_SET_REGS, &regs));
	faults_of = must(ioctl(vcpu->fd, KVM_GET_STATS_FD, 0));
	if (run(VM_SHARED_GPA) != 1)
		bail("the guest does not start: exit %u", vcpu->run->exit_reason);
}

static void end(void)
{
	audit("at the end");
	close(faults_of);
	vm_destroy(&vm);
	munmap(directory, HUGE_SIZE);
	munmap(data, HUGE_SIZE);
}

static void put_directory(uint64_t gpa, uint32_t flags)
{
	must(vm_slot(&vm, SLOT, gpa, PAGE_SIZE, directory, flags));
}

/* The guest loads from the address that the directory maps. */
static void check(const char *what)
{
	uint64_t before = faults(), taken;
	int64_t found = run(ADDRESS);
	int error = errno;

	taken = faults() - before;
	ok(found == VALUE, "%s is found", what);
	ok(taken <= MANY_FAULTS, "%s: %lu faults", what, taken);
	if (found != VALUE)
		note("exit %u, result %ld, error %d", vcpu->run->exit_reason, found, error);
}

int main(void)
{
	uint64_t before;
	int64_t found;

	/* Nested paging has no roots for a guest's directories, and its CPU cannot write to tables in a read-only slot. */
	if (kvm_paging() != SHADOW)
		skip_all("KVM does not shadow the guest's tables");
	plan(2 * 4 + 2);
	begin();
	put_directory(LATE_GPA, 0);
	check("a directory whose slot comes after the pointers were loaded");
	end();

	begin();
	put_directory(LATE_GPA, KVM_MEM_READONLY);
	check("a directory in a slot that is read-only");
	end();

	begin();
	put_directory(LATE_GPA + 64 * MIB * 2, 0);
	must(vm_slot(&vm, SLOT, LATE_GPA, PAGE_SIZE, directory, 0));
	check("a directory whose slot moves to where it is wanted");
	end();

	begin();
	put_directory(LATE_GPA, 0);
	load_pointers();
	must(vm_slot(&vm, SLOT, LATE_GPA, 0, directory, 0));
	run(VM_SHARED_GPA);
	put_directory(LATE_GPA, 0);
	check("a directory whose slot went and came");
	end();

	/* Without a slot the processor sees no table: a page fault, and without a handler that is a shutdown. */
	begin();
	before = faults();
	found = run(ADDRESS);
	ok(found < 0 && !(found == -1 && errno == EINTR), "without any slot KVM_RUN ends: exit %u",
	   vcpu->run->exit_reason);
	ok(faults() - before <= MANY_FAULTS, "without any slot: %lu faults", faults() - before);
	end();
	return finish();
}

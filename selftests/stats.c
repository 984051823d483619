// SPDX-License-Identifier: GPL-2.0
/*
 * KVM's own counters say the same of a VM of rmmu's as of one of in-tree KVM's that did the same.
 *
 * The same steps are done to one VM of each, in the same boot. After each step all counters of VM
 * and vCPUs, from the binary statistics, are compared by what the step added to them. No difference is
 * allowed, but in counters of what else happens on the machine. Everything is done several times: a
 * long walk of page tables that lets somebody else run flushes before it does, so that the number of
 * flushes is the least that was seen.
 */
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define OWN		"/sys/module/kvm_rmmu/parameters/own_new_vms"
#define RMMU_STATS	"/sys/kernel/debug/rmmu/stats"
#define MAX_COUNTERS	128
#define NAME_SIZE	48
#define MAX_STEPS	40
#define RUNS		3
#define FLUSHES		"remote_tlb_flush_requests"

/* Memory with small pages, and with huge ones. */
#define SMALL_GPA	VM_TEST_GPA
#define HUGE_GPA	(VM_TEST_GPA + 64 * MIB)
#define SIZE		(8 * MIB)
#define SMALL_SLOT	1
#define HUGE_SLOT	2
/* Where no slot is. */
#define NOWHERE_GPA	(VM_TEST_GPA + 256 * MIB)
#define MOVED_GPA	(VM_TEST_GPA + 128 * MIB)

/* Counters that what else the machine does counts in: they tell nothing about the MMU. */
static const struct {
	const char *name, *why;
} noise[] = {
	{ "exits", "the host's interrupts end a guest's time" },
	{ "irq_exits", "interrupts of the host" },
	{ "host_state_reload", "the host schedules" },
	{ "fpu_reload", "the host schedules" },
	{ "request_irq_exits", "interrupts of the host" },
	{ "signal_exits", "signals of the host" },
	{ "req_event", "follows what was interrupted" },
	{ "preemption_reported", "the host schedules" },
	{ "preemption_other", "the host schedules" },
	{ "blocking", "the host schedules" },
};

enum act { READ, WRITE, CALL };

struct order {
	uint64_t act, address, count, stride;
};

static guest_code void obey(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		uint64_t address = order->address;

		for (uint64_t i = 0; i < order->count; i++, address += order->stride) {
			if (order->act == READ)
				load(address);
			else if (order->act == WRITE)
				store(address, i + 1);
			else
				__asm__ volatile("call *%0" : : "r"(address) : "memory");
		}
		guest_sync(1);
	}
}

struct counters {
	int count;
	char names[MAX_COUNTERS][NAME_SIZE];
	int64_t values[MAX_COUNTERS];
};

struct record {
	const char *name;
	struct counters counters;
};

/* One run of all steps. */
struct run {
	bool is_rmmus;
	int steps;
	struct record records[MAX_STEPS];
};

static struct vm vm;
static struct vcpu *vcpu, *other;
static uint8_t *small, *huge;
static struct run *now;

static void read_counters(int fd, struct counters *counters)
{
	int stats = must(ioctl(fd, KVM_GET_STATS_FD, 0));
	struct kvm_stats_header header;
	struct kvm_stats_desc *desc;
	size_t size;

	must(pread(stats, &header, sizeof(header), 0));
	size = sizeof(*desc) + header.name_size;
	desc = malloc(size);
	for (uint32_t i = 0; i < header.num_desc; i++) {
		must(pread(stats, desc, size, header.desc_offset + i * size));
		/* Histograms are about times. */
		if (desc->size != 1)
			continue;
		if (counters->count == MAX_COUNTERS)
			bail("KVM has more counters than this test has room for");
		snprintf(counters->names[counters->count], NAME_SIZE, "%s", desc->name);
		must(pread(stats, &counters->values[counters->count++], 8, header.data_offset + desc->offset));
	}
	free(desc);
	close(stats);
}

static void end_step(const char *name)
{
	struct record *record = &now->records[now->steps++];

	if (now->steps > MAX_STEPS)
		bail("more steps than this test has room for");
	record->name = name;
	memset(&record->counters, 0, sizeof(record->counters));
	read_counters(vm.fd, &record->counters);
	read_counters(vcpu->fd, &record->counters);
	read_counters(other->fd, &record->counters);
}

static void order_of(struct vcpu *whom, enum act act, uint64_t address, uint64_t count, uint64_t stride)
{
	*(struct order *)vm.shared = (struct order){ act, address, count, stride };
	while (vcpu_run(whom) == 0 && whom->run->exit_reason == KVM_EXIT_MMIO)
		;
	if (!exit_is_sync(whom, 1))
		bail("exit %u where the guest was to be done: %m", whom->run->exit_reason);
}

static void guest(enum act act, uint64_t address, uint64_t count, uint64_t stride)
{
	order_of(vcpu, act, address, count, stride);
}

static void set_flags(int slot, uint32_t flags)
{
	if (slot == SMALL_SLOT)
		must(vm_slot(&vm, slot, SMALL_GPA, SIZE, small, flags));
	else
		must(vm_slot(&vm, slot, HUGE_GPA, SIZE, huge, flags));
}

static void harvest(int slot)
{
	uint64_t bits[SIZE / PAGE_SIZE / 64];
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = bits };

	must(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
}

static void create(void)
{
	small = memory(SIZE, false);
	huge = memory(SIZE, true);
	memset(huge, 0, SIZE);
	vm_create(&vm);
	set_flags(SMALL_SLOT, 0);
	set_flags(HUGE_SLOT, 0);
	vcpu = vm_vcpu(&vm, obey, VM_SHARED_GPA);
	other = vm_vcpu(&vm, obey, VM_SHARED_GPA);
	guest(READ, VM_SHARED_GPA, 1, 8);
	order_of(other, READ, VM_SHARED_GPA, 1, 8);
	end_step("the guest starts");
}

static void faults(void)
{
	guest(WRITE, SMALL_GPA, 256, PAGE_SIZE);
	end_step("stores to new small pages");
	guest(READ, SMALL_GPA + MIB, 256, PAGE_SIZE);
	end_step("loads from pages that nobody wrote");
	guest(WRITE, SMALL_GPA + MIB, 256, PAGE_SIZE);
	end_step("stores to them");
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	end_step("stores to what is mapped");
	order_of(other, WRITE, SMALL_GPA, 512, PAGE_SIZE);
	end_step("stores of another vCPU");
	guest(WRITE, HUGE_GPA, 2048, PAGE_SIZE);
	end_step("stores to huge pages");
}

static void mmio(void)
{
	guest(READ, NOWHERE_GPA, 4, PAGE_SIZE);
	end_step("loads where there is no memory");
	guest(WRITE, NOWHERE_GPA, 4, PAGE_SIZE);
	end_step("stores there");
	/* Any change of the slots makes what is known about these addresses stale. */
	must(vm_slot(&vm, 3, MOVED_GPA, PAGE_SIZE, small, 0));
	must(vm_slot(&vm, 3, 0, 0, NULL, 0));
	end_step("a slot comes and goes");
	guest(WRITE, NOWHERE_GPA, 4, PAGE_SIZE);
	end_step("stores where there is no memory, in a new generation");
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	guest(WRITE, HUGE_GPA, 2048, PAGE_SIZE);
	end_step("everything is mapped again");
}

static void log_dirty_pages(const char *eager)
{
	write_file(KVM_PARAMETERS "eager_page_split", eager);
	set_flags(SMALL_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	set_flags(HUGE_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	end_step(*eager == 'Y' ? "dirty logging begins, with splitting" : "dirty logging begins, without splitting");
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	guest(WRITE, HUGE_GPA, 1024, PAGE_SIZE);
	end_step("stores that are logged");
	harvest(SMALL_SLOT);
	harvest(HUGE_SLOT);
	end_step("the log is taken");
	guest(READ, HUGE_GPA, 1024, PAGE_SIZE);
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	guest(WRITE, HUGE_GPA, 2048, PAGE_SIZE);
	end_step("stores that are logged again");
	set_flags(SMALL_SLOT, 0);
	set_flags(HUGE_SLOT, 0);
	end_step("dirty logging ends");
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	guest(WRITE, HUGE_GPA, 2048, PAGE_SIZE);
	end_step("stores after it");
}

static void host_changes(void)
{
	must(madvise(small, 16 * PAGE_SIZE, MADV_DONTNEED));
	must(madvise(huge, HUGE_SIZE, MADV_DONTNEED));
	end_step("memory is discarded");
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	guest(WRITE, HUGE_GPA, 1024, PAGE_SIZE);
	end_step("stores to what was discarded");
	must(mprotect(small, MIB, PROT_READ));
	must(mprotect(small, MIB, PROT_READ | PROT_WRITE));
	guest(READ, SMALL_GPA, 256, PAGE_SIZE);
	guest(WRITE, SMALL_GPA, 256, PAGE_SIZE);
	end_step("memory was read-only for a moment");
	/* Nobody is to make a huge page of the rest again. */
	must(madvise(huge, SIZE, MADV_NOHUGEPAGE));
	must(madvise(huge + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED));
	guest(WRITE, HUGE_GPA, 512, PAGE_SIZE);
	end_step("a page is taken out of a huge page");
}

static void slots_change(void)
{
	must(vm_slot(&vm, SMALL_SLOT, MOVED_GPA, SIZE, small, 0));
	guest(WRITE, MOVED_GPA, 512, PAGE_SIZE);
	end_step("a slot is moved");
	must(vm_slot(&vm, SMALL_SLOT, 0, 0, NULL, 0));
	set_flags(SMALL_SLOT, KVM_MEM_READONLY);
	guest(READ, SMALL_GPA, 64, PAGE_SIZE);
	guest(WRITE, SMALL_GPA, 8, PAGE_SIZE);
	end_step("stores to a read-only slot");
	must(vm_slot(&vm, SMALL_SLOT, 0, 0, NULL, 0));
	set_flags(SMALL_SLOT, 0);
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	guest(WRITE, HUGE_GPA, 2048, PAGE_SIZE);
	end_step("and to one that is writable again");
	must(ioctl(vm.fd, KVM_SET_NR_MMU_PAGES, 64));
	guest(WRITE, SMALL_GPA, 512, PAGE_SIZE);
	end_step("the number of page tables is limited");
}

static void pre_fault(void)
{
	struct kvm_pre_fault_memory range = { .gpa = SMALL_GPA + 4 * MIB, .size = MIB };

	if (ioctl(vcpu->fd, KVM_PRE_FAULT_MEMORY, &range) && errno != EOPNOTSUPP)
		bail("KVM_PRE_FAULT_MEMORY: %m");
	end_step("memory is mapped in advance");
	guest(READ, SMALL_GPA + 4 * MIB, 256, PAGE_SIZE);
	guest(WRITE, SMALL_GPA + 4 * MIB, 256, PAGE_SIZE);
	end_step("loads and stores to it");
}

static void execute(void)
{
	char before[8] = "";

	read_word(KVM_PARAMETERS "nx_huge_pages", before, sizeof(before));
	if (!write_file(KVM_PARAMETERS "nx_huge_pages", "Y"))
		bail("kvm.ko does not let nx_huge_pages be set");
	end_step("huge pages are not executable any more");
	guest(WRITE, HUGE_GPA, 2048, PAGE_SIZE);
	end_step("stores to huge pages that are not executable");
	/* A "ret" at the start of each page. */
	for (int page = 0; page < 1024; page++)
		huge[page * PAGE_SIZE] = 0xc3;
	guest(CALL, HUGE_GPA, 512, PAGE_SIZE);
	guest(CALL, HUGE_GPA + HUGE_SIZE, 1, PAGE_SIZE);
	end_step("the guest executes in huge pages");
	set_flags(HUGE_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	set_flags(HUGE_SLOT, 0);
	end_step("dirty logging begins and ends there");
	write_file(KVM_PARAMETERS "nx_huge_pages", before);
	guest(CALL, HUGE_GPA, 512, PAGE_SIZE);
	end_step("huge pages are executable again");
}

static unsigned long debugfs_file_differs(const char *name, int64_t value)
{
	char path[160];

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/%s", getpid(), vm.fd, name);
	if (!access(path, R_OK) && (int64_t)read_number(path) == value)
		return 0;
	note("%s is %lu, and %ld in the binary statistics", path, read_number(path), value);
	return 1;
}

/* The files of debugfs show the same counters, of vCPUs as a sum. Nothing runs meanwhile. */
static unsigned long debugfs_differs(void)
{
	struct counters of_vm = { 0 }, of_vcpu = { 0 }, of_other = { 0 };
	unsigned long differs = 0;

	read_counters(vm.fd, &of_vm);
	read_counters(vcpu->fd, &of_vcpu);
	read_counters(other->fd, &of_other);
	for (int i = 0; i < of_vm.count; i++)
		differs += debugfs_file_differs(of_vm.names[i], of_vm.values[i]);
	for (int i = 0; i < of_vcpu.count; i++)
		differs += debugfs_file_differs(of_vcpu.names[i], of_vcpu.values[i] + of_other.values[i]);
	return differs;
}

static unsigned long all_steps(struct run *run, const char *own)
{
	uint64_t owned = read_field(RMMU_STATS, "vms_owned", 0);
	unsigned long differs;

	if (!write_file(OWN, own))
		bail("%s: %m", OWN);
	now = run;
	create();
	run->is_rmmus = read_field(RMMU_STATS, "vms_owned", 0) != owned;
	faults();
	mmio();
	log_dirty_pages("Y");
	log_dirty_pages("N");
	host_changes();
	slots_change();
	pre_fault();
	execute();
	differs = debugfs_differs();
	must(vm_slot(&vm, SMALL_SLOT, 0, 0, NULL, 0));
	must(vm_slot(&vm, HUGE_SLOT, 0, 0, NULL, 0));
	must(vm_slot(&vm, VM_LOW_SLOT, 0, 0, NULL, 0));
	end_step("all slots are gone");
	vm_destroy(&vm);
	munmap(small, SIZE);
	munmap(huge, SIZE);
	return differs;
}

static bool is_noise(const char *counter)
{
	for (size_t i = 0; i < sizeof(noise) / sizeof(noise[0]); i++)
		if (!strcmp(counter, noise[i].name))
			return true;
	/* Polling for a halted vCPU; no vCPU halts here. */
	return !strncmp(counter, "halt_", 5);
}

/* What the step added to the counter. */
static int64_t added(const struct run *run, int step, int counter)
{
	int64_t before = step ? run->records[step - 1].counters.values[counter] : 0;

	return run->records[step].counters.values[counter] - before;
}

/* What a step added at least. */
static int64_t least(const struct run *runs, int step, int counter)
{
	int64_t least = added(&runs[0], step, counter);

	for (int i = 1; i < RUNS; i++)
		if (added(&runs[i], step, counter) < least)
			least = added(&runs[i], step, counter);
	return least;
}

static bool equal(const struct record *record, int counter, const char *who, int64_t got, int64_t wanted)
{
	if (got != wanted)
		note("%s: %s: in-tree %+ld, %s %+ld", record->name, record->counters.names[counter], wanted, who, got);
	return got == wanted;
}

static int64_t added_to(const struct run *run, int step, const char *name)
{
	const struct counters *counters = &run->records[step].counters;

	for (int i = 0; i < counters->count; i++)
		if (!strcmp(counters->names[i], name))
			return added(run, step, i);
	bail("KVM has no counter %s", name);
}

/*
 * When the host breaks a copy-on-write for a fault, in-tree KVM sends the vCPU back into the guest, which faults again. rmmu
 * maps the new page at once. So of the faults that came to nothing on in-tree KVM rmmu takes all or none.
 */
static bool fewer_retries(const struct run *in_tree, const struct run *rmmu, int step)
{
	static const char *const results[] = { "pf_fixed", "pf_spurious", "pf_emulate" };
	int64_t served = 0;

	for (unsigned int i = 0; i < sizeof(results) / sizeof(*results); i++)
		served += added_to(in_tree, step, results[i]);
	for (int i = 0; i < RUNS; i++)
		if (added_to(&rmmu[i], step, "pf_taken") != served)
			return false;
	return true;
}

static bool same(const struct run *in_tree, const struct run *rmmu, int step, int counter)
{
	const struct record *record = &in_tree->records[step];
	int64_t wanted = added(in_tree, step, counter);
	bool same = true;

	if (!strcmp(record->counters.names[counter], FLUSHES))
		return equal(record, counter, "rmmu", least(rmmu, step, counter), least(in_tree, step, counter));
	if (!strcmp(record->counters.names[counter], "pf_taken") && fewer_retries(in_tree, rmmu, step))
		return true;
	for (int i = 0; i < RUNS && same; i++)
		same = equal(record, counter, "in-tree again", added(&in_tree[i], step, counter), wanted) &&
		       equal(record, counter, "rmmu", added(&rmmu[i], step, counter), wanted);
	return same;
}

static void compare(const struct run *in_tree, const struct run *rmmu, int step)
{
	const struct counters *counters = &in_tree->records[step].counters;
	int differs = 0;

	for (int i = 0; i < counters->count; i++)
		differs += !is_noise(counters->names[i]) && !same(in_tree, rmmu, step, i);
	ok(!differs, "%s: the counters are the same", in_tree->records[step].name);
	for (int i = 0; i < counters->count; i++)
		if (added(in_tree, step, i) && !is_noise(counters->names[i]))
			note("    %s %+ld", counters->names[i], added(in_tree, step, i));
}

int main(void)
{
	static struct run in_tree[RUNS], rmmu[RUNS];
	char own[8] = "Y", eager_split[8] = "Y", around[16] = "65536";
	unsigned long in_debugfs = 0;
	bool owned = true;
	struct sched_param first = { .sched_priority = 1 };
	cpu_set_t cpus;

	if (access(OWN, W_OK))
		skip_all("kvm_rmmu is not loaded");
	/* A vCPU that changes the CPU flushes, and so does a walk that is to let somebody else run. */
	CPU_ZERO(&cpus);
	CPU_SET(sched_getcpu(), &cpus);
	must(sched_setaffinity(0, sizeof(cpus), &cpus));
	must(sched_setscheduler(0, SCHED_FIFO, &first));
	read_word(OWN, own, sizeof(own));
	read_word(KVM_PARAMETERS "eager_page_split", eager_split, sizeof(eager_split));
	read_word(FAULT_AROUND, around, sizeof(around));
	write_file(FAULT_AROUND, "4096");
	for (int i = 0; i < RUNS; i++) {
		in_debugfs += all_steps(&in_tree[i], "0");
		in_debugfs += all_steps(&rmmu[i], "1");
		owned = owned && !in_tree[i].is_rmmus && rmmu[i].is_rmmus;
	}
	write_file(OWN, own);
	write_file(FAULT_AROUND, around);
	write_file(KVM_PARAMETERS "eager_page_split", eager_split);
	plan(in_tree->steps + 2);
	ok(owned, "one VM is in-tree KVM's, the other is rmmu's");
	for (int step = 0; step < in_tree->steps; step++)
		compare(in_tree, rmmu, step);
	ok(!in_debugfs, "the files of debugfs show what the binary statistics do");
	return finish();
}

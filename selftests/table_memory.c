// SPDX-License-Identifier: GPL-2.0
/*
 * The page tables of a VM of rmmu's that has 1 GiB mapped by 4 KiB pages take no more memory than
 * those of the same VM on in-tree KVM. Both figures are printed.
 */
#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define OWN		"/sys/module/kvm_rmmu/parameters/own_new_vms"
#define RMMU_STATS	"/sys/kernel/debug/rmmu/stats"
/* Of the headers that KVM keeps for page tables. */
#define HEADERS		"/sys/kernel/slab/kvm_mmu_page_header/"
#define SIZE		GIB
/* Free objects that each CPU keeps for itself count as used. */
#define HEADERS_SLACK	130

struct usage {
	uint64_t tables_kib, headers;
	uint64_t mapped;
	bool is_rmmus;
};

static guest_code void nothing(uint64_t unused)
{
	(void)unused;
	guest_sync(1);
}

static struct usage usage(void)
{
	struct usage now = { 0 };

	/* The counters of each CPU go into the machine's, and free objects back to the machine. */
	write_file("/proc/sys/vm/stat_refresh", "1");
	write_file(HEADERS "shrink", "1");
	now.tables_kib = read_field("/proc/meminfo", "SecPageTables", 0);
	now.headers = read_number(HEADERS "objects");
	return now;
}

/* Every page, without the guest: memory that nobody wrote is one and the same page in the host. */
static void map_all(struct vcpu *vcpu)
{
	struct kvm_pre_fault_memory range = { .gpa = VM_TEST_GPA, .size = SIZE };

	while (range.size)
		if (ioctl(vcpu->fd, KVM_PRE_FAULT_MEMORY, &range) && errno != EINTR && errno != EAGAIN)
			bail("KVM_PRE_FAULT_MEMORY at 0x%llx: %m", range.gpa);
}

static bool can_pre_fault(void)
{
	struct vm vm;
	bool can;

	vm_create(&vm);
	can = vm_cap(&vm, KVM_CAP_PRE_FAULT_MEMORY) > 0;
	vm_destroy(&vm);
	return can;
}

static struct usage measure(const char *own)
{
	uint64_t owned = read_field(RMMU_STATS, "vms_owned", 0);
	struct usage before = usage(), after;
	void *base = memory(SIZE, false);
	struct vcpu *vcpu;
	struct vm vm;

	if (!write_file(OWN, own))
		bail("%s: %m", OWN);
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	vcpu = vm_vcpu(&vm, nothing, 0);
	vcpu_run_to_sync(vcpu);
	map_all(vcpu);
	after = usage();
	after.tables_kib -= before.tables_kib;
	after.headers -= before.headers;
	after.mapped = kvm_stat(vm.fd, "pages_4k");
	after.is_rmmus = read_field(RMMU_STATS, "vms_owned", 0) != owned;
	vm_destroy(&vm);
	munmap(base, SIZE);
	/* Tables are freed after an RCU grace period. */
	for (uint64_t end = now_ms() + 10000; usage().tables_kib > before.tables_kib && now_ms() < end;)
		usleep(20000);
	ok(usage().tables_kib <= before.tables_kib, "%s: all of it is given back", *own == '1' ? "rmmu" : "in-tree");
	return after;
}

static void tell(const char *who, const struct usage *usage, uint64_t header_size)
{
	note("%s: %lu KiB of page tables, %lu headers of %lu bytes, for %lu pages", who, usage->tables_kib,
	     usage->headers, header_size, usage->mapped);
}

int main(void)
{
	uint64_t header_size = read_number(HEADERS "slab_size");
	struct usage in_tree, rmmu;
	char own[8] = "Y";

	if (access(OWN, W_OK))
		skip_all("kvm_rmmu is not loaded");
	if (!header_size)
		bail("%s is not there", HEADERS);
	if (!can_pre_fault())
		skip_all("KVM cannot pre-fault with shadow paging");
	plan(6);
	read_word(OWN, own, sizeof(own));
	in_tree = measure("0");
	rmmu = measure("1");
	write_file(OWN, own);
	tell("in-tree", &in_tree, header_size);
	tell("rmmu", &rmmu, header_size);
	ok(!in_tree.is_rmmus && rmmu.is_rmmus, "one VM is in-tree KVM's, the other is rmmu's");
	ok(in_tree.mapped >= SIZE / PAGE_SIZE && rmmu.mapped >= SIZE / PAGE_SIZE, "both have everything mapped");
	ok(rmmu.tables_kib && rmmu.tables_kib <= in_tree.tables_kib, "rmmu's page tables take no more memory (%lu KiB, %lu KiB)",
	   rmmu.tables_kib, in_tree.tables_kib);
	ok(rmmu.headers <= in_tree.headers + HEADERS_SLACK, "nor do their headers (%lu, %lu)", rmmu.headers, in_tree.headers);
	return finish();
}

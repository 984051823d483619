// SPDX-License-Identifier: GPL-2.0
/*
 * The kernel learns which pages a guest uses, and no others: a page is idle until the guest reads or writes it, be it mapped
 * already or not, and what is mapped along with its neighbours stays idle.
 */
#include <string.h>
#include <sys/mman.h>

#include "idle.h"
#include "vm.h"

#define PAGES	512UL
#define SIZE	(PAGES * PAGE_SIZE)

/* On the shared page: the guest uses every `step`th page from `first` on. */
struct order {
	uint64_t first, step, write;
};

static guest_code void use(uint64_t shared)
{
	volatile struct order *order = (void *)shared;

	for (;;) {
		for (uint64_t page = order->first; page < PAGES; page += order->step) {
			if (order->write)
				store(VM_TEST_GPA + page * PAGE_SIZE, page);
			else
				load(VM_TEST_GPA + page * PAGE_SIZE);
		}
		guest_sync(1);
	}
}

static struct vm vm;
static struct vcpu *vcpu;
static uint8_t *base;

static void guest_uses(uint64_t first, uint64_t step, uint64_t write)
{
	*(struct order *)vm.shared = (struct order){ first, step, write };
	vcpu_run_to_sync(vcpu);
}

/* Marks all pages idle, lets the guest use some, and counts those about which the kernel is wrong. */
static uint64_t wrong_about(uint64_t first, uint64_t step, uint64_t write)
{
	uint64_t wrong = 0;

	idle_mark(&vm, base, PAGES);
	guest_uses(first, step, write);
	for (uint64_t page = 0; page < PAGES; page++)
		wrong += idle(base + page * PAGE_SIZE) == (page >= first && (page - first) % step == 0);
	return wrong;
}

static void begin(void)
{
	base = memory(SIZE, false);
	memset(base, 0x11, SIZE);
	vm_create(&vm);
	vm_enable(&vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	vcpu = vm_vcpu(&vm, use, VM_SHARED_GPA);
}

static void end(void)
{
	vm_destroy(&vm);
	munmap(base, SIZE);
}

int main(void)
{
	uint64_t wrong, mapped;

	if (!idle_available())
		skip_all("the kernel has no idle page tracking");
	plan(6);
	begin();
	wrong = wrong_about(5, 16, 0);
	ok(wrong == 0, "memory that is new to the guest: pages that it reads are used, and no others (%lu wrong)", wrong);
	end();
	begin();
	guest_uses(0, 1, 1);
	mapped = kvm_stat(vm.fd, "pages_4k");
	wrong = wrong_about(1, 2, 0);
	ok(wrong == 0, "memory that is mapped: pages that it reads are used, and no others (%lu wrong)", wrong);
	wrong = wrong_about(0, 3, 1);
	ok(wrong == 0, "pages that it writes are used, and no others (%lu wrong)", wrong);
	ok(kvm_stat(vm.fd, "pages_4k") == mapped, "nothing was unmapped for that");
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, KVM_MEM_LOG_DIRTY_PAGES));
	wrong = wrong_about(0, 7, 1);
	ok(wrong == 0, "the same while the slot is logged (%lu wrong)", wrong);
	wrong = wrong_about(3, 5, 0);
	ok(wrong == 0, "and for reads (%lu wrong)", wrong);
	end();
	return finish();
}

// SPDX-License-Identifier: GPL-2.0
/*
 * What a guest sees of its memory slots: made, moved, deleted, read-only, made again,
 * with and without dirty logging, and one piece of host memory in two slots.
 */
#include <string.h>

#include "vm.h"

#define SIZE	(8 * MIB)
#define PAGES	(SIZE / PAGE_SIZE)
#define ELSEWHERE (VM_TEST_GPA + 512 * MIB)

/* What the host asks of the guest, in the shared page. */
struct request {
	uint64_t write, address, value;
};

/* One access each time the host runs the vCPU; the loaded value comes back. */
static guest_code void obey(uint64_t shared)
{
	volatile struct request *request = (void *)shared;

	for (;;) {
		if (request->write)
			store(request->address, request->value);
		else
			request->value = load(request->address);
		guest_sync(1);
	}
}

static guest_code void sum_pages(uint64_t shared)
{
	volatile struct request *request = (void *)shared;

	for (;;) {
		uint64_t sum = 0;

		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
			sum += load(request->address + at);
		request->value = sum;
		guest_sync(1);
	}
}

static struct vm vm;
static struct vcpu *worker, *summer;
static uint8_t *base;

static uint64_t guest_load(uint64_t gpa)
{
	struct request *request = vm.shared;

	*request = (struct request){ .address = gpa };
	vcpu_run_to_sync(worker);
	return request->value;
}

static void guest_store(uint64_t gpa, uint64_t value)
{
	*(struct request *)vm.shared = (struct request){ 1, gpa, value };
	vcpu_run_to_sync(worker);
}

static uint64_t guest_sum(uint64_t gpa)
{
	struct request *request = vm.shared;

	request->address = gpa;
	vcpu_run_to_sync(summer);
	return request->value;
}

/* The access leaves the guest as MMIO; the host answers a read with `answer`. */
static bool is_mmio(uint64_t gpa, bool write, uint64_t answer)
{
	struct request *request = vm.shared;
	bool was_mmio;

	*request = (struct request){ write, gpa, 0x55 };
	if (vcpu_run(worker))
		bail("KVM_RUN: %m");
	was_mmio = exit_is_mmio(worker, gpa, write);
	if (!was_mmio)
		return false;
	memcpy(worker->run->mmio.data, &answer, sizeof(answer));
	vcpu_run_to_sync(worker);
	return write || request->value == answer;
}

static uint64_t fill(uint64_t seed)
{
	uint64_t sum = 0;

	for (uint64_t page = 0; page < PAGES; page++) {
		*(uint64_t *)(base + page * PAGE_SIZE) = seed * 1000003 + page;
		sum += seed * 1000003 + page;
	}
	return sum;
}

static void slot(uint64_t gpa, uint64_t size, uint32_t flags)
{
	must(vm_slot(&vm, 1, gpa, size, base, flags));
}

static void check_life_of_a_slot(void)
{
	uint64_t sum = fill(1);

	ok(is_mmio(VM_TEST_GPA, false, 0x1234), "before there is a slot its addresses are MMIO");
	slot(VM_TEST_GPA, SIZE, 0);
	ok(guest_sum(VM_TEST_GPA) == sum, "a new slot shows the host's memory");
	guest_store(VM_TEST_GPA + 8, 77);
	ok(*(uint64_t *)(base + 8) == 77, "a store into it arrives");
	slot(ELSEWHERE, SIZE, 0);
	ok(guest_sum(ELSEWHERE) == sum && guest_load(ELSEWHERE + 8) == 77, "a moved slot keeps its contents");
	ok(is_mmio(VM_TEST_GPA, false, 0x4321) && is_mmio(VM_TEST_GPA + SIZE - PAGE_SIZE, true, 0),
	   "where it was is MMIO again");
	slot(ELSEWHERE, 0, 0);
	ok(is_mmio(ELSEWHERE, false, 1) && is_mmio(ELSEWHERE + SIZE - 8, true, 0), "a deleted slot is MMIO");
	slot(ELSEWHERE, SIZE, 0);
	ok(guest_sum(ELSEWHERE) == sum, "made again it shows the same memory");
	slot(ELSEWHERE, 0, 0);
}

static void check_read_only(void)
{
	uint64_t sum = fill(2);

	slot(VM_TEST_GPA, SIZE, KVM_MEM_READONLY);
	ok(guest_sum(VM_TEST_GPA) == sum, "a read-only slot can be read");
	ok(is_mmio(VM_TEST_GPA + PAGE_SIZE, true, 0), "a store into a read-only slot is MMIO");
	ok(guest_sum(VM_TEST_GPA) == sum && fill(2) == sum, "and changes nothing");
	slot(VM_TEST_GPA, 0, 0);
	slot(VM_TEST_GPA, SIZE, 0);
	guest_store(VM_TEST_GPA + PAGE_SIZE, 5);
	ok(*(uint64_t *)(base + PAGE_SIZE) == 5, "made again writable it can be written");
	slot(VM_TEST_GPA, 0, 0);
}

static bool logging_holds_contents(int rounds)
{
	for (int round = 0; round < rounds; round++) {
		uint64_t sum = fill(10 + round);

		slot(VM_TEST_GPA, SIZE, round & 1 ? 0 : KVM_MEM_LOG_DIRTY_PAGES);
		if (guest_sum(VM_TEST_GPA) != sum)
			return false;
		guest_store(VM_TEST_GPA + round * PAGE_SIZE + 16, round);
		if (*(uint64_t *)(base + round * PAGE_SIZE + 16) != (uint64_t)round)
			return false;
	}
	return true;
}

static void check_logging_flag(void)
{
	slot(VM_TEST_GPA, SIZE, 0);
	ok(logging_holds_contents(20), "dirty logging on and off 20 times: contents and stores stay right");
	slot(VM_TEST_GPA, 0, 0);
}

static void check_alias(void)
{
	uint64_t sum = fill(3);

	slot(VM_TEST_GPA, SIZE, 0);
	must(vm_slot(&vm, 2, ELSEWHERE, SIZE, base, 0));
	guest_store(VM_TEST_GPA + 24, 99);
	ok(guest_load(ELSEWHERE + 24) == 99 && guest_sum(ELSEWHERE) == sum,
	   "two slots over one piece of host memory agree");
	must(vm_slot(&vm, 2, 0, 0, NULL, 0));
	ok(guest_sum(VM_TEST_GPA) == sum && is_mmio(ELSEWHERE, false, 3), "deleting one leaves the other");
	slot(VM_TEST_GPA, 0, 0);
}

static void check_many(void)
{
	bool right = true;

	for (int i = 0; i < 50 && right; i++) {
		uint64_t gpa = VM_TEST_GPA + (i % 7) * 16 * MIB;
		uint64_t sum = fill(i);

		slot(gpa, SIZE, 0);
		right = guest_sum(gpa) == sum;
		slot(gpa, 0, 0);
		right = right && is_mmio(gpa, false, i);
	}
	ok(right, "50 times made, read and deleted at different places");
}

int main(void)
{
	plan(15);
	base = memory(SIZE, false);
	vm_create(&vm);
	worker = vm_vcpu(&vm, obey, VM_SHARED_GPA);
	summer = vm_vcpu(&vm, sum_pages, VM_SHARED_GPA);
	check_life_of_a_slot();
	check_read_only();
	check_logging_flag();
	check_alias();
	check_many();
	vm_destroy(&vm);
	return finish();
}

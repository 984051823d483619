// SPDX-License-Identifier: GPL-2.0
/*
 * No test but a helper of tests: a VM that is used and then kept until standard input ends.
 * Prints "ready" when it is there, and at the end whether it still works.
 */
#include <stdio.h>
#include <unistd.h>

#include "vm.h"

#define SIZE (2 * MIB)

static guest_code void add_up(uint64_t gpa)
{
	for (;;) {
		for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
			store(gpa + at, load(gpa + at) + 1);
		guest_sync(1);
	}
}

int main(void)
{
	uint8_t *base = memory(SIZE, false);
	struct vcpu *vcpu;
	struct vm vm;
	char byte;

	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	vcpu = vm_vcpu(&vm, add_up, VM_TEST_GPA);
	vcpu_run_to_sync(vcpu);
	puts("ready");
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	vcpu_run_to_sync(vcpu);
	for (uint64_t at = 0; at < SIZE; at += PAGE_SIZE)
		if (*(uint64_t *)(base + at) != 2)
			bail("the guest's memory is wrong at 0x%lx", at);
	puts("works");
	vm_destroy(&vm);
	return 0;
}

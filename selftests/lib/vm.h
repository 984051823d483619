/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A small virtual machine for tests, straight on the KVM ioctls.
 *
 * The guest starts in 64-bit mode with gpa == gva for the first 4 GiB, its page tables and
 * stacks in a 4 MiB slot at 0 (slot number VM_LOW_SLOT). Guest code is C in this very program: functions
 * marked `guest_code` are copied, all together, into the low slot. They may call each
 * other and use their argument, a guest physical address; they reach no other data.
 */
#ifndef RMMU_VM_H
#define RMMU_VM_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tap.h"

#define PAGE_SIZE	4096UL
#define HUGE_SIZE	(2UL << 20)
#define MIB		(1UL << 20)
#define GIB		(1UL << 30)

#define VM_LOW_SLOT	31
#define VM_LOW_SIZE	(4 * MIB)
/* Where tests put their memory: inside the identity map, away from everything else. */
#define VM_TEST_GPA	GIB
/* A page of the low slot for arguments and results; the host sees it as vm->shared. */
#define VM_SHARED_GPA	0x300000UL
/* The rest of the low slot is the test's, too. The host sees it at vm->low + VM_SCRATCH_GPA. */
#define VM_SCRATCH_GPA	0x310000UL
#define VM_SCRATCH_SIZE	(VM_LOW_SIZE - VM_SCRATCH_GPA)
#define VM_MAX_VCPUS	8

struct vcpu {
	struct vm *vm;
	int fd, id;
	struct kvm_run *run;
	size_t run_size;
};

struct vm {
	int kvm, fd, nr_vcpus;
	uint8_t *low;
	void *shared;
	struct vcpu vcpus[VM_MAX_VCPUS];
};

void vm_create(struct vm *vm);
void vm_destroy(struct vm *vm);
/* 0, or -1 with errno. Size 0 deletes. */
int vm_slot(struct vm *vm, int slot, uint64_t gpa, uint64_t size, void *hva, uint32_t flags);
struct vcpu *vm_vcpu(struct vm *vm, void (*code)(uint64_t), uint64_t argument);
/* Where the guest has a function that is marked `guest_code`. */
uint64_t vm_code(void (*code)(uint64_t));
/* A binary statistic of the VM or vCPU, by name; bails out when there is none. */
uint64_t kvm_stat(int fd, const char *name);
/* The same, by the file that KVM_GET_STATS_FD has made, which processes other than the VM's may read. */
uint64_t kvm_stat_of(int stats, const char *name);
int vm_cap(struct vm *vm, int cap);
/* KVM_ENABLE_CAP with its first argument; bails out when KVM refuses. */
void vm_enable(struct vm *vm, int cap, uint64_t argument);

/* KVM_RUN until an exit that is the test's business; -1 with errno when it fails. */
int vcpu_run(struct vcpu *vcpu);
/* Run up to the guest's next guest_sync() and check that it is one; returns its value. */
uint32_t vcpu_run_to_sync(struct vcpu *vcpu);
/* Whether the last exit was an access to memory that no slot backs. */
bool exit_is_mmio(struct vcpu *vcpu, uint64_t gpa, bool write);
bool exit_is_sync(struct vcpu *vcpu, uint32_t value);

/* Anonymous memory, aligned to 2 MiB; with or without transparent huge pages. */
void *memory(size_t size, bool huge);
/* Milliseconds of the monotonic clock. */
uint64_t now_ms(void);
/* The time in so many milliseconds; later on a kernel that is slow. For waits that end as soon as they can. */
uint64_t deadline_ms(unsigned int ms);
void spin_us(unsigned int us);

#define SYNC_PORT 0x3f0

#define guest_code \
	__attribute__((section("guest"), noinline, used, target("general-regs-only")))
#define guest_inline static inline __attribute__((always_inline, target("general-regs-only")))

/* Leave the guest, with a number for the host to see. */
guest_inline void guest_sync(uint32_t value)
{
	__asm__ volatile("outl %0, %w1" : : "a"(value), "Nd"(SYNC_PORT) : "memory");
}

guest_inline uint64_t load(uint64_t address)
{
	return *(volatile uint64_t *)address;
}

guest_inline void store(uint64_t address, uint64_t value)
{
	*(volatile uint64_t *)address = value;
}

/* The next number of a generator that guest and host share; the state is never 0. */
guest_inline uint64_t next_random(uint64_t *state)
{
	uint64_t bits = *state;

	bits ^= bits << 13;
	bits ^= bits >> 7;
	bits ^= bits << 17;
	*state = bits;
	return bits * 0x9e3779b97f4a7c15UL >> 8;
}

/* Forget translations, as MOV to CR3 does. */
guest_inline void guest_flush(void)
{
	uint64_t cr3;

	__asm__ volatile("mov %%cr3, %0; mov %0, %%cr3" : "=r"(cr3) : : "memory");
}

guest_inline void guest_pause(void)
{
	__asm__ volatile("pause" : : : "memory");
}

#endif

// SPDX-License-Identifier: GPL-2.0
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "vm.h"

/* The low slot, by guest physical address. The stacks grow down from VM_SHARED_GPA. */
#define PML4_GPA	0x1000UL
#define PDPT_GPA	0x2000UL
#define PD_GPA		0x3000UL
#define GDT_GPA		0x8000UL
#define CODE_GPA	0x100000UL
#define STACK_TOP	(VM_SHARED_GPA - 0x1000)
#define STACK_SIZE	0x8000UL

#define PTE_TABLE	0x7UL
#define PTE_LARGE	0x87UL

#define CR0_PE		(1UL << 0)
#define CR0_MP		(1UL << 1)
#define CR0_NE		(1UL << 5)
#define CR0_WP		(1UL << 16)
#define CR0_PG		(1UL << 31)
#define CR4_PAE		(1UL << 5)
#define EFER_LME	(1UL << 8)
#define EFER_LMA	(1UL << 10)
#define EFER_NX		(1UL << 11)

extern char __start_guest[] __attribute__((weak)), __stop_guest[] __attribute__((weak));

static void identity_map(struct vm *vm)
{
	uint64_t *pml4 = (void *)(vm->low + PML4_GPA);
	uint64_t *pdpt = (void *)(vm->low + PDPT_GPA);
	uint64_t *pd = (void *)(vm->low + PD_GPA);

	pml4[0] = PDPT_GPA | PTE_TABLE;
	for (uint64_t i = 0; i < 4; i++)
		pdpt[i] = (PD_GPA + i * PAGE_SIZE) | PTE_TABLE;
	for (uint64_t i = 0; i < 4 * 512; i++)
		pd[i] = i * HUGE_SIZE | PTE_LARGE;
}

void vm_create(struct vm *vm)
{
	memset(vm, 0, sizeof(*vm));
	vm->kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC));
	vm->fd = must(ioctl(vm->kvm, KVM_CREATE_VM, 0));
	must(ioctl(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000));
	vm->low = memory(VM_LOW_SIZE, false);
	vm->shared = vm->low + VM_SHARED_GPA;
	must(vm_slot(vm, VM_LOW_SLOT, 0, VM_LOW_SIZE, vm->low, 0));
	identity_map(vm);
	memcpy(vm->low + CODE_GPA, __start_guest, __stop_guest - __start_guest);
}

void vm_destroy(struct vm *vm)
{
	for (int i = 0; i < vm->nr_vcpus; i++) {
		munmap(vm->vcpus[i].run, vm->vcpus[i].run_size);
		close(vm->vcpus[i].fd);
	}
	close(vm->fd);
	close(vm->kvm);
	munmap(vm->low, VM_LOW_SIZE);
}

int vm_slot(struct vm *vm, int slot, uint64_t gpa, uint64_t size, void *hva, uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)hva,
	};

	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
}

int vm_cap(struct vm *vm, int cap)
{
	return ioctl(vm->fd, KVM_CHECK_EXTENSION, cap);
}

void vm_enable(struct vm *vm, int cap, uint64_t argument)
{
	struct kvm_enable_cap enable = { .cap = cap, .args[0] = argument };

	must(ioctl(vm->fd, KVM_ENABLE_CAP, &enable));
}

static void set_cpuid(struct vcpu *vcpu)
{
	size_t entries = 128;
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + entries * sizeof(cpuid->entries[0]));

	cpuid->nent = entries;
	must(ioctl(vcpu->vm->kvm, KVM_GET_SUPPORTED_CPUID, cpuid));
	must(ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid));
	free(cpuid);
}

static void enter_long_mode(struct vcpu *vcpu)
{
	struct kvm_segment code = {
		.base = 0, .limit = ~0U, .selector = 8, .type = 11,
		.present = 1, .s = 1, .l = 1, .g = 1,
	};
	struct kvm_segment data = code;
	struct kvm_sregs sregs;
	uint64_t *gdt = (void *)(vcpu->vm->low + GDT_GPA);

	gdt[1] = 0x00af9b000000ffffUL;
	gdt[2] = 0x00cf93000000ffffUL;
	data.selector = 16;
	data.type = 3;
	data.l = 0;
	data.db = 1;
	must(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs));
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.gdt.base = GDT_GPA;
	sregs.gdt.limit = 3 * 8 - 1;
	sregs.cr0 = CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG;
	sregs.cr3 = PML4_GPA;
	sregs.cr4 = CR4_PAE;
	sregs.efer = EFER_LME | EFER_LMA | EFER_NX;
	must(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs));
}

uint64_t vm_code(void (*code)(uint64_t))
{
	return CODE_GPA + ((char *)code - __start_guest);
}

struct vcpu *vm_vcpu(struct vm *vm, void (*code)(uint64_t), uint64_t argument)
{
	struct vcpu *vcpu = &vm->vcpus[vm->nr_vcpus];
	struct kvm_regs regs = { .rflags = 2 };

	if (vm->nr_vcpus == VM_MAX_VCPUS)
		bail("too many vCPUs");
	vcpu->vm = vm;
	vcpu->id = vm->nr_vcpus++;
	vcpu->fd = must(ioctl(vm->fd, KVM_CREATE_VCPU, vcpu->id));
	vcpu->run_size = must(ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	vcpu->run = mmap(NULL, vcpu->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		bail("mmap of a vCPU: %m");
	set_cpuid(vcpu);
	enter_long_mode(vcpu);
	regs.rip = vm_code(code);
	regs.rdi = argument;
	/* As after a call: 8 below a multiple of 16. */
	regs.rsp = STACK_TOP - vcpu->id * STACK_SIZE - 8;
	must(ioctl(vcpu->fd, KVM_SET_REGS, &regs));
	return vcpu;
}

int vcpu_run(struct vcpu *vcpu)
{
	int ret;

	do {
		ret = ioctl(vcpu->fd, KVM_RUN, 0);
	} while (ret < 0 && errno == EINTR && !vcpu->run->immediate_exit);
	return ret;
}

bool exit_is_sync(struct vcpu *vcpu, uint32_t value)
{
	struct kvm_run *run = vcpu->run;

	return run->exit_reason == KVM_EXIT_IO && run->io.port == SYNC_PORT &&
	       *(uint32_t *)((uint8_t *)run + run->io.data_offset) == value;
}

uint32_t vcpu_run_to_sync(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;

	if (vcpu_run(vcpu))
		bail("KVM_RUN: %m");
	if (run->exit_reason == KVM_EXIT_MMIO)
		bail("the guest's %s of gpa 0x%llx met no memory", run->mmio.is_write ? "write" : "read",
		     run->mmio.phys_addr);
	if (run->exit_reason != KVM_EXIT_IO || run->io.port != SYNC_PORT)
		bail("unexpected exit %u (suberror or hardware reason 0x%llx)", run->exit_reason,
		     run->hw.hardware_exit_reason);
	return *(uint32_t *)((uint8_t *)run + run->io.data_offset);
}

bool exit_is_mmio(struct vcpu *vcpu, uint64_t gpa, bool write)
{
	struct kvm_run *run = vcpu->run;

	if (run->exit_reason != KVM_EXIT_MMIO) {
		note("exit reason %u where MMIO was expected", run->exit_reason);
		return false;
	}
	return run->mmio.phys_addr == gpa && run->mmio.is_write == write;
}

uint64_t kvm_stat_of(int stats, const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *desc;
	uint64_t value = 0;
	bool found = false;
	size_t size;

	must(pread(stats, &header, sizeof(header), 0));
	size = sizeof(*desc) + header.name_size;
	desc = malloc(size);
	for (uint32_t i = 0; i < header.num_desc && !found; i++) {
		must(pread(stats, desc, size, header.desc_offset + i * size));
		if (!strcmp(desc->name, name)) {
			must(pread(stats, &value, sizeof(value), header.data_offset + desc->offset));
			found = true;
		}
	}
	free(desc);
	if (!found)
		bail("KVM has no statistic %s", name);
	return value;
}

uint64_t kvm_stat(int fd, const char *name)
{
	int stats = must(ioctl(fd, KVM_GET_STATS_FD, 0));
	uint64_t value = kvm_stat_of(stats, name);

	close(stats);
	return value;
}

void *memory(size_t size, bool huge)
{
	uint8_t *raw = mmap(NULL, size + HUGE_SIZE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *aligned = (uint8_t *)(((uintptr_t)raw + HUGE_SIZE - 1) & ~(HUGE_SIZE - 1));

	if (raw == MAP_FAILED)
		bail("mmap of %zu bytes: %m", size);
	if (aligned > raw)
		munmap(raw, aligned - raw);
	munmap(aligned + size, raw + HUGE_SIZE - aligned);
	must(madvise(aligned, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE));
	return aligned;
}

uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000UL + now.tv_nsec / 1000000;
}

uint64_t deadline_ms(unsigned int ms)
{
	const char *factor = getenv("TIME_FACTOR");

	return now_ms() + ms * (factor ? strtoul(factor, NULL, 10) : 1);
}

void spin_us(unsigned int us)
{
	struct timespec start, now;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while ((now.tv_sec - start.tv_sec) * 1000000L + (now.tv_nsec - start.tv_nsec) / 1000 < us);
}

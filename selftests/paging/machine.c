// SPDX-License-Identifier: GPL-2.0
/* The VM: fixed page tables, segments, and the code that carries out ops. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "paging.h"

#define ZONES_SIZE	(4 * MIB)
#define SHARED_SIZE	(ZONE_FRAMES * PAGE_SIZE)

/* Fixed tables; accessed and dirty already, so that nothing has to be written to them. */
#define TABLE		(PTE_P | PTE_W | PTE_A)
#define PAGE		(TABLE | PTE_D)
#define PML4_TABLE	(FIXED_TABLES + 0x0000)	/* below a five-level root */
#define PDPT_TABLE	(FIXED_TABLES + 0x1000)
#define PD_TABLE	(FIXED_TABLES + 0x2000)
#define PT_TABLE	(FIXED_TABLES + 0x3000)	/* two pages, for 4 MiB */
#define INNER_PML4	(INNER_TABLES + 0x0000)
#define INNER_PDPT	(INNER_TABLES + 0x1000)
#define INNER_PD	(INNER_TABLES + 0x2000)
#define INNER_FAR	(INNER_TABLES + 0x3000)
#define INNER_FAR_PD	(INNER_TABLES + 0x4000)	/* three pages */

extern char guest64[], guest64_end[], guest64_user[], guest64_user_end[];
extern char guest64_pf[], guest64_int80[], guest64_ud[], guest64_df[], guest64_gp[];
extern char guest32[], guest32_end[], guest32_user[], guest32_user_end[];
extern char guest32_pf[], guest32_int80[], guest32_ud[], guest32_df[], guest32_gp[];

uint64_t frame_gpa(int frame)
{
	static const uint64_t zones[] = { ZONE_A, ZONE_B, ZONE_C, ZONE_D };

	return zones[frame / ZONE_FRAMES] + frame % ZONE_FRAMES * PAGE_SIZE;
}

int gpa_frame(uint64_t gpa)
{
	int frame = gpa / PAGE_SIZE % (VM_LOW_SIZE / PAGE_SIZE / 2), zone;

	if (gpa >= ZONE_E)
		gpa -= ZONE_E - ZONE_D;
	zone = gpa >= ZONE_D ? 3 : gpa >= ZONE_C ? 2 : gpa >= ZONE_B ? 1 : 0;
	if (frame >= ZONE_FRAMES)
		return -1;
	frame += zone * ZONE_FRAMES;
	return frame_gpa(frame) == (gpa & ~(PAGE_SIZE - 1)) ? frame : -1;
}

void *machine_memory(struct machine *machine, uint64_t gpa)
{
	if (gpa >= ZONE_D)
		return machine->shared[0] + gpa % (ZONE_E - ZONE_D);
	return gpa < VM_LOW_SIZE ? machine->vm.low + gpa : machine->zones + (gpa - ZONE_B);
}

struct features machine_features(void)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + 128 * sizeof(cpuid->entries[0]));
	struct features features = { .physical_bits = 36 };
	int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC));

	cpuid->nent = 128;
	must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid));
	for (uint32_t i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *entry = &cpuid->entries[i];

		if (entry->function == 1) {
			features.pcid = entry->ecx >> 17 & 1;
		} else if (entry->function == 7 && entry->index == 0) {
			features.smep = entry->ebx >> 7 & 1;
			features.invpcid = entry->ebx >> 10 & 1;
			features.smap = entry->ebx >> 20 & 1;
			features.la57 = entry->ecx >> 16 & 1;
		} else if (entry->function == 0x80000001) {
			features.nx = entry->edx >> 20 & 1;
			features.gigabyte = entry->edx >> 26 & 1;
			features.svm = entry->ecx >> 2 & 1;
		} else if (entry->function == 0x80000008) {
			features.physical_bits = entry->eax & 0xff;
		} else if (entry->function == 0x8000000a) {
			features.svm = features.svm && entry->edx & 1;
		}
	}
	free(cpuid);
	close(kvm);
	return features;
}

static uint64_t *table(struct machine *machine, uint64_t gpa)
{
	return machine_memory(machine, gpa);
}

/* What user mode may access: two pages, or all where users are nested guests. */
static uint64_t user(struct machine *machine, uint64_t gpa)
{
	bool is_user = gpa >= USER_CODE && gpa < USER_STACK_END;

	return is_user || machine->mode->paging == NESTED ? PTE_U : 0;
}

/* The low slot and the zones, mapped as they are, below entry 0 of every root. */
static void fixed_tables(struct machine *machine)
{
	uint64_t *pd = table(machine, PD_TABLE);

	table(machine, PML4_TABLE)[0] = PDPT_TABLE | TABLE | PTE_U;
	table(machine, PDPT_TABLE)[0] = PD_TABLE | TABLE | PTE_U;
	for (uint64_t i = 0; i < 2; i++)
		pd[i] = (PT_TABLE + i * PAGE_SIZE) | TABLE | PTE_U;
	for (uint64_t i = 2; i < 4; i++)
		pd[i] = i * HUGE_SIZE | PAGE | PTE_PS | user(machine, i * HUGE_SIZE);
	for (uint64_t i = 0; i < 1024; i++)
		table(machine, PT_TABLE)[i] = i * PAGE_SIZE | PAGE | user(machine, i * PAGE_SIZE);
	if (machine->mode->paging == PAE)
		/* Pointers have no permissions. */
		for (int root = 0; root < 3; root++)
			table(machine, PDPT_GPA + 32 * root)[0] = PD_TABLE | PTE_P;
}

static void fixed_tables32(struct machine *machine)
{
	uint32_t *pt = (uint32_t *)table(machine, PT_TABLE);

	for (uint64_t i = 0; i < 1024; i++)
		pt[i] = i * PAGE_SIZE | PAGE | user(machine, i * PAGE_SIZE);
}

/* The nested guest's own tables: its address is its physical one. */
static void inner_tables(struct machine *machine)
{
	table(machine, INNER_PML4)[0] = INNER_PDPT | TABLE;
	table(machine, INNER_PML4)[1] = INNER_FAR | TABLE;
	table(machine, INNER_PDPT)[0] = INNER_PD | TABLE;
	for (uint64_t i = 0; i < 4; i++)
		table(machine, INNER_PD)[i] = i * HUGE_SIZE | PAGE | PTE_PS;
	for (uint64_t i = 0; i < 3; i++) {
		uint64_t pd = INNER_FAR_PD + i * PAGE_SIZE;

		table(machine, INNER_FAR)[1 + i] = pd | TABLE;
		for (uint64_t j = 0; j < 4; j++)
			table(machine, pd)[j] = ((513 + i) * GIB + j * HUGE_SIZE) | PAGE | PTE_PS;
	}
	table(machine, OWN_ROOT)[0] = PDPT_TABLE | TABLE;
}

static void gate(struct machine *machine, int vector, uint64_t handler, int dpl)
{
	uint8_t *idt = machine_memory(machine, IDT_ADDR);
	bool wide = machine->mode->long_mode;
	uint64_t low = (handler & 0xffff) | (wide ? SEL_CODE64 : SEL_CODE32) << 16 |
		       (uint64_t)(0x8e | dpl << 5) << 40 | (handler >> 16 & 0xffff) << 48;

	memcpy(idt + vector * (wide ? 16 : 8), &low, sizeof(low));
}

static void descriptors(struct machine *machine)
{
	static const uint64_t gdt[] = {
		[SEL_CODE64 >> 3] = 0x00af9b000000ffff,
		[SEL_DATA >> 3] = 0x00cf93000000ffff,
		[SEL_USER_CODE32 >> 3] = 0x00cffb000000ffff,
		[SEL_USER_DATA >> 3] = 0x00cff3000000ffff,
		[SEL_USER_CODE64 >> 3] = 0x00affb000000ffff,
		[SEL_CODE32 >> 3] = 0x00cf9b000000ffff,
		[SEL_TSS >> 3] = 0x0000890000000067 | (uint64_t)TSS_ADDR << 16,
		[(SEL_TSS >> 3) + 1] = 0,
	};
	uint32_t *tss = machine_memory(machine, TSS_ADDR);
	bool wide = machine->mode->long_mode;

	memcpy(machine_memory(machine, GDT_ADDR), gdt, sizeof(gdt));
	tss[1] = STACK_END;
	tss[2] = wide ? 0 : SEL_DATA;
#define HANDLER(name) (CODE_ADDR + (wide ? guest64_##name - guest64 : guest32_##name - guest32))
	gate(machine, 6, HANDLER(ud), 0);
	gate(machine, 8, HANDLER(df), 0);
	gate(machine, 13, HANDLER(gp), 0);
	gate(machine, 14, HANDLER(pf), 0);
	gate(machine, 0x80, HANDLER(int80), 3);
#undef HANDLER
}

static struct kvm_segment segment(uint16_t selector, int type, bool long_code)
{
	return (struct kvm_segment) {
		.limit = ~0U, .selector = selector, .type = type, .dpl = selector & 3,
		.present = 1, .s = 1, .g = 1, .l = long_code, .db = !long_code,
	};
}

static void registers(struct machine *machine, uint64_t root)
{
	const struct mode *mode = machine->mode;
	struct kvm_regs regs = { .rflags = 2, .rip = CODE_ADDR, .rsp = STACK_END };
	struct kvm_sregs sregs;

	must(ioctl(machine->vcpu->fd, KVM_GET_SREGS, &sregs));
	sregs.cs = segment(mode->long_mode ? SEL_CODE64 : SEL_CODE32, 11, mode->long_mode);
	sregs.ss = segment(SEL_DATA, 3, false);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = segment(SEL_USER_DATA, 3, false);
	sregs.gdt.base = GDT_ADDR;
	sregs.gdt.limit = SEL_TSS + 15;
	sregs.idt.base = IDT_ADDR;
	sregs.idt.limit = 0xfff;
	machine->cr0 = CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG;
	machine->cr4 = CR4_PSE | (mode->paging == BITS32 ? 0 : CR4_PAE) |
		       (mode->paging == LEVEL5 ? CR4_LA57 : 0) |
		       (machine->features.pcid ? CR4_PCIDE : 0) |
		       (mode->paging == PAE && machine->features.smep ? CR4_SMEP : 0);
	sregs.cr0 = machine->cr0;
	sregs.cr3 = root;
	sregs.cr4 = machine->cr4;
	sregs.efer = (mode->long_mode ? EFER_LME | EFER_LMA : 0) |
		     (machine->features.nx ? EFER_NX : 0);
	must(ioctl(machine->vcpu->fd, KVM_SET_SREGS, &sregs));
	must(ioctl(machine->vcpu->fd, KVM_SET_REGS, &regs));
}

/* Entry 0 of the tables that serve as roots leads to what is fixed. */
static uint64_t fix_roots(struct machine *machine)
{
	const struct mode *mode = machine->mode;
	uint64_t below = mode->paging == LEVEL5 ? PML4_TABLE : PDPT_TABLE;

	if (mode->paging == PAE)
		return PDPT_GPA;
	for (int root = 0; root < 3; root++) {
		void *memory = machine_memory(machine, ZONE_B + root * PAGE_SIZE);

		if (mode->paging == BITS32) {
			uint32_t *pd = memory;

			pd[0] = PT_TABLE | TABLE | PTE_U;
			pd[1] = 2 * HUGE_SIZE | PAGE | PTE_PS;
		} else {
			*(uint64_t *)memory = below | TABLE | PTE_U;
		}
	}
	return mode->paging == NESTED ? OWN_ROOT : ZONE_B;
}

/* Every frame ends with a function that returns the frame's number. As entries it is not present. */
uint32_t frame_stub(uint64_t gpa)
{
	if (gpa >= ZONE_E)
		gpa -= ZONE_E - ZONE_D;
	return 0x5000 + gpa / PAGE_SIZE;
}

static void stub(uint8_t *end, uint64_t gpa)
{
	uint64_t code = 0xb8 | (uint64_t)frame_stub(gpa) << 8 | 0xc3UL << 40;

	memcpy(end - 8, &code, 8);
}

/* Two mappings of the same memory. */
static void shared_memory(struct machine *machine)
{
	int file = must(memfd_create("shared", MFD_CLOEXEC));

	must(ftruncate(file, SHARED_SIZE));
	for (int i = 0; i < 2; i++) {
		machine->shared[i] = mmap(NULL, SHARED_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		if (machine->shared[i] == MAP_FAILED)
			bail("mmap of memory that is shared: %m");
	}
	close(file);
}

static void slots(struct machine *machine, bool there, uint32_t flags)
{
	static const uint64_t gpas[] = { ZONE_D, ZONE_E };

	must(vm_slot(&machine->vm, 1, ZONE_B, there ? ZONES_SIZE : 0, machine->zones, flags));
	for (int i = 0; i < 2; i++)
		must(vm_slot(&machine->vm, 2 + i, gpas[i], there ? SHARED_SIZE : 0, machine->shared[i], flags));
}

void machine_renew_slots(struct machine *machine, bool log)
{
	slots(machine, false, 0);
	slots(machine, true, log ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

void machine_set_registers(struct machine *machine)
{
	struct kvm_sregs sregs;

	must(ioctl(machine->vcpu->fd, KVM_GET_SREGS, &sregs));
	sregs.cr0 = machine->cr0;
	sregs.cr4 = machine->cr4;
	sregs.efer = machine->efer;
	/* KVM says that the task is busy. SVM does not care, but QEMU's dies of one with 32 bits; VMX demands it. */
	if (!machine->mode->long_mode && !access("/sys/module/kvm_amd", F_OK))
		sregs.tr.type &= ~2;
	must(ioctl(machine->vcpu->fd, KVM_SET_SREGS, &sregs));
}

void machine_set_physical_bits(struct machine *machine, int bits)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + 128 * sizeof(cpuid->entries[0]));

	cpuid->nent = 128;
	must(ioctl(machine->vcpu->fd, KVM_GET_CPUID2, cpuid));
	for (uint32_t i = 0; i < cpuid->nent; i++)
		if (cpuid->entries[i].function == 0x80000008)
			cpuid->entries[i].eax = (cpuid->entries[i].eax & ~0xffU) | bits;
	must(ioctl(machine->vcpu->fd, KVM_SET_CPUID2, cpuid));
	free(cpuid);
	machine->features.physical_bits = bits;
}

void machine_create(struct machine *machine, const struct mode *mode, struct features features)
{
	bool wide = mode->long_mode;
	struct kvm_sregs sregs;
	uint64_t root;

	memset(machine, 0, sizeof(*machine));
	machine->mode = mode;
	machine->features = features;
	/* Without PAE there is no such bit, but KVM's shadow MMU reports fetches as if there were. */
	machine->features.nx = features.nx && mode->paging != BITS32;
	machine->features.pcid = features.pcid && (mode->paging == LEVEL4 || mode->paging == LEVEL5);
	machine->features.invpcid = features.invpcid && machine->features.pcid;
	vm_create(&machine->vm);
	machine->vcpu = vm_vcpu(&machine->vm, NULL, 0);
	memset(machine->vm.low, 0, VM_LOW_SIZE);
	machine->zones = memory(ZONES_SIZE, true);
	memset(machine->zones, 0, ZONES_SIZE);
	shared_memory(machine);
	slots(machine, true, 0);
	if (mode->paging == BITS32)
		fixed_tables32(machine);
	else
		fixed_tables(machine);
	if (mode->paging == NESTED)
		inner_tables(machine);
	for (int frame = 0; frame < FRAMES; frame++)
		stub((uint8_t *)machine_memory(machine, frame_gpa(frame)) + PAGE_SIZE, frame_gpa(frame));
	root = fix_roots(machine);
	descriptors(machine);
	memcpy(machine_memory(machine, CODE_ADDR), wide ? guest64 : guest32,
	       wide ? guest64_end - guest64 : guest32_end - guest32);
	memcpy(machine_memory(machine, USER_CODE), wide ? guest64_user : guest32_user,
	       wide ? guest64_user_end - guest64_user : guest32_user_end - guest32_user);
	machine->ops = machine_memory(machine, OPS_ADDR);
	registers(machine, root);
	if (mode->paging == NESTED)
		svm_prepare(machine->vcpu, VMCB_ADDR, HSAVE_ADDR, INNER_PML4);
	must(ioctl(machine->vcpu->fd, KVM_GET_SREGS, &sregs));
	machine->efer = sregs.efer;
}

void machine_destroy(struct machine *machine)
{
	vm_destroy(&machine->vm);
	munmap(machine->zones, ZONES_SIZE);
	for (int i = 0; i < 2; i++)
		munmap(machine->shared[i], SHARED_SIZE);
}

bool machine_run(struct machine *machine, int count)
{
	struct kvm_run *run = machine->vcpu->run;
	struct kvm_regs regs;

	machine->ops[count] = (struct op) { .kind = KIND_END };
	if (vcpu_run(machine->vcpu))
		bail("KVM_RUN: %m");
	if (exit_is_sync(machine->vcpu, SYNC_DONE))
		return true;
	must(ioctl(machine->vcpu->fd, KVM_GET_REGS, &regs));
	note("the guest got lost: exit %u, suberror or reason 0x%llx, rip 0x%llx, rax 0x%llx, op %lld",
	     run->exit_reason, run->hw.hardware_exit_reason, regs.rip, regs.rax,
	     ((long long)regs.rbx - OPS_ADDR) / OP_SIZE);
	return false;
}

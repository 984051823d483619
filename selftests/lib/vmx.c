// SPDX-License-Identifier: GPL-2.0
#include <sys/ioctl.h>
#include <unistd.h>

#include "vmx.h"

#define SEL_CODE64	0x08
#define SEL_DATA	0x10
/* Any but 0: nobody looks it up. */
#define SEL_TSS		0x18

#define CR4_VMXE	(1UL << 13)
#define MSR_FEATURE_CONTROL	0x3a
#define VMX_ENABLED	5	/* locked, and outside SMX */
#define MSR_EFER	0xc0000080

/* The first of VMX's own MSRs, and those that say what controls are allowed. */
#define MSR_VMX_BASIC		0x480
#define MSR_VMX_PROC2		0x48b
#define MSR_VMX_EPT		0x48c
#define MSR_VMX_TRUE_PIN	0x48d
#define MSR_VMX_TRUE_PROC	0x48e
#define MSR_VMX_TRUE_EXIT	0x48f
#define MSR_VMX_TRUE_ENTRY	0x490

#define PROC_SECONDARY	(1UL << 31)
#define PROC2_EPT	(1UL << 1)
#define EXIT_64BIT	(1UL << 9)
#define EXIT_SAVE_EFER	(1UL << 20)
#define EXIT_LOAD_EFER	(1UL << 21)
#define ENTRY_64BIT	(1UL << 9)
#define ENTRY_LOAD_EFER	(1UL << 15)
#define EPTP_4_LEVELS	(3UL << 3)
#define EPTP_AD		(1UL << 6)
#define EPTP_WB		6UL
#define INVEPT_ALL	2UL

/* Fields of a VMCS. */
enum {
	GUEST_ES = 0x0800, GUEST_CS = 0x0802, GUEST_LDTR = 0x080c, GUEST_TR = 0x080e, HOST_ES = 0x0c00, HOST_CS = 0x0c02,
	HOST_SS = 0x0c04, HOST_DS = 0x0c06, HOST_TR = 0x0c0c,
	EPT_POINTER = 0x201a, EXIT_GPA = 0x2400, LINK = 0x2800, GUEST_EFER = 0x2806, HOST_EFER = 0x2c02,
	PIN = 0x4000, PROC = 0x4002, EXCEPTIONS = 0x4004, EXIT = 0x400c, ENTRY = 0x4012, PROC2 = 0x401e, ERROR = 0x4400,
	REASON = 0x4402, LIMIT = 0x4800, RIGHTS = 0x4814,
	QUALIFICATION = 0x6400, GUEST_CR0 = 0x6800, GUEST_CR3 = 0x6802, GUEST_CR4 = 0x6804, GUEST_DR7 = 0x681a, GUEST_RSP = 0x681c,
	GUEST_RIP = 0x681e, GUEST_RFLAGS = 0x6820, HOST_CR0 = 0x6c00, HOST_CR3 = 0x6c02, HOST_CR4 = 0x6c04,
	HOST_GDTR = 0x6c0c, HOST_IDTR = 0x6c0e, HOST_RSP = 0x6c14, HOST_RIP = 0x6c16,
};

bool vmx_offered(void)
{
	return access("/sys/module/kvm_intel", F_OK) == 0;
}

void vmx_prepare(struct vcpu *vcpu)
{
	struct { struct kvm_msrs msrs; struct kvm_msr_entry entry; } msr = {
		.msrs.nmsrs = 1, .entry = { .index = MSR_FEATURE_CONTROL, .data = VMX_ENABLED },
	};

	if (ioctl(vcpu->fd, KVM_SET_MSRS, &msr) != 1)
		bail("KVM_SET_MSRS: %m");
}

uint64_t vmx_ept_capabilities(struct vcpu *vcpu)
{
	struct { struct kvm_msrs msrs; struct kvm_msr_entry entry; } msr = {
		.msrs.nmsrs = 1, .entry = { .index = MSR_VMX_EPT },
	};

	if (ioctl(vcpu->fd, KVM_GET_MSRS, &msr) != 1)
		bail("KVM_GET_MSRS: %m");
	return msr.entry.data;
}

guest_inline void vmwrite(uint64_t field, uint64_t value)
{
	__asm__ volatile("vmwrite %1, %0" : : "r"(field), "r"(value) : "cc", "memory");
}

guest_inline uint64_t vmread(uint64_t field)
{
	uint64_t value;

	__asm__ volatile("vmread %1, %0" : "=r"(value) : "r"(field) : "cc", "memory");
	return value;
}

guest_inline uint64_t rdmsr(uint32_t msr)
{
	uint32_t low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return low | (uint64_t)high << 32;
}

/* Controls: those wanted, and those that must be set, as far as they may be. */
guest_inline uint64_t allowed(uint32_t msr, uint64_t wanted)
{
	uint64_t bits = rdmsr(msr);

	return (wanted | (uint32_t)bits) & bits >> 32;
}

guest_code void vmx_root(volatile struct nested *nested, uint64_t root)
{
	nested->tables = root;
	if (nested->started)
		vmwrite(EPT_POINTER, root | EPTP_4_LEVELS | EPTP_WB | (rdmsr(MSR_VMX_EPT) & VMX_EPT_AD ? EPTP_AD : 0));
}

static guest_code void start(volatile struct nested *nested)
{
	uint64_t cr0, cr3, cr4, region = nested->own, vmcs = nested->control;
	struct { uint16_t limit; uint64_t base; } __attribute__((packed)) gdt, idt;

	__asm__ volatile("mov %%cr0, %0; mov %%cr3, %1; mov %%cr4, %2" : "=r"(cr0), "=r"(cr3), "=r"(cr4));
	cr4 |= CR4_VMXE;
	__asm__ volatile("mov %0, %%cr4" : : "r"(cr4));
	__asm__ volatile("sgdt %0; sidt %1" : "=m"(gdt), "=m"(idt));
	*(volatile uint32_t *)region = *(volatile uint32_t *)vmcs = rdmsr(MSR_VMX_BASIC);
	__asm__ volatile("vmxon %0; vmclear %1; vmptrld %1" : : "m"(region), "m"(vmcs) : "cc", "memory");

	vmwrite(PIN, allowed(MSR_VMX_TRUE_PIN, 0));
	vmwrite(PROC, allowed(MSR_VMX_TRUE_PROC, PROC_SECONDARY));
	vmwrite(PROC2, allowed(MSR_VMX_PROC2, PROC2_EPT));
	vmwrite(EXIT, allowed(MSR_VMX_TRUE_EXIT, EXIT_64BIT | EXIT_SAVE_EFER | EXIT_LOAD_EFER));
	vmwrite(ENTRY, allowed(MSR_VMX_TRUE_ENTRY, ENTRY_64BIT | ENTRY_LOAD_EFER));
	vmwrite(EXCEPTIONS, ~0U);
	vmwrite(LINK, ~0UL);

	vmwrite(HOST_CR0, cr0);
	vmwrite(HOST_CR3, cr3);
	vmwrite(HOST_CR4, cr4);
	vmwrite(HOST_EFER, rdmsr(MSR_EFER));
	vmwrite(HOST_CS, SEL_CODE64);
	vmwrite(HOST_SS, SEL_DATA);
	vmwrite(HOST_DS, SEL_DATA);
	vmwrite(HOST_ES, SEL_DATA);
	vmwrite(HOST_TR, SEL_TSS);
	vmwrite(HOST_GDTR, gdt.base);
	vmwrite(HOST_IDTR, idt.base);

	vmwrite(GUEST_CR0, cr0);
	vmwrite(GUEST_CR3, cr3);
	vmwrite(GUEST_CR4, cr4);
	vmwrite(GUEST_EFER, rdmsr(MSR_EFER));
	vmwrite(GUEST_DR7, 0x400);
	vmwrite(GUEST_RFLAGS, 2);
	/* ES, CS, SS, DS, FS, GS, LDTR, TR: each has a selector, a limit and rights. */
	for (uint64_t i = 0; i < 8; i++) {
		vmwrite(GUEST_ES + 2 * i, i == 1 ? SEL_CODE64 : i < 6 ? SEL_DATA : i == 7 ? SEL_TSS : 0);
		vmwrite(LIMIT + 2 * i, i < 6 ? ~0U : 0xffff);
		vmwrite(RIGHTS + 2 * i, i == 1 ? 0xa09b : i < 6 ? 0xc093 : i == 7 ? 0x8b : 0x10000);
	}
	vmwrite(LIMIT + 2 * 8, 0xffff);
	vmwrite(LIMIT + 2 * 9, 0xffff);
	nested->started = 1;
	vmx_root(nested, nested->tables);
}

guest_code uint64_t vmx_run(volatile struct nested *nested, uint64_t stack, uint64_t code, uint64_t argument)
{
	uint64_t failed, reason, rsp_field = HOST_RSP, rip_field = HOST_RIP;

	if (!nested->started)
		start(nested);
	vmwrite(GUEST_RIP, code);
	/* As after a call: 8 below a multiple of 16. */
	vmwrite(GUEST_RSP, stack - 8);
	failed = nested->launched;
	nested->launched = 1;
	/* All registers but these are the nested guest's afterwards. Below the stack pointer is the compiler's. */
	__asm__ volatile("lea -128(%%rsp), %%rsp; push %%rbp\n\t"
			 "vmwrite %%rsp, %%rdx\n\t"
			 "lea 3f(%%rip), %%rdx; vmwrite %%rdx, %%rcx\n\t"
			 "test %%rax, %%rax; jnz 1f\n\t"
			 "vmlaunch; jmp 2f\n"
			 "1:\tvmresume\n"
			 "2:\tmov $1, %%eax; jmp 4f\n"
			 "3:\txor %%eax, %%eax\n"
			 "4:\tpop %%rbp; lea 128(%%rsp), %%rsp"
			 : "+a"(failed), "+D"(argument), "+d"(rsp_field), "+c"(rip_field) :
			 : "rbx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	if (failed)
		return vmread(ERROR) | NESTED_NOT_ENTERED;
	reason = (uint32_t)vmread(REASON);
	nested->gpa = vmread(EXIT_GPA);
	nested->info = vmread(QUALIFICATION);
	return reason == VMX_VMCALL ? NESTED_HYPERCALL : reason == VMX_EPT_VIOLATION ? NESTED_FAULT : reason | NESTED_OTHER;
}

guest_code void vmx_flush(volatile struct nested *nested)
{
	if (nested->started)
		__asm__ volatile("invept %0, %1" : : "m"(nested->flush[0]), "r"(INVEPT_ALL) : "cc", "memory");
}

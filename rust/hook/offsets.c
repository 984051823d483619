// SPDX-License-Identifier: GPL-2.0
/* Offsets of struct members that the entry stubs (stubs.S) load. */
#define COMPILE_OFFSETS
#include <linux/fs.h>
#include <linux/kbuild.h>
#include <linux/kvm_host.h>

int main(void)
{
	BLANK();
	OFFSET(RMMU_KVM_OWNER, kvm, arch.active_mmu_pages.prev);
	OFFSET(RMMU_VCPU_KVM, kvm_vcpu, kvm);
	OFFSET(RMMU_FILE_KVM, file, private_data);
	return 0;
}

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The vendor module's operations that rmmu calls are those of the vendor module that is there: what only the one before it
# had, which may be freed memory by now, is called no more. A test module lends KVM operations that kvm_amd does not have.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh

LENDER=/sys/module/vendor_ops/parameters

# The address of a symbol of a module.
address() {
	awk -v name="$1" -v module="[$2]" '$3 == name && $4 == module { print "0x" $1 }' /proc/kallsyms
}

# Where rmmu's static call of an operation goes.
target() {
	address "__SCT__rmmu_x86_$1" kvm_rmmu > $LENDER/trampoline && cat $LENDER/target
}

leads_to() {
	found=$(target "$1")
	note "$1 is $found"
	case $found in
	"$2"*) true ;;
	*) false ;;
	esac
}

# vm_works PROGRAM: it passes, and rmmu owned a VM of it.
vm_works() {
	before=$(rmmu_stat vms_owned_total)
	"$1" > /tmp/vm.log 2>&1 || { note "$(grep '^not ok' /tmp/vm.log)"; return 1; }
	[ "$(rmmu_stat vms_owned_total)" -gt "$before" ]
}

# Nested guests: the hypervisor's tables are shadowed, and the memory type of each page is asked for.
NESTED=/selftests/nested
PLAIN=/selftests/smoke

[ "$(cat /sys/module/kvm_amd/parameters/npt 2> /dev/null)" = Y ] || skip_all "no nested guests of SVM with nested paging"
plan 12
rmmu_loaded || rmmu_load || bail "kvm_rmmu.ko does not load"
ops=$(address kvm_x86_ops kvm)
# Newer kernels have one.
nested=$(address kvm_nested_ops kvm)
[ -n "$ops" ] || bail "kvm.ko has no kvm_x86_ops"

insmod /selftests/modules/vendor_ops.ko kvm_x86_ops="$ops" ${nested:+kvm_nested_ops=$nested} || bail "vendor_ops.ko does not load"
check "a VM works with a vendor module that has memory types" vm_works $NESTED
check "they are asked of it" leads_to get_mt_mask vendor_ops_memtype
check "and so is where to log writes" leads_to write_log_dirty vendor_ops_write_log_dirty
check "it was asked" [ "$(cat $LENDER/asked)" -gt 0 ]
rmmod vendor_ops
check "a VM works with a vendor module that has none" vm_works $NESTED
insmod /selftests/modules/vendor_ops.ko || bail "vendor_ops.ko does not load"
check "nobody is asked for memory types" leads_to get_mt_mask __static_call_return0
check "nor where to log writes" leads_to write_log_dirty __static_call_return0
rmmod vendor_ops

# The same across a reload of kvm.ko and of its vendor module, in both orders with rmmu.
insmod /selftests/modules/vendor_ops.ko kvm_x86_ops="$ops" ${nested:+kvm_nested_ops=$nested} || bail "vendor_ops.ko does not load"
vm_works $PLAIN
rmmod vendor_ops
rmmod kvm_amd && modprobe kvm-amd || bail "kvm_amd cannot be loaded again"
check "a VM works after the vendor module was loaded again" vm_works $PLAIN
kvm_unload && kvm_load || bail "kvm cannot be loaded again"
check "and after kvm.ko was" vm_works $PLAIN
insmod /selftests/modules/vendor_ops.ko || bail "vendor_ops.ko does not load"
check "the operations it has are kvm_amd's" leads_to load_mmu_pgd svm_load_mmu_pgd
check "those it does not have are nobody's" leads_to get_mt_mask __static_call_return0
rmmod vendor_ops
rmmu_unload && kvm_unload && rmmu_load && kvm_load || bail "rmmu and kvm cannot be loaded again"
check "and after rmmu was loaded before kvm.ko" vm_works $PLAIN
finish

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Where KVM uses no TDP MMU (kvm's tdp_mmu=0, kvm_amd's npt=0), rmmu loads, says that it will
# own nothing, and leaves every VM to in-tree KVM.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh

# reload KVM_PARAMETERS KVM_AMD_PARAMETERS
reload() {
	rmmu_loaded && { rmmu_unload || return; }
	kvm_unload
	# The parameters are words on purpose.
	modprobe kvm $1 && modprobe kvm-amd $2 && mark_messages && rmmu_load
}

says_so() {
	messages | grep -iE "owns nothing|declined" | sed 's/^/# message: /' | grep .
}

vm_stays() {
	/selftests/smoke > /tmp/smoke.log || { tail -n 3 /tmp/smoke.log; return 1; }
	[ "$(rmmu_stat vms_owned_total)" = 0 ]
}

plan 8
for mode in tdp_mmu=0 npt=0; do
	case $mode in
	tdp*) check "$mode: rmmu loads" reload tdp_mmu=0 "" ;;
	npt*) check "$mode: rmmu loads" reload "" npt=0 ;;
	esac
	check "$mode: a VM works, and is not rmmu's" vm_stays
	check "$mode: the log says so" says_so
done
check "back in the default mode rmmu loads" reload "" ""
check "and owns a VM" eval '/selftests/smoke > /dev/null && [ "$(rmmu_stat vms_owned_total)" -gt 0 ]'
finish

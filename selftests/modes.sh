#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# rmmu serves VMs however KVM pages: with its TDP MMU, without it (kvm's tdp_mmu=0, and rmmu's own), and
# without nested paging (kvm_amd's npt=0, kvm_intel's ept=0).

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh

# reload KVM_PARAMETERS VENDOR_PARAMETERS RMMU_PARAMETERS...
reload() {
	rmmu_loaded && { rmmu_unload || return; }
	kvm_unload
	# The parameters are words on purpose.
	modprobe kvm $1 && modprobe "$VENDOR" $2 || return
	shift 2
	rmmu_load "$@"
}

# A VM works, and is rmmu's.
serves() {
	before=$(rmmu_stat vms_owned_total)
	for program in smoke memslots notifier; do
		/selftests/$program > /tmp/served.log || { note "$program: $(grep '^not ok' /tmp/served.log)"; return 1; }
	done
	[ "$(rmmu_stat vms_owned_total)" -gt "$before" ] && [ "$(rmmu_stat vms_declined)" = 0 ]
}

plan 12
nested_paging=npt
[ "$VENDOR" = kvm-intel ] && nested_paging=ept
for mode in "kvm tdp_mmu=0" "$VENDOR $nested_paging=0" "rmmu tdp_mmu=0" "default"; do
	case $mode in
	kvm\ *) check "$mode: rmmu loads" reload tdp_mmu=0 "" ;;
	"$VENDOR"*) check "$mode: rmmu loads" reload "" $nested_paging=0 ;;
	rmmu*) check "$mode: rmmu loads" reload "" "" tdp_mmu=0 ;;
	*) check "$mode: rmmu loads" reload "" "" ;;
	esac
	check "$mode: VMs work, and are rmmu's" serves
	check "$mode: nothing of them is left" rmmu_idle
done
finish

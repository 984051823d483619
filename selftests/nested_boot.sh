#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Linux in Linux in the test VM: a VM of rmmu's runs KVM with nested paging itself, and in it QEMU boots the same kernel,
# which works on memory. The tables of the inner VM's hypervisor are shadowed by rmmu, and by nothing of in-tree KVM's.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh
GUEST_TIMEOUT=${GUEST_TIMEOUT:-1200}
. /selftests/lib/guest.sh
. /selftests/lib/hits.sh
log=/tmp/hypervisor.log

[ "$(cat /sys/module/kvm_amd/parameters/npt)" = Y ] || skip_all "with shadow paging there is no nested paging"

# The hypervisor's initramfs: this machine's own files, and another init. Archives may follow each other.
hypervisor_initrd() (
	cd / && {
		echo bin; echo bin/busybox; echo dev; echo dev/console; echo etc; echo etc/rmmu-vm.conf
		find lib lib64 usr guest selftests/lib -type d -o -type f -o -type l 2>/dev/null
		echo selftests
	} | sort | cpio -o -H newc > /tmp/hypervisor.initrd &&
		mkdir -p /tmp/init && cp /guest/hypervisor-init /tmp/init/init &&
		cd /tmp/init && echo init | cpio -o -H newc >> /tmp/hypervisor.initrd
)

shadow_stat() {
	sed -n "s/^$1 //p" "$(guest_rmmu_dir)/shadow"
}

# Called while both run.
is_shadowed() {
	note "shadow MMU: $(tr '\n' ' ' < "$(guest_rmmu_dir)/shadow")"
	for stat in mmu_cache_miss mmu_shadow_zapped mmu_pte_write mmu_flooded; do
		note "$stat $(cat $(guest_kvm_dir)/$stat)"
	done
	[ "$(cat "$(guest_rmmu_dir)/owner")" = rmmu ] && [ "$(shadow_stat indirect)" -gt 0 ] && [ "$(shadow_stat synced)" -gt 0 ]
}

no_hits() {
	awk '$2 > 0 { print "# in-tree:", $0; bad = 1 } END { exit bad }' /tmp/hits
}

plan 8
check "an initramfs for the hypervisor can be made" hypervisor_initrd
candidates > /tmp/probed
probe
GUEST_MEMORY=1536M GUEST_INITRD=/tmp/hypervisor.initrd guest_start $log
check "Linux boots in a VM of rmmu's, and has KVM with nested paging" guest_says $log "hypervisor: KVM is there, with nested paging"
check "Linux boots in a VM of that" guest_says $log "guest: user space"
check "and works" guest_says $log "guest: workload done"
note "$(grep -aE 'hypervisor:|guest:' $log | tr -d '\r' | tr '\n' ' ')"
check "on right data" eval '! grep "wrong data" $log'
check "by rmmu's shadow pages" is_shadowed
hits > /tmp/hits
unprobe
check "and none of in-tree KVM's functions" no_hits
guest_stop
rm -f /tmp/hypervisor.initrd
check "of which nothing is left" rmmu_idle
finish

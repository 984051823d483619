#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The guest's half of scripts/demo: boots Linux once on in-tree KVM and once on rmmu, in one
# boot of the test VM, and prints what KVM and rmmu count as "WHO KEY VALUE" lines.

. /selftests/lib/rmmu.sh
. /selftests/lib/guest.sh

uptime_ms() {
	read -r up _ < /proc/uptime
	echo "${up%.*}${up#*.}0"
}

# What all VMs' page tables take; there is one VM at a time.
table_kib() {
	awk '/^SecPageTables/ { print $2 }' /proc/meminfo
}

# A statistic of the VM, summed over its vCPUs where it is theirs.
kvm_stat() {
	cat "$kvm_dir/$1" "$kvm_dir"/vcpu*/"$1" 2>/dev/null |
		awk '{ sum += $1 } END { print sum + 0 }'
}

look() {
	kvm_dir=$(guest_kvm_dir)
	rmmu_dir=$(guest_rmmu_dir)
	[ -d "$kvm_dir" ] || return 1
	# rmmu shows its own VMs only.
	if [ -n "$rmmu_dir" ]; then
		echo "$who owner $(cat "$rmmu_dir/owner")"
		sed "s/^/$who dump /" "$rmmu_dir/page_table"
	else
		echo "$who owner in-tree"
	fi
	for name in pf_taken pf_fixed pf_fast pf_spurious pf_emulate pages_4k pages_2m pages_1g mmu_cache_miss; do
		echo "$who $name $(kvm_stat $name)"
	done
	echo "$who tables $(($(table_kib) / 4))"
}

# The page tables of a VM are freed some time after its end.
tables_freed() {
	for i in $(seq 50); do
		[ "$(table_kib)" = 0 ] && return
		usleep 100000
	done
	echo "$(table_kib) KiB of page tables are left"
	return 1
}

play() {
	who=$1
	own_new_vms "$2"
	start=$(uptime_ms)
	guest_start /tmp/guest.log
	guest_wait /tmp/guest.log "guest: user space" &&
		echo "$who user_space_ms $(($(uptime_ms) - start))" &&
		guest_wait /tmp/guest.log "guest: workload done" &&
		echo "$who done_ms $(($(uptime_ms) - start))" &&
		look
	result=$?
	grep -q "wrong data" /tmp/guest.log && result=1
	[ $result = 0 ] || {
		echo "the guest's console on $who:"
		tail -n 20 /tmp/guest.log /tmp/guest.log.qemu
	}
	guest_stop
	rmmu_idle && tables_freed && return $result
}

play in-tree 0 && play rmmu 1

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# rmmu is loaded and unloaded again and again (lifecycle.sh TIMES), with VMs made and destroyed
# in between, and all memory, module references and hooks come back.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh
times=${1:-100}

vms_come_and_go() {
	/selftests/smoke > /tmp/smoke.log || return
	/selftests/prefault > /tmp/prefault.log
	# With shadow paging KVM cannot pre-fault: skipped.
	[ $? = 0 ] || grep -q '^1..0 # SKIP' /tmp/prefault.log
}

cycle() {
	rmmu_load && before=$(rmmu_stat vms_owned_total) && vms_come_and_go || return 1
	served=$((served + $(rmmu_stat vms_owned_total) - before))
	rmmu_idle || note "not idle: $(cat $RMMU_DEBUG/stats | tr '\n' ' ')"
	rmmu_unload
}

cycles() {
	served=0
	for i in $(seq "$1"); do
		cycle || {
			note "cycle $i failed: $(tail -n 3 /tmp/smoke.log) $(dmesg | tail -n 3)"
			return 1
		}
	done
}

# Objects in use: of KVM's caches and of the general ones. Free ones are given back first.
slabs() {
	for shrink in /sys/kernel/slab/*/shrink; do
		echo 1 > "$shrink"
	done
	awk '/^(kmalloc|kvm|pte_list|x86_emulator|mmu_page)/ { print $1, $2 }' /proc/slabinfo
}

# Which caches hold at least one object more a cycle than before, leaving out what the
# allocator keeps for each CPU: up to 60 objects on each of two CPUs come and go.
grown_slabs() {
	awk -v times="$times" 'BEGIN { limit = times > 130 ? times : 130 }
		NR == FNR { before[$1] = $2; next }
		$2 - before[$1] >= limit { print $1, before[$1], $2 }' /tmp/slabs.before /tmp/slabs.after
}

no_slab_grows() {
	settle
	slabs > /tmp/slabs.after
	grown=$(grown_slabs)
	[ -z "$grown" ] || note "grown: $grown"
	[ -z "$grown" ]
}

# What a third CPU keeps can exceed that now and then, but does not do so again; a leak does.
no_slab_keeps_growing() {
	no_slab_grows && return
	mv /tmp/slabs.after /tmp/slabs.before
	cycles "$times" && no_slab_grows
}

page_tables_kib() {
	awk '/^SecPageTables/ { print $2 }' /proc/meminfo
}

settle() {
	sleep 3
	echo 3 > /proc/sys/vm/drop_caches
}

plan 7
rmmu_loaded && rmmu_unload
# What the first rounds allocate for good is no leak.
check "the module loads, serves and unloads" cycles 3
settle
slabs > /tmp/slabs.before
tables=$(page_tables_kib)
hooks=$(diverted_functions | wc -l)
check "and does so $times times" cycles "$times"
check "every time it served VMs ($served)" [ "$served" -ge "$times" ]
check "no slab cache keeps growing" no_slab_keeps_growing
check "no page of page tables is left ($(page_tables_kib) KiB, $tables before)" [ "$(page_tables_kib)" -le "$tables" ]
check "no function is diverted any more" [ "$(diverted_functions | wc -l)" = "$hooks" ]
check "kvm.ko's reference count is what it is without rmmu" [ "$(cat /sys/module/kvm/refcnt)" = 1 ]
rmmu_load
finish

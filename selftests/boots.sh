#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Linux boots in a VM of rmmu's, boots.sh TIMES, works on memory, and leaves nothing behind.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh
. /selftests/lib/guest.sh
times=${1:-20}

boot() {
	owned=$(rmmu_stat vms_owned_total)
	guest_works /tmp/guest.log || return 1
	grep -q "guest: 2 CPUs" /tmp/guest.log && [ "$guest_owner" = rmmu ] &&
		[ "$(rmmu_stat vms_owned_total)" -gt "$owned" ]
}

all_returned() {
	rmmu_idle && [ "$(cat $RMMU_SYS/refcnt)" = "$references" ] && return
	note "left: $(tr '\n' ' ' < $RMMU_DEBUG/stats) references $(cat $RMMU_SYS/refcnt), $references before"
	return 1
}

plan $((2 * times))
references=$(cat $RMMU_SYS/refcnt)
for i in $(seq "$times"); do
	check "boot $i: Linux with 2 CPUs works, owned by rmmu" boot
	check "boot $i: VM, roots, page tables and module references are returned" all_returned
done
finish

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# No function of in-tree KVM's MMU that works on page tables runs while Linux boots in a VM of
# rmmu's; the same functions run a lot for a VM that is not owned, in the same boot.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh
. /selftests/lib/guest.sh
. /selftests/lib/hits.sh

# boot OWN LINE: Linux, until its console has LINE.
boot() {
	own_new_vms "$1"
	guest_start /tmp/guest.log
	guest_wait /tmp/guest.log "$2"
	booted=$?
	guest_stop
	own_new_vms 1
	rmmu_idle
	return $booted
}

plan 5
candidates > /tmp/probed
check "there are functions to probe ($(wc -l < /tmp/probed))" [ "$(wc -l < /tmp/probed)" -ge 50 ]
probe
hits > /tmp/hits.0
check "Linux boots in a VM that is not owned" boot 0 "guest: user space"
hits > /tmp/hits.1
check "Linux boots and works in a VM of rmmu's" boot 1 "guest: workload done"
hits > /tmp/hits.2
unprobe
hits_between /tmp/hits.0 /tmp/hits.1 > /tmp/not_owned
hits_between /tmp/hits.1 /tmp/hits.2 > /tmp/owned
note "not owned: $(sum /tmp/not_owned) hits of $(wc -l < /tmp/not_owned) functions, most of them:"
sort -k2 -rn /tmp/not_owned | head -n 8 | sed 's/^/#   /'
sed 's/^/# hit for the owned VM: /' /tmp/owned
echo "in-tree hits $MODE $(sum /tmp/owned)"
check "in-tree code runs for the VM that is not owned" [ "$(sum /tmp/not_owned)" -ge 1000 ]
check "in-tree code never runs for the owned VM" [ "$(sum /tmp/owned)" = 0 ]
finish

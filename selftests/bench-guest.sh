#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The benchmark's rows of a Linux guest: boots it on in-tree KVM and on rmmu, and has it make processes. Prints lines
# "WHO KEY VALUE"; times are the guest's own, in nanoseconds. The guest has one CPU: two do not take the same turns twice.
# Nor does it lay out itself and its processes anew each time.

. /selftests/lib/rmmu.sh
. /selftests/lib/guest.sh
GUEST_CPUS=1
# Looking costs instructions, too.
GUEST_POLL=1000000
GUEST_CMDLINE="nokaslr norandmaps rmmu.forks=${FORKS:-200}"

play() {
	who=$1
	own_new_vms "$2"
	guest_start /tmp/guest.log
	guest_wait /tmp/guest.log "guest: workload done" || {
		echo "the guest on $who:"
		guest_post_mortem /tmp/guest.log
		guest_stop
		return 1
	}
	kvm_dir=$(guest_kvm_dir)
	echo "$who faults $(cat "$kvm_dir"/pf_taken)"
	[ -n "$(guest_rmmu_dir)" ] && owner=rmmu || owner=in-tree
	guest_stop
	[ $owner = "$who" ] || { echo "the guest is not $who's"; return 1; }
	awk -v who="$who" '
		/guest: user space/ { print who, "boot", $4 }
		/guest: forks/ { print who, "forks", $4 - $3 }' /tmp/guest.log
}

play in-tree 0 && play rmmu 1

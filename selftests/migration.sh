#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# QEMU migrates a Linux guest that works on memory, while it runs, from one owner of its page tables to the other: by the
# dirty log, by the dirty ring, and by userfaultfd. The guest goes on there, and finds its memory as it was.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh
. /selftests/lib/guest.sh
SOURCE=/tmp/source
TARGET=/tmp/target
GUEST_POLL=1000000

# start NAME OWNED WORDS...: a QEMU that can be told things. What is written before it listens would be lost.
start() {
	log=$1
	own_new_vms "$2"
	shift 2
	rm -f "$log".monitor.in "$log".monitor.out
	mkfifo "$log".monitor.in "$log".monitor.out
	GUEST_OPTIONS="-monitor pipe:$log.monitor $*"
	guest_start "$log"
	cat "$log".monitor.out > "$log".said &
	guest_wait_for grep -qs "(qemu)" "$log".said
}

# Opened for both, so that nobody waits for a QEMU that is gone.
tell() {
	echo "$2" 1<> "$1".monitor.in
}

# sooner_or_later COMMAND...: it succeeds; false when time is up, and at once when QEMU refuses something.
sooner_or_later() {
	guest_wait_for refused_or "$@" && "$@"
}

refused_or() {
	grep -Eqs "^Error:|Status:.*failed" $SOURCE.said $TARGET.said || "$@"
}

moved() {
	tell $SOURCE "info migrate"
	grep -qs "Status:.*completed" $SOURCE.said
}

# Two rounds: the second one began there.
went_on() {
	[ "$(grep -sc "guest: round" $TARGET)" -ge 2 ]
}

owner() {
	[ -n "$(guest_rmmu_dir)" ] && echo 1 || echo 0
}

move() {
	start $SOURCE "$1" || return 1
	source_pid=$guest_pid
	guest_wait $SOURCE "guest: user space" && [ "$(owner)" = "$1" ] || return 1
	start $TARGET "$2" -incoming defer || return 1
	if [ -n "$3" ]; then
		tell $SOURCE "migrate_set_capability $3 on"
		tell $TARGET "migrate_set_capability $3 on"
	fi
	tell $TARGET "migrate_incoming unix:/tmp/wire"
	sooner_or_later [ -S /tmp/wire ] || return 1
	# The guest is not slowed down by a debug kernel, but what is to keep up with it is.
	tell $SOURCE "migrate_set_parameter downtime-limit $((300 * TIME_FACTOR * TIME_FACTOR))"
	tell $SOURCE "migrate -d unix:/tmp/wire"
	[ -z "$3" ] || tell $SOURCE "migrate_start_postcopy"
	sooner_or_later moved || return 1
	guest_wait_for went_on && [ "$(owner)" = "$2" ] && ! grep "wrong data" $SOURCE $TARGET
}

# migrate FROM TO [CAPABILITY]: an owner is 0 for in-tree KVM, 1 for rmmu
migrate() {
	rm -f /tmp/wire $SOURCE $TARGET $SOURCE.said $TARGET.said
	source_pid=
	move "$@"
	moved=$?
	[ $moved = 0 ] || for side in $SOURCE $TARGET; do
		note "$side: $(tail -n 20 $side $side.qemu $side.said)"
	done
	guest_stop
	guest_pid=$source_pid
	guest_stop
	return $moved
}

# It never ends, so that something is written while it is moved.
GUEST_CMDLINE="rmmu.rounds=1000000 rmmu.kib=512"
GUEST_MEMORY=256M

plan 5
check "by the dirty log, from in-tree KVM to rmmu" migrate 0 1
check "by the dirty log, from rmmu to in-tree KVM" migrate 1 0
check "by userfaultfd, from rmmu to rmmu" migrate 1 1 postcopy-ram
GUEST_ACCEL=,dirty-ring-size=4096
check "by the dirty ring, from rmmu to rmmu" migrate 1 1
check "VMs, roots and page tables are returned" rmmu_idle
finish

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Whether the emulated CPU is one that shadow paging can be tested on: QEMU has five faults, which are
# mended for the modes that need it (scripts/lib/emulator.py). The last hardly ever shows by the real clock, and is
# not looked for.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh

TRACING=/sys/kernel/tracing
EVENTS=$TRACING/events/kvm

[ "$(cat /sys/module/kvm_amd/parameters/npt)" = N ] || skip_all "with nested paging the emulator is Debian's as it is"

# Events that were delivered, and are not valid any more, must not be seen in EXITINTINFO.
trace_on() {
	echo 'intr_info > 0 && intr_info < 0x80000000' > $EVENTS/kvm_exit/filter &&
		echo 1 > $EVENTS/kvm_exit/enable && echo 1 > $EVENTS/kvm_inj_exception/enable && echo > $TRACING/trace
}

trace_off() {
	echo 0 > $EVENTS/kvm_exit/enable
	echo 0 > $EVENTS/kvm_inj_exception/enable
	injected=$(grep -c kvm_inj_exception: $TRACING/trace)
	stale=$(grep -c kvm_exit: $TRACING/trace)
	grep -m 3 kvm_exit: $TRACING/trace | sed 's/^/# /'
	echo "# $injected exceptions injected, $stale exits with what was delivered before"
	[ "$injected" -gt 0 ] && [ "$stale" -eq 0 ]
}

paging() {
	/selftests/paging "$@" > /tmp/paging.log || { sed 's/^/# /' /tmp/paging.log; return 1; }
}

reload_with_npt() {
	kvm_unload && modprobe kvm-amd npt=1 && [ "$(cat /sys/module/kvm_amd/parameters/npt)" = Y ]
}

plan 6
check "exits are traced" trace_on
check "under shadow paging a guest reads its own CR3" paging -m 4-level -n 2000
check "an exception that was delivered does not come back in EXITINTINFO" trace_off
check "KVM loads again with nested paging" reload_with_npt
check "a fault for a reserved bit says that the entry is present" paging -r -m 4-level -n 3000
check "a page fault makes the CPU forget the page" paging -f -m 32-bit -n 10000 -s 1
finish

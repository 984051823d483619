# SPDX-License-Identifier: GPL-2.0
# For scripts in the test VM: how often functions of in-tree KVM's MMU run.
#
# Counted by kprobes on every function of arch/x86/kvm/mmu that can have one, except those
# that rmmu hooks (its stub is at their entry, so a probe there counts calls of both) and
# those of intree-harmless.list.

tracing=/sys/kernel/tracing

# The functions that can be probed; probe() wants them in /tmp/probed.
candidates() {
	sed -n 's/ \[kvm\]$//p' $tracing/available_filter_functions | sort -u > /tmp/traceable
	sort -u "$RMMU_DEBUG/hooks" > /tmp/hooked
	sed -n 's/^\([a-z_0-9]\+\).*/\1/p' /selftests/intree-harmless.list | sort -u > /tmp/harmless
	sort -u /selftests/intree-functions.list | awk '
		FILENAME == "/tmp/traceable" { traceable[$1]; next }
		FILENAME != "-" { left_out[$1]; next }
		$1 in traceable && !($1 in left_out)' /tmp/traceable /tmp/hooked /tmp/harmless -
}

probe() {
	for function in $(cat /tmp/probed); do
		echo "p:rmmu_test/$function $function" >> $tracing/kprobe_events || note "no probe on $function"
	done
	echo 1 > $tracing/events/rmmu_test/enable
}

unprobe() {
	echo 0 > $tracing/events/rmmu_test/enable
	echo > $tracing/kprobe_events
}

hits() {
	awk '{ print $1, $2 }' $tracing/kprobe_profile
}

# What was hit between two files of hits: NAME COUNT, and the sum.
hits_between() {
	awk 'NR == FNR { before[$1] = $2; next } $2 > before[$1] { print $1, $2 - before[$1] }' "$1" "$2"
}

sum() {
	awk '{ sum += $2 } END { print sum + 0 }' "$1"
}

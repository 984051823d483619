# SPDX-License-Identifier: GPL-2.0
# For scripts in the test VM: loading and unloading rmmu, and its counters.

. /etc/rmmu-vm.conf

RMMU_DEBUG=/sys/kernel/debug/rmmu
RMMU_SYS=/sys/module/kvm_rmmu

rmmu_loaded() {
	[ -d "$RMMU_SYS" ]
}

rmmu_load() {
	# The parameters are words on purpose.
	insmod "$RMMU" $RMMU_PARAMS "$@"
}

rmmu_unload() {
	rmmod kvm_rmmu
}

# A counter of rmmu's.
rmmu_stat() {
	sed -n "s/^$1 //p" "$RMMU_DEBUG/stats" 2>/dev/null
}

# Wait, 10 s at most (more on a slow kernel), until rmmu holds no VM and no page-table page any more.
rmmu_idle() {
	tries=$((100 * TIME_FACTOR))
	while [ "$(rmmu_stat vms_owned) $(rmmu_stat table_pages)" != "0 0" ]; do
		tries=$((tries - 1))
		[ $tries -gt 0 ] || return 1
		usleep 100000
	done
}

own_new_vms() {
	echo "$1" > "$RMMU_SYS/parameters/own_new_vms"
}

kvm_unload() {
	rmmod "$VENDOR" && rmmod kvm
}

kvm_load() {
	modprobe "$VENDOR"
}

# The functions that ftrace diverts, by whoever: to see whether somebody left something behind.
diverted_functions() {
	cut -d' ' -f1 /sys/kernel/tracing/enabled_functions | sort
}

# rmmu's messages since the last mark. The log is not cleared: the harness reads it, too.
mark_messages() {
	echo "rmmu-test: mark" > /dev/kmsg
}

messages() {
	dmesg | awk '/rmmu-test: mark/ { text = ""; next } /rmmu: / { text = text $0 "\n" } END { printf "%s", text }'
}

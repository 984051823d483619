# SPDX-License-Identifier: GPL-2.0
# For scripts in the test VM that run the Linux guest: the stock kernel in QEMU on KVM.

. /etc/rmmu-vm.conf
GUEST_TIMEOUT=$((${GUEST_TIMEOUT:-180} * TIME_FACTOR))

# Without the guest's interrupt controller in paravirtual form (kvm-pv-eoi): see "An interrupt that comes twice" in
# Documentation/testing.rst.
#
# Start the guest, its console in the file $1, what QEMU says in $1.qemu, and the vCPUs' registers at each reset (a triple
# fault is one, and silent otherwise) in $1.reset. Sets guest_pid. GUEST_CPUS, GUEST_MEMORY,
# GUEST_MACHINE, GUEST_INITRD, GUEST_CMDLINE, GUEST_ACCEL (what follows "kvm") and GUEST_OPTIONS (words for QEMU) are the
# caller's.
guest_start() {
	rm -f "$1"
	qemu-system-x86_64 -accel "kvm$GUEST_ACCEL" -cpu host,-kvm-pv-eoi -smp ${GUEST_CPUS:-2} -m ${GUEST_MEMORY:-512M} \
		-machine "${GUEST_MACHINE:-microvm,isa-serial=on,pit=off,pic=off,rtc=on}" \
		-nodefaults -no-user-config -display none -no-reboot -serial "file:$1" \
		-d cpu_reset -D "$1.reset" $GUEST_OPTIONS \
		-kernel /guest/vmlinuz -initrd "${GUEST_INITRD:-/guest/initrd}" \
		-append "console=ttyS0 quiet panic=-1 tsc=reliable $GUEST_CMDLINE" 2> "$1.qemu" &
	guest_pid=$!
}

# guest_wait_for COMMAND...: until it succeeds; false when the guest started last ends or time is up. GUEST_POLL: how long
# between two looks, in microseconds.
guest_wait_for() {
	left=$((GUEST_TIMEOUT * 1000000 / ${GUEST_POLL:=100000}))
	until "$@"; do
		left=$((left - 1))
		[ $left -gt 0 ] && kill -0 "$guest_pid" 2>/dev/null || return 1
		usleep $GUEST_POLL
	done
}

# Wait until the console $1 has a line that matches $2.
guest_wait() {
	guest_wait_for grep -qs "$2" "$1"
}

# Why a guest is gone or stuck, for the log of a test that failed. The guest is reaped.
guest_post_mortem() {
	tail -n 15 "$1"
	cat "$1.qemu"
	if kill -0 "$guest_pid" 2>/dev/null; then
		echo "it still runs"
	else
		wait "$guest_pid"
		echo "QEMU ended with exit code $?; the last reset:"
		tail -n 40 "$1.reset"
	fi
}

guest_stop() {
	kill "$guest_pid" 2>/dev/null
	wait "$guest_pid" 2>/dev/null
	:
}

# guest_says LOG LINE: the console has a line that matches, sooner or later; says why not.
guest_says() {
	guest_wait "$1" "$2" && return
	# Not in a subshell, which could not reap the guest.
	guest_post_mortem "$1" > "$1.post_mortem"
	note "the guest did not say '$2': $(cat "$1.post_mortem")"
	return 1
}

# guest_works LOG: the guest boots and works on memory. Sets guest_owner; says why not.
guest_works() {
	guest_start "$1"
	guest_says "$1" "guest: workload done" || {
		guest_stop
		return 1
	}
	guest_owner=$(cat "$(guest_rmmu_dir)/owner")
	guest_stop
	note "$(grep -E 'user space|workload' "$1" | tr '\n' ' ')"
	! grep "wrong data" "$1"
}

# KVM's debugfs directory of the guest, and rmmu's (empty when it does not own the VM).
guest_kvm_dir() {
	echo /sys/kernel/debug/kvm/"$guest_pid"-*
}

guest_rmmu_dir() {
	for dir in /sys/kernel/debug/rmmu/vms/"$guest_pid"-*; do
		[ -d "$dir" ] && echo "$dir"
	done
}

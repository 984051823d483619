# SPDX-License-Identifier: GPL-2.0
# TAP for shell tests in the VM: plan N, then ok/not_ok or check, then finish.

tap_made=0
tap_failed=0

plan() {
	tap_planned=$1
	echo "TAP version 13"
	echo "1..$1"
}

# check NAME COMMAND...: one check, which holds when the command succeeds.
check() {
	name=$1
	shift
	tap_made=$((tap_made + 1))
	if "$@"; then
		echo "ok $tap_made - $name"
	else
		tap_failed=$((tap_failed + 1))
		echo "not ok $tap_made - $name"
	fi
}

# skip COUNT WHY: so many checks do not apply.
skip() {
	for _ in $(seq "$1"); do
		tap_made=$((tap_made + 1))
		echo "ok $tap_made # SKIP $2"
	done
}

skip_all() {
	echo "1..0 # SKIP $*"
	exit 4
}

bail() {
	echo "Bail out! $*"
	exit 1
}

note() {
	echo "# $*"
}

finish() {
	[ "$tap_made" = "$tap_planned" ] || bail "$tap_planned checks were planned, $tap_made made"
	[ "$tap_failed" = 0 ]
	exit
}

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# PCs with a BIOS: real mode, SMM, memory that is switched between ROM and RAM, a display whose memory is logged. The
# BIOS starts Linux, which works on memory; nothing is left behind.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh
. /selftests/lib/guest.sh

boot() {
	GUEST_MACHINE=$1,smm=on
	GUEST_OPTIONS="-vga std"
	guest_works /tmp/guest.log && [ "$guest_owner" = rmmu ]
}

plan 4
for machine in pc q35; do
	check "$machine: BIOS and Linux work, owned by rmmu" boot $machine
	check "$machine: VM, roots and page tables are returned" rmmu_idle
done
finish

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The test `nested` on a CPU of which KVM believes that it logs writes (PML), as kvm_intel says of a VM when KVM's MMU is
# set up already. The writes of nested guests must be in the dirty log all the same.

insmod /selftests/modules/late_pml.ko || {
	echo "Bail out! late_pml.ko does not load"
	exit 1
}
/selftests/nested
result=$?
rmmod late_pml
exit $result

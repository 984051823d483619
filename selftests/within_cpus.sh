#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Runs a command on the CPUs that tests may use (Documentation/testing.rst), even if it chooses its CPUs itself: it is
# put into a cpuset, which no choice leaves.

group=/sys/fs/cgroup/within_cpus
mkdir -p $group && echo "$CPUS" > $group/cpuset.cpus && echo $$ > $group/cgroup.procs || exit 1
exec "$@"

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Makes the test VM ready for the benchmark. A file system on a RAM disk, on /mnt: memory files are to be in the page cache
# of a real file system. And quiet: what the kernel does now and then of its own accord would be counted with what is
# measured.

set -e
modprobe brd rd_nr=1 rd_size=400000
modprobe ext4
mke2fs /dev/ram0 > /dev/null
mount -t ext4 -o noatime,noinit_itable /dev/ram0 /mnt

# A scan by khugepaged is worth half a million instructions, one every ten seconds. The first comes in any case. So is each
# flush of the memory cgroups' statistics, every two seconds, which cannot be switched off.
echo 1 > /sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan
echo 4000000000 > /sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs
echo 0 > /proc/sys/vm/dirty_writeback_centisecs
echo 0 > /proc/sys/vm/compaction_proactiveness
echo 3600 > /proc/sys/vm/stat_interval
echo 0 > /proc/sys/kernel/watchdog

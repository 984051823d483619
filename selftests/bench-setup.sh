#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A file system on a RAM disk, on /mnt: the memory files of the benchmark are to be in the page cache of a real file
# system.

set -e
modprobe brd rd_nr=1 rd_size=400000
modprobe ext4
mke2fs /dev/ram0 > /dev/null
mount -t ext4 /dev/ram0 /mnt

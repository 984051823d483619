#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Prepares a configured kernel tree for building modules: prepare-tree.sh TREE RELEASE JOBS COMPILER
set -e
cd "$1"
make -s CC="$4" olddefconfig
exec make -j "$3" CC="$4" KERNELRELEASE="$2" prepare modules_prepare

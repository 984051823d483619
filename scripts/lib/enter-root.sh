#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Becomes a command in a root directory: enter-root.sh ROOT [KIND SOURCE TARGET]... -- COMMAND...
# Each triple shows a host path in the root: "tree" with all that is mounted below it, "rw", or read-only with "ro".
# To be called in a mount namespace of its own, which takes the mounts away when the command ends.
set -e
root=$1
shift
while [ "$1" != -- ]; do
    kind=$1 source=$2 target=$root$3
    shift 3
    if [ -d "$source" ]; then
        mkdir -p "$target"
    elif [ ! -e "$target" ]; then
        mkdir -p "${target%/*}"
        : >"$target"
    fi
    case $kind in
    tree) mount --rbind "$source" "$target" ;;
    rw) mount --bind "$source" "$target" ;;
    ro)
        mount --bind "$source" "$target"
        mount -o remount,bind,ro "$target"
        ;;
    esac
done
shift
exec chroot "$root" "$@"

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Unpacks the kernel source of a linux-source package: unpack-source.sh DEB TREE
# Left out is what no build of ours reads, and what is most of the source: drivers, sound, documentation, device trees.
# Kconfig files and makefiles stay, because the configuration is made of all of them.
set -e
deb=$1 tree=$2
# The name of the package, of its tarball and of the tarball's directory.
name=${deb##*/}
name=${name%%_*}
mkdir -p "$tree"
dpkg-deb --fsys-tarfile "$deb" |
    tar --extract --to-stdout --wildcards "./usr/src/$name.tar.*" |
    tar --extract --xz --directory "$tree" --strip-components=1 --wildcards \
        --exclude="$name/Documentation/*/*" \
        --exclude="$name/drivers/*.[cS]" --exclude="$name/drivers/gpu/drm/*/*.h" \
        --exclude="$name/sound/*.[chS]" \
        --exclude="$name/arch/*/boot/dts/*/*"
test -f "$tree/Kconfig"

#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The steps that make the debug kernel, see debugkernel.py:
#   debug-kernel.sh unpack DEB TREE                  its source, without the drivers that it has none of
#   debug-kernel.sh configure TREE FRAGMENT          .config: the fragment, and Kconfig's defaults
#   debug-kernel.sh build TREE JOBS                  kernel and modules
#   debug-kernel.sh install TREE IMAGE               modules and kernel below IMAGE; objects are deleted
set -e

# Kbuild's arguments: the kernel lets Rust code be checked by KASAN only when clang compiles the rest.
toolchain=LLVM=1

unpack() {
	deb=$1 tree=$2
	# The name of the package, of its tarball and of the tarball's directory.
	name=${deb##*/}
	name=${name%%_*}
	mkdir -p "$tree"
	set --
	for directory in gpu net/ethernet net/wireless media staging infiniband scsi usb iio hid target comedi video/fbdev; do
		set -- "$@" "--exclude=$name/drivers/$directory/*.[cS]"
	done
	dpkg-deb --fsys-tarfile "$deb" |
		tar --extract --to-stdout --wildcards "./usr/src/$name.tar.*" |
		tar --extract --xz --directory "$tree" --strip-components=1 --wildcards "$@" \
			--exclude="$name/Documentation/*/*" \
			--exclude="$name/drivers/gpu/drm/*/*.h" \
			--exclude="$name/sound/*.[chS]" \
			--exclude="$name/arch/*/boot/dts/*/*"
	test -f "$tree/Kconfig"
}

configure() {
	cd "$1"
	make -s $toolchain KCONFIG_ALLCONFIG="$2" alldefconfig
}

build() {
	cd "$1"
	make $toolchain -j "$2" bzImage modules
}

install_image() {
	tree=$1 image=$2
	cd "$tree"
	make -s $toolchain INSTALL_MOD_PATH="$image/usr" INSTALL_MOD_STRIP=1 modules_install
	cp "$(make -s $toolchain image_name)" "$image/usr/lib/modules/$(make -s $toolchain kernelrelease)/vmlinuz"
	# Modules are built with headers, tools, Rust's metadata and vmlinux. Lists of modules would make a directory's sources
	# look unclean to check-hooks.
	find . -path ./tools -prune -o -path ./scripts -prune -o \
		\( -name '*.o' -o -name '*.a' -o -name '*.ko' -o -name '.tmp_vmlinux*' -o -name 'vmlinux.unstripped' \
		-o -name modules.order ! -path ./modules.order \) -exec rm -f {} +
}

case $1 in
unpack) unpack "$2" "$3" ;;
configure) configure "$2" "$3" ;;
build) build "$2" "$3" ;;
install) install_image "$2" "$3" ;;
*)
	echo "usage: debug-kernel.sh unpack|configure|build|install ARGUMENTS..." >&2
	exit 2
	;;
esac

# SPDX-License-Identifier: GPL-2.0
# The commands of rmmu. Kbuild reads the file Kbuild, never this one.

# A user's own kernel: its release, or its prepared source tree.
KVER ?=
KDIR ?=
# "no": build although nobody has compared rmmu with this kernel's MMU.
REVIEWED ?=
export RMMU_REVIEWED := $(REVIEWED)
# The kernel that tests boot: stock, debug, or a release or series that scripts/kernels lists.
KERNEL ?=

.PHONY: install uninstall deb module demo check check-all kernels bench host-test shell setup refresh fmt clean clean-cache help bootstrap
# The scripts make use of all processors themselves, and share directories: one at a time.
.NOTPARALLEL:

module: bootstrap
	@scripts/build-module $(if $(KVER),--kver '$(KVER)') $(if $(KDIR),--kdir '$(KDIR)')

DESTDIR ?=
install: bootstrap
	@scripts/install $(if $(KVER),--kver '$(KVER)') $(if $(DESTDIR),--destdir '$(DESTDIR)')

uninstall: bootstrap
	@scripts/install --uninstall $(if $(DESTDIR),--destdir '$(DESTDIR)')

deb: bootstrap
	@scripts/make-deb

demo: bootstrap
	@scripts/demo

check: bootstrap
	@scripts/check --kernel $(or $(KERNEL),stock)

check-all: bootstrap
	@scripts/check --all --kernel $(or $(KERNEL),stock)

# What to measure by: virtual (instructions) or wall.
CLOCK ?= virtual

kernels: bootstrap
	@scripts/kernels --build

bench: bootstrap
	@scripts/bench --clock '$(CLOCK)'

host-test: bootstrap
	@scripts/host-test

shell: bootstrap
	@scripts/vm shell

setup: bootstrap
	@scripts/setup

refresh: bootstrap
	@scripts/setup --refresh

fmt: bootstrap
	@scripts/host-test --fmt

clean:
	@rm -rf out

clean-cache: bootstrap
	@scripts/setup --clean

bootstrap:
	@scripts/bootstrap

help:
	@echo 'Everything below installs and makes what it needs first; that takes minutes once, and seconds later.'
	@echo
	@echo '  make              build kvm_rmmu.ko for the stock kernel into out/RELEASE/'
	@echo '  make KDIR=TREE    build it for the kernel of a prepared source tree of your own'
	@echo '  make KVER=RELEASE build it for a kernel of Debian (scripts/kernels lists them), or for any other of which'
	@echo '                    /lib/modules/RELEASE/build is a prepared source tree'
	@echo '  make REVIEWED=no  build it although this kernel has an MMU that rmmu was not reviewed against'
	@echo '  make install      install what make built, so that it is loaded with KVM (KVER=, DESTDIR=); uninstall: the opposite'
	@echo '  make deb          the Debian package kvm-rmmu-dkms, which builds the module for each kernel, into out/deb/'
	@echo '  make demo         boot a Linux guest on in-tree KVM and on rmmu, side by side'
	@echo '  make check        all that CI tests: host tests, lints, module build, tests in the VM'
	@echo '  make check KERNEL=debug  the tests in the VM, on a kernel that checks memory, locks, RCU and leaks (hours)'
	@echo '  make check-all    every test in every mode; writes out/selftests.tsv'
	@echo '  make kernels      build it for every kernel of scripts/supported-kernels that the archive has (an hour, once)'
	@echo '  make bench        measure rmmu against in-tree KVM by instructions (CLOCK=wall: by time)'
	@echo '  make host-test    tests and lints of the engine, without a VM'
	@echo '  make shell        a shell in the test VM with the module loaded'
	@echo '  make setup        only install and make what is needed'
	@echo '  make refresh      the same, after asking apt for newer packages and a newer kernel'
	@echo '  make fmt          format the Rust files'
	@echo '  make clean        delete out/'
	@echo '  make clean-cache  delete the build root and all else that is kept in the cache'
	@echo
	@echo 'Environment: XDG_CACHE_HOME (where the cache is; default ~/.cache), RMMU_MIRROR (the Debian mirror to use).'

# SPDX-License-Identifier: GPL-2.0
"""What a test VM is made from: the build root, the stock kernel, and the kernel that boots, with its modules."""

from dataclasses import dataclass
from pathlib import Path

import buildroot
import debugkernel
import emulator
import kernel
import suitekernel
import ui
import vmxemulator

KERNELS = ("stock", "debug")


@dataclass
class Environment:
    """`kernel` is the stock kernel, which Linux guests run, and `booted` the one that the test VM runs.

    `builder` has the compilers of the booted kernel, for modules. Upstream's tests come from the source of `tests_of`.
    """

    root_handle: buildroot.Root
    kernel: kernel.Kernel
    booted: kernel.Kernel
    builder: buildroot.Root
    tests_of: kernel.Kernel

    @property
    def root(self):
        return self.root_handle.path

    @property
    def vmlinuz(self):
        return self.booted.vmlinuz

    @property
    def modules_dir(self):
        return self.booted.modules_dir

    @property
    def busybox(self):
        return Path(self.root) / "usr/bin/busybox"

    @property
    def suffix(self):
        """For the names of what is made for the booted kernel, so that each has its own."""
        if self.booted.debug:
            return "-debug"
        return "" if self.booted is self.kernel else f"-{self.booted.release}"

    def mended_qemu(self):
        """QEMU with mended SVM emulation, made if need be."""
        return emulator.ensure(self.root_handle)

    def bochs(self):
        """The directory of Bochs, made if need be."""
        return vmxemulator.ensure(self.root_handle)


def ensure(which="stock"):
    """The environment with one of KERNELS in the test VM, or with the kernel of that release, or with the newest one of
    that series; made if need be."""
    root, stock = kernel.set_up()
    if which == "debug":
        return Environment(root, stock, debugkernel.ensure(root), root, stock)
    if which in ("stock", stock.release):
        return Environment(root, stock, stock, root, stock)
    found = suitekernel.find_release(which) or suitekernel.newest(which)
    if not found:
        raise ui.Error(f"there is no kernel {which}: 'scripts/kernels' lists those that the archive has.")
    builder, booted = suitekernel.ensure(found, boots=True)
    return Environment(root, stock, booted, builder, booted)

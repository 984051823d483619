# SPDX-License-Identifier: GPL-2.0
"""What a test VM is made from: the build root, the stock kernel, and the kernel that boots, with its modules."""

from dataclasses import dataclass
from pathlib import Path

import buildroot
import debugkernel
import emulator
import kernel
import vmxemulator

KERNELS = ("stock", "debug")


@dataclass
class Environment:
    """`kernel` is the stock kernel: upstream's tests come from its source, and Linux guests run it."""

    root_handle: buildroot.Root
    kernel: kernel.Kernel
    booted: kernel.Kernel

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

    def mended_qemu(self):
        """QEMU with mended SVM emulation, made if need be."""
        return emulator.ensure(self.root_handle)

    def bochs(self):
        """The directory of Bochs, made if need be."""
        return vmxemulator.ensure(self.root_handle)


def ensure(which="stock"):
    """The environment with one of KERNELS in the test VM, made if need be."""
    root, stock = kernel.set_up()
    return Environment(root, stock, debugkernel.ensure(root) if which == "debug" else stock)

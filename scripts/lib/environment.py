# SPDX-License-Identifier: GPL-2.0
"""What a test VM is made from: the build root, the stock kernel and its modules."""

from dataclasses import dataclass
from pathlib import Path

import buildroot
import emulator
import kernel


@dataclass
class Environment:
    root_handle: buildroot.Root
    kernel: kernel.Kernel

    @property
    def root(self):
        return self.root_handle.path

    @property
    def vmlinuz(self):
        return self.kernel.vmlinuz

    @property
    def modules_dir(self):
        return self.kernel.modules_dir

    @property
    def busybox(self):
        return Path(self.root) / "usr/bin/busybox"

    def mended_qemu(self):
        """QEMU with mended SVM emulation, made if need be."""
        return emulator.ensure(self.root_handle)


def ensure():
    """The environment, made if need be."""
    root = buildroot.ensure()
    return Environment(root, kernel.ensure(root))


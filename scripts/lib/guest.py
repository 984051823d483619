# SPDX-License-Identifier: GPL-2.0
"""The Linux guest that runs inside the test VM: QEMU with its libraries, a kernel and an initramfs."""


def files(environment):
    """What to put into the test VM: [(guest path, host path)]."""
    return []

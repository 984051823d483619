# SPDX-License-Identifier: GPL-2.0
"""The Linux guest that runs inside the test VM: QEMU with its libraries, the stock kernel, an initramfs."""

import re
from pathlib import Path

import cache
import initramfs
import owntests
import ui

QEMU = "/usr/bin/qemu-system-x86_64"
# What QEMU's machines read besides the kernel: microvm, and PCs with a display.
FIRMWARE = ("/usr/share/seabios/bios-microvm.bin", "/usr/share/qemu/qboot.rom", "/usr/share/qemu/linuxboot_dma.bin",
            "/usr/share/qemu/pvh.bin", "/usr/share/seabios/bios-256k.bin", "/usr/share/seabios/vgabios-stdvga.bin",
            "/usr/share/qemu/kvmvapic.bin")
INIT = owntests.SOURCE / "guest" / "linux-guest-init"
# For a guest that runs guests itself. Its initramfs is made in the test VM, which has all it takes.
HYPERVISOR_INIT = owntests.SOURCE / "guest" / "hypervisor-init"


def files(environment):
    """What to put into the test VM: [(guest path, host path)]."""
    return [
        *((path, _in_root(environment, path)) for path in [QEMU, *_libraries(environment), *FIRMWARE]),
        ("/guest/vmlinuz", environment.kernel.vmlinuz),
        ("/guest/initrd", _initrd(environment)),
        ("/guest/hypervisor-init", HYPERVISOR_INIT),
    ]


def _in_root(environment, path):
    # Links such as /lib are absolute in some roots, and must be followed inside the root.
    path = Path(path)
    if path.parts[1] in ("lib", "lib64"):
        path = Path("/usr") / path.relative_to("/")
    return (Path(environment.root) / path.relative_to("/")).resolve()


def _libraries(environment):
    listing = environment.root_handle.run(["ldd", QEMU], capture=True).stdout
    if "not found" in listing:
        raise ui.Error(f"QEMU in the build root misses libraries:\n{listing}")
    return re.findall(r"(/\S+) \(0x", listing)


def _initrd(environment):
    def build(directory):
        archive = initramfs.Archive()
        archive.file("/bin/busybox", environment.busybox, 0o755)
        archive.file("/init", INIT, 0o755)
        archive.device("/dev/console", 5, 1)
        archive.write(directory / "initrd")

    key = cache.file_key(INIT, environment.busybox, initramfs.__file__)
    return cache.keyed("initramfs-guest", key, build=build) / "initrd"

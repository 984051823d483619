# SPDX-License-Identifier: GPL-2.0
"""Bochs, which emulates a CPU with VMX, for the modes in which KVM is kvm_intel.

It is built from Debian's source, with what the test VM uses and nothing else, and with small edits: see FAULTS. It runs
from the command line, has no display, and its firmware is ours (scripts/vmx/firmware.S).
"""

import shutil

import buildroot
import cache
import emulator
import ui
from emulator import Fault

PACKAGE = "bochs"
# The version whose source the edits are for.
VERSION = "3.0+dfsg-1"
NAME = "bochs"
FIRMWARE = "firmware.bin"
FIRMWARE_SOURCE = buildroot.PROJECT / "scripts/vmx/firmware.S"
GIGABYTES = 2

FAULTS = [
    Fault(
        "A RAM image is read to consecutive addresses of the host, and only its first block becomes memory of the "
        "machine.",
        "memory/misc_mem.cc",
        "    ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size);\n",
        "    unsigned long room = BX_MEM_THIS block_size - offset % BX_MEM_THIS block_size;\n"
        "    ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size < room ? size : room);\n",
    ),
    Fault(
        "A byte on the serial line takes its time. The console's text alone would take seconds of each boot.",
        "iodev/serial.cc",
        "        BX_SER_THIS s[port].databyte_usec = (Bit32u)(1000000.0 / BX_SER_THIS s[port].baudrate *\n"
        "                                                     (BX_SER_THIS s[port].line_cntl.wordlen_sel + 7));\n",
        "        BX_SER_THIS s[port].databyte_usec = 2;\n",
    ),
    Fault(
        "With that a port without input would be asked for some each 2 us.",
        "iodev/serial.cc",
        "      if (!BX_SER_THIS s[port].fifo_cntl.enable) {\n"
        "        db_usec = 100000; // Poll frequency is 100ms\n"
        "      }\n",
        "      db_usec = BX_SER_THIS s[port].line_status.rxdata_ready ? 100 : 1000;\n",
    ),
    Fault(
        "VM entry decides which events are masked while the CPU is not in the guest yet. In a guest that has interrupts "
        "off, external interrupts do not exit then.",
        "cpu/vmx.cc",
        "  BX_CPU_THIS_PTR in_vmx_guest = true;\n",
        "  BX_CPU_THIS_PTR in_vmx_guest = true;\n  handleInterruptMaskChange();\n",
    ),
    Fault(
        "With accessed and dirty bits of EPT off, the CPU sets those in a guest's entry where EPT allows no write. "
        "Here: which entries of the guest are walked.",
        "cpu/paging.cc",
        "        entry_addr[leaf] = translate_guest_physical(entry_addr[leaf], laddr, true",
        "        walked_address = laddr, walked_entry[leaf] = entry_addr[leaf],\n"
        "        entry_addr[leaf] = translate_guest_physical(entry_addr[leaf], laddr, true",
        count=3,
    ),
    Fault(
        "The same: where they are remembered, and the write.",
        "cpu/paging.cc",
        "void BX_CPU_C::TLB_flush(void)\n",
        "static bx_address walked_address;\n"
        "static bx_phy_address walked_entry[5];\n"
        "#define MAY_WRITE_ENTRY(level) \\\n"
        "  if (BX_CPU_THIS_PTR in_vmx_guest && BX_CPU_THIS_PTR vmcs.vmexec_ctrls2.EPT_ENABLE() && \\\n"
        "      !(BX_CPU_THIS_PTR vmcs.eptptr & 0x40)) \\\n"
        "    translate_guest_physical(walked_entry[level], walked_address, true, true, 0, 0, 0, BX_WRITE)\n\n"
        "void BX_CPU_C::TLB_flush(void)\n",
    ),
    Fault(
        "The same: entries that lead to tables.",
        "cpu/paging.cc",
        "    if (!(entry[level] & 0x20)) {\n      entry[level] |= 0x20;\n",
        "    if (!(entry[level] & 0x20)) {\n      MAY_WRITE_ENTRY(level);\n      entry[level] |= 0x20;\n",
    ),
    Fault(
        "The same: entries that lead to tables of 32-bit paging.",
        "cpu/paging.cc",
        "    if (!(entry[BX_LEVEL_PDE] & 0x20)) {\n",
        "    if (!(entry[BX_LEVEL_PDE] & 0x20)) {\n      MAY_WRITE_ENTRY(BX_LEVEL_PDE);\n",
    ),
    Fault(
        "The same: entries that lead to pages.",
        "cpu/paging.cc",
        "  if (!(entry[leaf] & 0x20) || set_dirty) {\n",
        "  if (!(entry[leaf] & 0x20) || set_dirty) {\n    MAY_WRITE_ENTRY(leaf);\n",
        count=2,
    ),
]

BUILD_PACKAGES = ["bzip2", "g++", "gcc", "libc6-dev", "make", "xz-utils"]

# Its 128-bit division reads through pointers of another type than what they point to. The compiler may take it that
# nobody does so, and divides wrongly.
FLAGS = "-O2 -fno-strict-aliasing"
CONFIGURE = ["--with-nogui", "--enable-smp", "--enable-x86-64", "--enable-vmx=2", "--enable-protection-keys",
             "--enable-avx", "--enable-evex", "--enable-all-optimizations", "--enable-large-ramfile",
             "--enable-long-phy-address", "--disable-logging", "--disable-debugger", "--disable-docbook",
             "--disable-xpm", "--disable-plugins", "--disable-cdrom", f"CFLAGS={FLAGS}", f"CXXFLAGS={FLAGS}"]


def ensure(root):
    """The directory with NAME and FIRMWARE, made if need be; it runs with the libraries of the build root."""
    recipe = [[fault.file, fault.old, fault.new, fault.count] for fault in FAULTS]
    return cache.keyed("bochs", VERSION, recipe, CONFIGURE, cache.file_key(FIRMWARE_SOURCE), root.is_host,
                       build=_build)


def _build(directory):
    cache.require_space(GIGABYTES, "building Bochs")
    source = directory / "source"
    with ui.step("Bochs: fetching Debian's source", log=cache.log_path("bochs")) as step:
        found = emulator.unpack_source(PACKAGE, VERSION, directory / "archive", source, step)
    root = buildroot.make_for(BUILD_PACKAGES, directory / "rootfs", "Bochs's build", cache.log_path("bochs-root"))
    emulator.mend(f"Bochs {found}", FAULTS, source, __file__)
    with ui.step("Bochs: building it, for modes with VMX (3 to 10 minutes)", log=cache.log_path("bochs-build")) as step:
        root.run(["./configure", *CONFIGURE], cwd=source, log=step)
        root.run(["make", "-j", ui.jobs(), NAME], cwd=source, log=step)
        root.run(["strip", source / NAME], log=step)
        root.run(["gcc", "-c", "-o", directory / "firmware.o", FIRMWARE_SOURCE], log=step)
        root.run(["objcopy", "-O", "binary", "-j", ".text", directory / "firmware.o", directory / FIRMWARE], log=step)
    shutil.copy2(source / NAME, directory / NAME)
    (directory / "version").write_text(f"{found}\n")
    for path in (source, directory / "archive", directory / "rootfs", directory / "firmware.o"):
        cache.remove_tree(path)

# SPDX-License-Identifier: GPL-2.0
"""The kernel as it lies in the memory of a machine without boot loader, with all that it is told about the machine.

It is not unpacked by the machine, which would take seconds: the ELF file inside vmlinuz is laid out here, and entered
by the 64-bit boot protocol (Documentation/arch/x86/boot.rst in the kernel). There is no BIOS either: memory is in the
protocol's own table, and processors and interrupts are in a table of Intel's MultiProcessor Specification 1.4.
"""

import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import ui

MIB = 1 << 20
# Addresses that scripts/vmx/firmware.S knows.
PARAMS = 0x100000
PAGE_TABLES = PARAMS + 0x1000
CMDLINE = PARAMS + 0x8000
# Offsets in the page at PARAMS, behind what the kernel looks at.
FIRST_START, ENTRY = 0xFE8, 0xFF8
# The kernel looks for the table at the end of the first 640 KiB.
MP_TABLE = 0x9FC00

_RAM, _RESERVED = 1, 2
_HUGE = 2 * MIB
_HEADER = slice(0x1F1, 0x281)


@dataclass
class Image:
    """Some bytes at an address."""

    address: int
    data: bytes


def images(vmlinuz, initrd, cmdline, memory, cpus):
    """What to put into a machine's memory: [Image]. `memory` is the ranges of RAM above the first MiB, (start, size)."""
    boot = Path(vmlinuz).read_bytes()
    kernel, entry, end = _kernel(boot, vmlinuz)
    initrd_address = -(-end // _HUGE) * _HUGE
    data = Path(initrd).read_bytes()
    first = memory[0]
    if initrd_address + len(data) > first[0] + first[1]:
        raise ui.Error(f"{first[1] // MIB} MiB of memory do not hold the kernel and its {len(data) // MIB} MiB of initrd.")
    params = _params(boot, entry, (initrd_address, len(data)), memory) + _page_tables()
    params += bytes(CMDLINE - PARAMS - len(params)) + cmdline.encode() + b"\0"
    return [Image(PARAMS, params), kernel, Image(initrd_address, data), Image(MP_TABLE, _mp_table(cpus))]


def _kernel(boot, name):
    """The ELF file in vmlinuz as an image, its entry, and the end of the memory that it uses at first."""
    setup = (boot[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", boot, 0x248)
    # The last four bytes say how long it is unpacked.
    payload = boot[setup + offset:setup + offset + length - 4]
    if not payload.startswith(b"\x28\xb5\x2f\xfd"):
        raise ui.Error(f"{name} is not compressed with zstd, and nothing else is unpacked here: see {__file__}")
    elf = subprocess.run(["zstd", "-dc"], input=payload, stdout=subprocess.PIPE, check=True).stdout
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    count, = struct.unpack_from("<H", elf, 56)
    parts = [struct.unpack_from("<IIQQQQQQ", elf, headers + 56 * index) for index in range(count)]
    parts = [(address, offset, size) for kind, _, offset, _, address, size, _, _ in parts if kind == 1]
    start = min(address for address, _, _ in parts)
    memory = bytearray(max(address + size for address, _, size in parts) - start)
    for address, offset, size in parts:
        memory[address - start:address - start + size] = elf[offset:offset + size]
    needed, = struct.unpack_from("<I", boot, 0x260)
    return Image(start, bytes(memory)), entry, start + max(needed, len(memory))


def _params(boot, entry, initrd, memory):
    """struct boot_params."""
    page = bytearray(0x1000)
    page[_HEADER] = boot[_HEADER]
    page[0x210] = 0xFF  # a boot loader without a number of its own
    struct.pack_into("<II", page, 0x218, *initrd)
    struct.pack_into("<I", page, 0x228, CMDLINE)
    ranges = [(0, MP_TABLE, _RAM), (MP_TABLE, 0xA0000 - MP_TABLE, _RESERVED), *((*part, _RAM) for part in memory)]
    page[0x1E8] = len(ranges)
    for index, part in enumerate(ranges):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * index, *part)
    struct.pack_into("<I", page, FIRST_START, 1)
    struct.pack_into("<Q", page, ENTRY, entry)
    return page


def _page_tables():
    """Tables that map the first 4 GiB to themselves in pages of 2 MiB."""
    present = 3
    tables = bytearray(6 * 0x1000)
    struct.pack_into("<Q", tables, 0, PAGE_TABLES + 0x1000 | present)
    for index in range(4):
        struct.pack_into("<Q", tables, 0x1000 + 8 * index, PAGE_TABLES + 0x2000 + 0x1000 * index | present)
    for index in range(2048):
        struct.pack_into("<Q", tables, 0x2000 + 8 * index, index * _HUGE | 0x80 | present)
    return tables


def _mp_table(cpus):
    """The processors, an I/O APIC behind them in number, and the ISA interrupts: 0 goes to its pin 2, others to theirs."""
    bus, io_apic = 0, cpus
    entries = [struct.pack("<BBBBII8x", 0, cpu, 0x14, 3 if cpu == 0 else 1, 0x600, 0x201) for cpu in range(cpus)]
    entries.append(struct.pack("<BB6s", 1, bus, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, io_apic, 0x11, 1, 0xFEC00000))
    entries += [struct.pack("<BBHBBBB", 3, 0, 0, bus, irq, io_apic, irq or 2) for irq in range(16) if irq != 2]
    # The local APICs' pins: the old interrupt controller, and NMI.
    entries += [struct.pack("<BBHBBBB", 4, kind, 0, bus, 0, 0xFF, pin) for kind, pin in ((3, 0), (1, 1))]
    body = b"".join(entries)
    table = bytearray(struct.pack("<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), 4, 0, b"RMMU    ", b"BOCHS       ", 0, 0,
                                  len(entries), 0xFEE00000, 0, 0, 0) + body)
    table[7] = -sum(table) % 256
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", MP_TABLE + 16, 1, 4, 0))
    pointer[10] = -sum(pointer) % 256
    return bytes(pointer + table)

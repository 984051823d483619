# SPDX-License-Identifier: GPL-2.0
"""Just enough of a reader of 64-bit little-endian ELF files: sections, symbols and relocations."""

import struct
from dataclasses import dataclass

import ui

SHT_SYMTAB = 2
SHT_RELA = 4
SHF_EXECINSTR = 4
STT_FUNC = 2
STB_GLOBAL = 1


@dataclass
class Section:
    index: int
    name: str
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int


@dataclass
class Symbol:
    name: str
    type: int
    bind: int
    section: int
    value: int
    size: int


@dataclass
class Relocation:
    offset: int
    type: int
    symbol: Symbol
    addend: int


class Elf:
    """An object file, a module or a vmlinux."""

    def __init__(self, data, name):
        if data[:6] != b"\x7fELF\x02\x01":
            raise ui.Error(f"{name} is not a 64-bit ELF file")
        self.data = data
        start, = struct.unpack_from("<Q", data, 40)
        size, count, names = struct.unpack_from("<HHH", data, 58)
        raw = [struct.unpack_from("<IIQQQQIIQQ", data, start + index * size) for index in range(count)]
        strings = raw[names][4]
        self.sections = [Section(index, self._string(strings + name), kind, flags, offset, length, link, info)
                         for index, (name, kind, flags, _, offset, length, link, info, _, _) in enumerate(raw)]
        self.symbols = []
        for section in self.sections:
            if section.type == SHT_SYMTAB:
                self.symbols = list(self._read_symbols(section))

    def _string(self, offset):
        return self.data[offset:self.data.index(b"\0", offset)].decode()

    def _read_symbols(self, section):
        strings = self.sections[section.link].offset
        for name, info, _, index, value, size in struct.iter_unpack("<IBBHQQ", self.content(section)):
            yield Symbol(self._string(strings + name), info & 15, info >> 4, index, value, size)

    def content(self, section):
        """The bytes of a section."""
        return self.data[section.offset:section.offset + section.size]

    def section(self, name):
        """The content of a section by its name; None if there is none."""
        return next((self.content(section) for section in self.sections if section.name == name), None)

    def relocations(self):
        """Pairs of a section and its relocations."""
        for section in self.sections:
            if section.type == SHT_RELA:
                yield self.sections[section.info], [
                    Relocation(offset, info & 0xffffffff, self.symbols[info >> 32], addend)
                    for offset, info, addend in struct.iter_unpack("<QQq", self.content(section))]

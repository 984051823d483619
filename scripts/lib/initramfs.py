# SPDX-License-Identifier: GPL-2.0
"""Write an initramfs: a newc cpio archive, uncompressed, with no root needed.

The kernel accepts several archives one after the other, so an archive may be
appended to another; each is padded to a multiple of 512 bytes.
"""

import lzma
import os
import shutil
import stat
import subprocess
from pathlib import Path, PurePosixPath

import ui


class Archive:
    """A cpio archive in the making. Parents of what is added come by themselves."""

    def __init__(self):
        self._entries = {}

    def directory(self, path, mode=0o755):
        self._add(path, stat.S_IFDIR | mode, b"")

    def symlink(self, path, target):
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path, major, minor, mode=0o600):
        self._add(path, stat.S_IFCHR | mode, b"", (major, minor))

    def data(self, path, content, mode=0o644):
        if isinstance(content, str):
            content = content.encode()
        self._add(path, stat.S_IFREG | mode, content)

    def file(self, path, source, mode=None):
        source = Path(source)
        if mode is None:
            mode = stat.S_IMODE(source.stat().st_mode)
        self._add(path, stat.S_IFREG | mode, source)

    def tree(self, path, source):
        """Everything under the directory `source`, below `path`."""
        for directory, _, names in os.walk(source):
            below = PurePosixPath(path) / PurePosixPath(directory).relative_to(source)
            self.directory(below)
            for name in names:
                self.file(below / name, Path(directory) / name)

    def __contains__(self, path):
        return str(PurePosixPath("/") / path) in self._entries

    def _add(self, path, mode, content, rdev=(0, 0)):
        path = PurePosixPath("/") / path
        for parent in reversed(path.parents):
            if str(parent) != "/":
                self._entries.setdefault(str(parent), (stat.S_IFDIR | 0o755, b"", (0, 0)))
        self._entries[str(path)] = (mode, content, rdev)

    def write(self, target):
        with open(target, "wb") as out:
            for inode, (path, (mode, content, rdev)) in enumerate(self._entries.items(), 1):
                if isinstance(content, Path):
                    with open(content, "rb") as source:
                        size = os.fstat(source.fileno()).st_size
                        _header(out, path, inode, mode, size, rdev)
                        shutil.copyfileobj(source, out, 1 << 20)
                else:
                    _header(out, path, inode, mode, len(content), rdev)
                    out.write(content)
                _pad(out, 4)
            _header(out, "/TRAILER!!!", 0, 0, 0, (0, 0))
            _pad(out, 512)


def _header(out, path, inode, mode, size, rdev):
    name = path.lstrip("/").encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, size, 0, 0, rdev[0], rdev[1], len(name), 0)
    out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
    _pad(out, 4)


def _pad(out, unit):
    out.write(b"\0" * (-out.tell() % unit))


class ModuleTree:
    """The kernel modules of one release, to be packed with what they depend on.

    Without their signatures the kernel does not spend seconds on them where it is emulated slowly.
    """

    def __init__(self, directory, signed=True):
        self.directory = Path(directory)
        self.signed = signed
        self.depends = {}
        self.names = {}
        for line in (self.directory / "modules.dep").read_text().splitlines():
            path, _, needs = line.partition(":")
            self.depends[path] = needs.split()
            self.names[_module_name(path)] = path
        builtin = (self.directory / "modules.builtin").read_text().splitlines()
        self.builtin = {_module_name(path) for path in builtin}

    def has(self, name):
        """Whether the kernel has this module, in it or beside it."""
        name = name.replace("-", "_")
        return name in self.builtin or name in self.names

    def pack(self, archive, names):
        """Add the modules `names` and all they need, and a modules.dep for modprobe."""
        release = self.directory.name
        wanted = {}
        for name in names:
            name = name.replace("-", "_")
            if name in self.builtin:
                continue
            if name not in self.names:
                raise ui.Error(f"the kernel {release} has no module {name}, which the test VM loads.")
            path = self.names[name]
            for item in [path, *self.depends[path]]:
                wanted[item] = self.depends[item]
        lines = []
        for path, needs in wanted.items():
            data = _unpacked(self.directory / path)
            archive.data(f"/lib/modules/{release}/{_plain(path)}", data if self.signed else _unsigned(data))
            lines.append(f"{_plain(path)}: {' '.join(_plain(need) for need in needs)}")
        archive.data(f"/lib/modules/{release}/modules.dep", "\n".join(lines) + "\n")


def _module_name(path):
    return PurePosixPath(path).name.split(".")[0].replace("-", "_")


def _plain(path):
    return path[: path.index(".ko") + 3]


# How a signed module ends; its length is in the four bytes before.
_SIGNED = b"~Module signature appended~\n"
_SIGNATURE_HEADER = 12


def _unsigned(module):
    if not module.endswith(_SIGNED):
        return module
    end = len(module) - len(_SIGNED)
    return module[:end - _SIGNATURE_HEADER - int.from_bytes(module[end - 4:end], "big")]


def _unpacked(path):
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", str(path)], check=True, stdout=subprocess.PIPE).stdout
    return path.read_bytes()

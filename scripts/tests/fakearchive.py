# SPDX-License-Identifier: GPL-2.0
"""An archive that exists only in a test: apt, mmdebstrap and the commands in the build root, played over a description.

run() stands for the programs that the set-up runs on the host, play() for what runs in the build root. Both read the
description, a JSON file, anew each time, so that a test moves the archive by changing it.
"""

import contextlib
import io
import json
import re
from pathlib import Path

RELEASE = "7.2.12+deb14-amd64"
COMPILER = "gcc-16-for-host"
SYMBOL = "_RNvCs{hash}_6kernel1f"
CONFIG = {
    "CONFIG_CC_VERSION_TEXT": '"x86_64-linux-gnu-gcc-16 (Debian 16.2.0-3) 16.2.0"', "CONFIG_CC_IS_GCC": "y",
    "CONFIG_GCC_VERSION": "160200", "CONFIG_CLANG_VERSION": "0", "CONFIG_AS_VERSION": "24750", "CONFIG_LD_VERSION": "24750",
    "CONFIG_LLD_VERSION": "0", "CONFIG_RUSTC_VERSION": "109701", "CONFIG_RUSTC_LLVM_VERSION": "220108",
    "CONFIG_RUSTC_LLVM_MAJOR_VERSION": "22", "CONFIG_PAHOLE_VERSION": "132",
    "CONFIG_RUSTC_VERSION_TEXT": '"rustc 1.97.1"', "CONFIG_BINDGEN_VERSION_TEXT": '"bindgen 0.72.1"',
    "CONFIG_CC_HAS_COUNTED_BY": "y", "CONFIG_RUSTC_HAS_SPAN_FILE": "y", "CONFIG_PAHOLE_HAS_LANG_EXCLUDE": "y",
    "CONFIG_KVM": "m", "CONFIG_RUST": "y", "CONFIG_FUNCTION_ALIGNMENT": "16", "CONFIG_BUILD_SALT": '"7.2.12"',
}


def kernel_packages(release=RELEASE, version="7.2.12-1", compiler=COMPILER):
    """The packages of a stock kernel: name -> fields."""
    series = re.match(r"\d+\.\d+", version)[0]
    return {
        f"linux-image-{release}": {"Version": version,
                                   "Depends": f"linux-binary-{release} (= {version}), linux-modules-{release}"},
        f"linux-binary-{release}": {"Version": version},
        f"linux-modules-{release}": {"Version": version},
        f"linux-headers-{release}": {"Version": version, "Depends": f"linux-base, {compiler} (>= 16), pahole"},
        f"linux-source-{series}": {"Version": version},
    }


def world(names):
    """An archive in which all is well, with these packages besides a kernel's."""
    return {
        "packages": {**{name: {"Version": "1.0-1"} for name in names}, **kernel_packages(), COMPILER: {"Version": "16.2.0-3"}},
        # What other suites have that differs from the packages above; None for what they have not.
        "suites": {},
        # What apt-get update says, once for each time that it is asked; nothing when it succeeds.
        "update": [],
        "update_always": "",
        # Packages whose download fails, although they are listed.
        "gone": [],
        "sources": {"qemu": ["1.0-1"]},
        # What mmdebstrap installs that is not what apt offered.
        "installed": {},
        # What the packages of the kernel leave out, and how the tree comes out of its preparation.
        "missing_files": [],
        "tree_config": {},
        "stock_symbol": SYMBOL.format(hash="abc"),
        "tree_symbols": [SYMBOL.format(hash="abc")],
        "fails": {},
        "asked": 0,
    }


class World:
    """The description, read and written."""

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self):
        self.data = json.loads(self.path.read_text())
        return self.data

    def __exit__(self, *_):
        self.path.write_text(json.dumps(self.data))


def play(world_file, argv):
    """A command in the build root; its exit code."""
    data = json.loads(Path(world_file).read_text())
    argv = [str(word) for word in argv]
    program = Path(argv[0]).name
    if program in data["fails"]:
        return 1
    if program == "dpkg-deb":
        _extract(data, Path(argv[2]).name, Path(argv[3]))
    elif program == "unpack-source.sh":
        (Path(argv[2]) / "rust").mkdir(parents=True)
    elif program == "prepare-tree.sh":
        tree = Path(argv[1])
        _write_config(tree / ".config", {**CONFIG, **data["tree_config"]})
        (tree / "rust" / "exports_kernel_generated.h").write_text(
            "".join(f"EXPORT_SYMBOL_RUST_GPL({name});\n" for name in data["tree_symbols"]))
    elif program != "depmod":
        raise AssertionError(f"the build root is asked to run {argv}")
    return 0


def _extract(data, deb, image):
    release = re.fullmatch(r"linux-[a-z]+-([^_]*)_.*\.deb", deb)[1]
    files = {}
    if deb.startswith("linux-image-"):
        files[f"usr/lib/modules/{release}/vmlinuz"] = ""
    if deb.startswith("linux-headers-"):
        headers = f"usr/src/linux-headers-{release}"
        files[f"{headers}/.config"] = None
        files[f"{headers}/Module.symvers"] = f"0x1\t{data['stock_symbol']}\tvmlinux\tEXPORT_SYMBOL_GPL\t\n"
    for name, text in files.items():
        if Path(name).name in data["missing_files"]:
            continue
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            _write_config(image / name, CONFIG)
        else:
            (image / name).write_text(text)


def _write_config(path, options):
    path.write_text("".join(f"# {name} is not set\n" if value == "n" else f"{name}={value}\n"
                            for name, value in options.items() if value is not None))


def _update(data, argv):
    data["asked"] += 1
    message = data["update"].pop(0) if data["update"] else data["update_always"]
    if "is expired" in message and "Acquire::Check-Valid-Until=false" in argv:
        return 0
    print(message)
    return 100 if message else 0


def _show(data, names):
    for name in names:
        if name in data["packages"]:
            print("\n".join([f"Package: {name}", *(f"{key}: {value}" for key, value in data["packages"][name].items())]) + "\n")


def _download(data, wanted):
    for item in wanted:
        name, _, version = item.partition("=")
        if name in data["gone"] or data["packages"].get(name, {}).get("Version") != version:
            print(f"E: Version '{version}' for '{name}' was not found")
            return 100
        Path(f"{name}_{version}_amd64.deb").touch()
    return 0


def _source(data, item):
    name, _, version = item.partition("=")
    if item in data["gone"] or version not in data["sources"].get(name, []):
        return 100
    Path(f"{name}_{version}.orig.tar.xz").touch()
    return 0


def _mmdebstrap(data, target, include):
    status = Path(target) / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    for extra in ("updates", "info"):
        (status.parent / extra).mkdir()
    versions = {name: data["packages"][name]["Version"] for name in include} | data["installed"]
    status.write_text("".join(
        f"Package: {name}\nStatus: install ok installed\nArchitecture: amd64\nMaintainer: nobody <nobody@localhost>\n"
        f"Version: {version}\nDescription: nothing\n\n" for name, version in versions.items()))


PROGRAMS = ("apt-get", "apt-cache", "apt-config", "mmdebstrap", "sync")


def run(world_file, command, cwd=None):
    """One of the host's programs, by its command; exit code and output."""
    words = [str(word) for word in command]
    while words[0] == "env" or "=" in words[0]:
        del words[0]
    output = io.StringIO()
    suite = next((match[1] for word in words if (match := re.search(r"/apt/([^/]+)/state$", word))), "")
    with World(world_file) as data, contextlib.redirect_stdout(output), contextlib.chdir(cwd or "."):
        usual = data["packages"]
        differs = data["suites"].get(suite if words[0] != "mmdebstrap" else _target_suite(words), {})
        data["packages"] = {name: fields for name, fields in (usual | differs).items() if fields}
        code = _run(data, *words)
        data["packages"] = usual
    return code, output.getvalue()


def _target_suite(argv):
    return [word for word in argv if not word.startswith("-")][1]


def _run(data, program, *argv):
    if program in data["fails"]:
        print(data["fails"][program])
        return 1
    words = [word for before, word in zip(("", *argv), argv) if before != "-o" and not word.startswith("-")]
    if program == "mmdebstrap":
        include = next(word for word in argv if word.startswith("--include=")).partition("=")[2].split(",")
        _mmdebstrap(data, words[1], include)
        return 0
    if program in ("apt-config", "sync"):
        return 0
    match words[0]:
        case "update":
            return _update(data, argv)
        case "show":
            _show(data, words[1:])
        case "pkgnames":
            print("\n".join(name for name in data["packages"] if name.startswith(words[1])))
        case "showsrc":
            print("\n\n".join(f"Package: {words[1]}\nVersion: {version}" for version in data["sources"].get(words[1], [])))
        case "download":
            return _download(data, words[1:])
        case "source":
            return _source(data, words[1])
        case "indextargets":
            print("http://mirror.invalid/debian\tDebian\tDebian\tbookworm")
        case _:
            raise AssertionError(f"the host is asked to run {program} {argv}")
    return 0

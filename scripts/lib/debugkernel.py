# SPDX-License-Identifier: GPL-2.0
"""The debug kernel: the stock kernel's source with a small configuration that checks nearly everything it does.

It is built from the linux-source package of the stock kernel, so the two are of one version. scripts/debug.config has
the options that matter, with the reasons; Kconfig's defaults fill in the rest.
"""

import re
import shutil
from pathlib import Path

import archive
import buildroot
import cache
import kernel
import ui

LIB = Path(__file__).resolve().parent
RECIPE = LIB / "debug-kernel.sh"
FRAGMENT = LIB.parent / "debug.config"
GIGABYTES = 6
# Packages of the build root that what comes out depends on; others may change without a new build.
TOOLS = ("bindgen", "clang", "libelf-dev", "lld", "llvm", "pahole", "rust-src", "rustc")

# A kernel that checks everything, in an emulator: how many times longer a test may take.
TIME_FACTOR = 8
# Every report of KASAN, not only the first. What CPUs do wrong is no concern of an emulator's. With five levels KASAN
# reports good addresses when an interrupt comes while the boot CPU's features, which tell the levels, are read again.
# Checked slabs have no sheaves: what is allocated from these leaves its address there, and kmemleak takes it for a reference.
CMDLINE = "kasan_multi_shot mitigations=off no5lvl slab_debug=F"
# Slow as it is, the kernel now and then measures its clock wrong by a factor against the PIT; HPET serves it right.
QEMU = ("-machine", "pit=off")



def options():
    """The lines of the fragment that say something."""
    return [line for line in FRAGMENT.read_text().splitlines() if re.match(r"CONFIG_|# CONFIG_\w+ is not set$", line)]


def ensure(root):
    """The debug kernel with its build tree, made if need be."""
    found = buildroot.offer()
    chosen = archive.choose_kernel(found)
    package = f"linux-source-{chosen.series}"
    source = {package: chosen.packages[package]}
    tools = {name: found.versions[name] for name in TOOLS}
    parts = (tools, source, options(), cache.file_key(RECIPE))
    if not cache.is_complete("kernel-debug", *parts):
        cache.require_space(GIGABYTES, "the debug kernel")
    entry = cache.keyed("kernel-debug", *parts, build=lambda directory: _make(directory, root, found, source))
    tree = entry / "tree"
    release = (tree / "include" / "config" / "kernel.release").read_text().strip()
    modules = entry / "image" / "usr" / "lib" / "modules" / release
    return kernel.Kernel(release, chosen.series, tree, kernel.toolchain_of(kernel.read_config(tree / ".config")),
                         cache.hash_key(*parts), modules / "vmlinuz", modules, True, TIME_FACTOR, CMDLINE,
                         QEMU)


def _make(entry, root, found, source):
    debs, image, tree = entry / "debs", entry / "image", entry / "tree"
    debs.mkdir()
    (image / "usr" / "lib").mkdir(parents=True)
    (image / "lib").symlink_to("usr/lib")
    version, = source.values()
    with ui.step(f"debug kernel: fetching the source of Linux {version}",
                 log=cache.log_path("debug-kernel-fetch")) as step:
        archive.download(found, source, debs, step)
    with ui.step("debug kernel: unpacking", log=cache.log_path("debug-kernel-unpack")) as step:
        deb, = debs.glob("*.deb")
        root.run([RECIPE, "unpack", deb, tree], log=step)
    shutil.rmtree(debs)
    with ui.step("debug kernel: configuring", log=cache.log_path("debug-kernel-configure")) as step:
        root.run([RECIPE, "configure", tree, FRAGMENT], log=step)
        _compare_with_fragment(tree)
    with ui.step("debug kernel: building (half an hour on two processors)",
                 log=cache.log_path("debug-kernel-build")) as step:
        root.run([RECIPE, "build", tree, ui.jobs()], log=step)
    with ui.step("debug kernel: installing into the cache", log=cache.log_path("debug-kernel-install")) as step:
        root.run([RECIPE, "install", tree, image], log=step)


def _compare_with_fragment(tree):
    """Refuses a configuration in which an option of the fragment has another value, e.g. for want of another option."""
    have = kernel.read_config(tree / ".config")
    lost = []
    for line in options():
        name = re.search(r"CONFIG_\w+", line)[0]
        want = line.partition("=")[2] or "n"
        if have.get(name, "n") != want:
            lost.append(f"{name}: {FRAGMENT.name} has {want}, Kconfig made it {have.get(name, 'n')}")
    if lost:
        raise ui.Error(f"the debug kernel of this version cannot be configured as {FRAGMENT} says:\n  "
                       + "\n  ".join(lost))

# SPDX-License-Identifier: GPL-2.0
"""The kernel that the module is built for and tested on: Debian's stock kernel, or a tree of the user's own.

The stock kernel's packages are unpacked into the cache, not installed: no boot loader and no initrd is touched, on no
host. Debian's headers lack what Rust modules need, so the kernel's source is prepared with the stock configuration
and the compilers that built the stock kernel. What comes out is compared with the stock kernel: each option that
changes code, and the names of the Rust symbols it exports, which contain a hash of compiler and crate.
"""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import archive
import buildroot
import cache
import ui

OUT = buildroot.PROJECT / "out"
MODULE = "kvm_rmmu.ko"

# What helps when Debian's kernel and its compilers do not fit each other.
WAIT = ("They fit again when Debian has built a newer kernel: 'make refresh' asks for one. Meanwhile 'make KDIR=TREE' builds "
        "for a tree of your own.")

LIB = Path(__file__).resolve().parent
UNPACK_SOURCE = LIB / "unpack-source.sh"
PREPARE_TREE = LIB / "prepare-tree.sh"


@dataclass
class Kernel:
    """A kernel to build for. Only one that the scripts made has an image and modules."""
    release: str
    series: str
    tree: Path
    # The arguments of its Makefile that choose the compiler.
    toolchain: list
    key: str
    vmlinuz: Path | None = None
    modules_dir: Path | None = None
    # A debug kernel: how many times longer than on the stock kernel a test may take, and what it is booted with.
    debug: bool = False
    time_factor: int = 1
    cmdline: str = ""
    qemu: tuple = ()
    # The scripts made the tree. Those that boot, they made in any case.
    ours: bool = False

    @property
    def in_cache(self):
        """The tree is in the cache, where clones share it."""
        return self.ours or self.modules_dir is not None

    @property
    def cc(self):
        """The C compiler, as a command."""
        return compiler_of(read_config(self.config))

    @property
    def tree_host(self):
        """The tree's path on the host, which is the same as in the root."""
        return self.tree

    @property
    def config(self):
        return self.tree / ".config"


def read_config(path):
    """A kernel configuration as {option: value}."""
    text = Path(path).read_text()
    options = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.M))
    options.update({name: "n" for name in re.findall(r"^# (CONFIG_\w+) is not set$", text, re.M)})
    return options


def compiler_of(config):
    """The C compiler that a configuration was made with, as a command."""
    if config.get("CONFIG_CC_IS_CLANG") == "y":
        return "clang"
    return config.get("CONFIG_CC_VERSION_TEXT", '"gcc').strip('"').split()[0]


def toolchain_of(config):
    """The arguments of make that choose the tools a configuration was made with."""
    if config.get("CONFIG_CC_IS_CLANG") == "y" and config.get("CONFIG_LD_IS_LLD") == "y":
        return ["LLVM=1"]
    return [f"CC={compiler_of(config)}"]


def _stock_key_parts(root_key, chosen):
    return root_key, chosen.packages, cache.file_key(UNPACK_SOURCE, PREPARE_TREE)


def set_up(refresh=False):
    """The build root and Debian's stock kernel with a prepared build tree, made if need be.

    Where the archive's newest make no set-up, whatever the reason, those of the last complete set-up stay in use.
    """
    buildroot.require_plain_paths()
    buildroot.offer(refresh)
    root, stock, is_new = buildroot.with_fallback(_set_up, _is_complete)
    archive.save_complete(buildroot.offer())
    if is_new:
        # Kept until now for the fallback.
        for family in ("root", "kernel"):
            cache.prune_unused(family)
    return root, stock


def _set_up():
    is_new = not _is_complete(buildroot.offer())
    root = buildroot.make()
    return root, _ensure(root), is_new


def _is_complete(offer):
    """Whether the kernel of an offer is there, for the build root of that offer."""
    chosen = archive.newest_supported(offer)
    key = buildroot.key_of(offer)
    return bool(chosen and key and cache.is_complete("kernel", *_stock_key_parts(key, chosen)))


def _ensure(root):
    found = buildroot.offer()
    chosen = archive.choose_kernel(found)
    parts = _stock_key_parts(root.key, chosen)
    if not cache.is_complete("kernel", *parts):
        cache.require_space(buildroot.GIGABYTES / 2, "the kernel's build tree")
    entry = cache.keyed("kernel", *parts, keep_others=True,
                        build=lambda directory: _make(directory, root, found, chosen))
    tree = entry / "tree"
    modules = entry / "image" / "usr" / "lib" / "modules" / chosen.release
    return Kernel(chosen.release, chosen.series, tree, toolchain_of(read_config(tree / ".config")),
                  cache.hash_key(*parts), modules / "vmlinuz", modules)


def _make(entry, root, found, chosen):
    debs, image, tree = entry / "debs", entry / "image", entry / "tree"
    debs.mkdir()
    (image / "usr" / "lib").mkdir(parents=True)
    # Debian's packages name /usr/lib; tools that are given this directory as a root look in /lib.
    (image / "lib").symlink_to("usr/lib")
    release = chosen.release
    with ui.step(f"kernel: fetching Linux {chosen.version} ({release})", log=cache.log_path("kernel-fetch")) as step:
        archive.download(found, chosen.packages, debs, step)
    headers = unpack(root, debs, image, release)
    prepare(root, debs, headers, tree, release)


def unpack(root, debs, image, release, boots=True):
    """Unpacks packages of a kernel, but for its source, into `image`; returns where its headers are, or would be."""
    headers = image / "usr" / "src" / f"linux-headers-{release}"
    wanted = [headers / ".config", headers / "Module.symvers"] if any(debs.glob("linux-headers-*")) else []
    wanted += [image / "usr/lib/modules" / release / "vmlinuz"] if boots else []
    with ui.step("kernel: unpacking the packages", log=cache.log_path("kernel-unpack")) as step:
        for deb in sorted(debs.glob("*.deb")):
            if not deb.name.startswith("linux-source-"):
                root.run(["dpkg-deb", "--extract", deb, image], log=step)
        if boots:
            root.run(["depmod", "-b", image, release], log=step)
        for path in wanted:
            if not path.exists():
                raise ui.Error(f"the packages of {release} hold no {path.name} where this version of rmmu looks for it "
                               f"({path.relative_to(image)}).")
    return headers


def prepare(root, debs, headers, tree, release):
    """Makes a build tree of the source among the packages in `debs`, which are deleted, and of the headers."""
    with ui.step("kernel: unpacking the source", log=cache.log_path("kernel-source")) as step:
        source = next(debs.glob("linux-source-*.deb"))
        root.run([UNPACK_SOURCE, source, tree], log=step)
    shutil.rmtree(debs)
    with ui.step(f"kernel: preparing the build tree of {release} (1 to 2 minutes)",
                 log=cache.log_path("kernel-prepare")) as step:
        stock = headers / ".config"
        shutil.copy(stock, tree / ".config")
        shutil.copy(headers / "Module.symvers", tree / "Module.symvers")
        cc = compiler_of(read_config(stock))
        root.run([PREPARE_TREE, tree, release, ui.jobs(), cc], log=step)
        _compare_with_stock(tree, stock, step)


# What a configuration notes of the tools that it was made with: their versions, and what they can do. None of it is
# chosen, and what follows from it for the code is in options of its own.
_TOOLS = "(CC|GCC|CLANG|AS|LD|LLD|RUSTC|RUSTC_LLVM|BINDGEN|PAHOLE|OPENSSL|TOOLS)"
_ABOUT_TOOLS = re.compile(rf"CONFIG_{_TOOLS}_((MAJOR_)?VERSION(_TEXT)?|(HAS|CAN|NO|SUPPORTS?)_\w+|\w+_BROKEN)")
# The stock kernel's own mark, which its package sets and a tree need not have.
_OF_THE_PACKAGE = ("CONFIG_BUILD_SALT",)
# Versions are one number in a configuration: of 160200 the first two digits are the major version.
_PER_MAJOR_VERSION = {"CONFIG_GCC_VERSION": 10000, "CONFIG_CLANG_VERSION": 10000}


def differences(want, have):
    """Where two configurations differ: options that change code, and notes about tools."""
    code, tools = [], []
    for name in sorted(want.keys() | have.keys()):
        values = want.get(name, "n"), have.get(name, "n")
        if values[0] == values[1] or name in _OF_THE_PACKAGE:
            continue
        about_tools = _ABOUT_TOOLS.fullmatch(name) and not _other_major_version(name, *values)
        (tools if about_tools else code).append((name, *values))
    return code, tools


def _other_major_version(name, *values):
    unit = _PER_MAJOR_VERSION.get(name)
    return unit and len({int(value) // unit if value.isdigit() else value for value in values}) > 1


def _compare_with_stock(tree, stock, step):
    """Refuses a tree whose modules would not fit the stock kernel.

    Tools may have moved since the kernel was built. What decides is what they make: the configuration, but for what it
    notes of the tools, the C compiler's family and major version, and the names of the Rust crates' symbols, which
    contain a hash of rustc's very version.
    """
    want, have = read_config(stock), read_config(tree / ".config")
    code, tools = differences(want, have)
    if code:
        shown = [f"{name}: stock {old}, tree {new}" for name, old, new in code[:20]]
        raise ui.Error("the build tree's configuration differs from the stock kernel's in what changes code, so modules "
                       f"would not fit. {WAIT}\n  " + "\n  ".join(shown))
    exported = set()
    for path in (tree / "rust").glob("exports_*_generated.h"):
        exported |= set(re.findall(r"^EXPORT_SYMBOL_RUST_GPL\((\w+)\);", path.read_text(), re.M))
    known = {text.split("\t")[1] for text in (tree / "Module.symvers").read_text().splitlines() if "\t" in text}
    strange = sorted(exported - known)
    if not exported:
        raise ui.Error("the prepared build tree exports no Rust symbols where this version of rmmu looks for them "
                       f"({tree}/rust/exports_*_generated.h).")
    if strange:
        rustc = [config.get("CONFIG_RUSTC_VERSION_TEXT", "an unknown rustc").strip('"') for config in (want, have)]
        raise ui.Error(f"{len(strange)} of {len(exported)} Rust symbols of the build tree are not the stock kernel's "
                       f"(the first: {strange[0]}): the kernel was built by {rustc[0]}, and Debian {archive.SUITE} has "
                       f"{rustc[1]}. {WAIT}")
    if tools:
        shown = ", ".join(f"{name.removeprefix('CONFIG_')} {old} -> {new}" for name, old, new in tools[:4])
        more = f" and {len(tools) - 4} more" if len(tools) > 4 else ""
        step.note("tools have moved since the stock kernel was built; modules fit all the same, as configuration and Rust "
                  f"symbols show ({shown}{more})")


def from_tree(kdir):
    """The kernel of a prepared tree of the user's own, after checking that a Rust module can be built with it."""
    tree = Path(kdir).resolve()
    advice = "See 'Building for your own kernel' in Documentation/building.rst."
    if not (tree / "Makefile").exists():
        raise ui.Error(f"{kdir} is not a kernel build tree. {advice}")
    config_path = tree / ".config"
    if not config_path.exists():
        raise ui.Error(f"{kdir} has no .config: configure and prepare the tree first. {advice}")
    config = read_config(config_path)
    for option in ("CONFIG_RUST", "CONFIG_KVM", "CONFIG_KALLSYMS", "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS"):
        if config.get(option, "n") == "n":
            raise ui.Error(f"{kdir} is configured without {option}, which rmmu needs. "
                           f"Enable it, rebuild that kernel and boot it. {advice}")
    release_path = tree / "include" / "config" / "kernel.release"
    metadata = tree / "rust" / "libkernel.rmeta"
    if not release_path.exists() or not metadata.exists():
        raise ui.Error(f"{kdir} lacks Rust metadata ({metadata.relative_to(tree)}): distributions' header packages "
                       "do not carry it. Unpack that kernel's source, install its .config and Module.symvers, run "
                       f"'make olddefconfig prepare modules_prepare' and point KDIR there. {advice}")
    for private in ("virt/kvm/kvm_mm.h", "arch/x86/kvm/mmu/mmu_internal.h"):
        if not (tree / private).exists():
            raise ui.Error(f"{kdir} lacks {private}: rmmu needs the kernel's full source, not its headers only.")
    release = release_path.read_text().strip()
    series = archive.series_of(release)
    if series not in archive.supported_series():
        raise ui.Error(f"{release} is not a kernel that rmmu supports. Supported series: "
                       f"{', '.join(archive.supported_series())} (scripts/supported-kernels).")
    return Kernel(release, series, tree, toolchain_of(config), cache.hash_key(str(tree), release_path.stat().st_mtime))


def select(kver=None, kdir=None):
    """A build root, and the kernel that KVER= and KDIR= name; the stock kernel without them."""
    if kdir:
        chosen = from_tree(kdir)
        if kver and kver != chosen.release:
            raise ui.Error(f"KDIR={kdir} is a tree of {chosen.release}, not of KVER={kver}. Give one of them only.")
        root = buildroot.ensure(any_kernel=True)
        _require_same_rustc(root, chosen)
        return root, chosen
    if not kver:
        return set_up()
    buildroot.require_plain_paths()
    if any(kver == kernel.release for kernel in buildroot.offer().kernels):
        root, stock = set_up()
        if stock.release == kver:
            return root, stock
    series = archive.series_of(kver)
    if series not in archive.supported_series():
        raise ui.Error(f"KVER={kver} is not a kernel that rmmu supports. Supported series: "
                       f"{', '.join(archive.supported_series())} (scripts/supported-kernels).")
    build = Path("/lib/modules") / kver / "build"
    if not (build / "rust" / "libkernel.rmeta").exists():
        # Debian's header packages have no Rust metadata. suitekernel makes its trees with what is in this file.
        import suitekernel
        found = suitekernel.find_release(kver)
        if found:
            return suitekernel.ensure(found)
    if not build.exists():
        raise ui.Error(f"KVER={kver}: {build} does not exist, and none of the suites in scripts/supported-kernels offers that "
                       "kernel with its source ('scripts/kernels' lists those there are). Give its prepared source tree with "
                       "KDIR=.")
    return select(kver, build)


def _require_same_rustc(root, kernel):
    want = read_config(kernel.config).get("CONFIG_RUSTC_VERSION_TEXT", "").strip('"')
    have = root.run(["rustc", "--version"], capture=True).stdout.strip()
    if want != have:
        raise ui.Error(f"{kernel.tree} was prepared with '{want}', and the build root has '{have}'. Rust modules need "
                       "the very same compiler: prepare the tree inside the build root ('scripts/in-root --rw-bind "
                       f"{kernel.tree} make -C {kernel.tree} prepare modules_prepare').")


def build_module(root, kernel):
    """Builds kvm_rmmu.ko for a kernel; returns its path. A build that prints a warning fails."""
    build = OUT / f"build-{kernel.release}"
    product = OUT / kernel.release / MODULE
    log = OUT / "logs" / f"module-{kernel.release}.log"
    OUT.mkdir(exist_ok=True)
    with cache.locked(OUT / f"build-{kernel.release}.lock", "the module"):
        with ui.step(f"module: building {MODULE} for {kernel.release}", log=log) as step:
            stamp, had_warnings = build / "kernel-key", build / "had-warnings"
            fresh = not stamp.exists() or stamp.read_text() != kernel.key
            for _ in range(2):
                if fresh:
                    cache.remove_tree(build)
                    build.mkdir()
                    stamp.write_text(kernel.key)
                _make_module(root, kernel, build, step, had_warnings)
                # make passes over objects of a failed build that had warnings: then all is built again.
                fresh = had_warnings.exists()
                if not fresh:
                    break
            if not (build / MODULE).exists():
                raise ui.Error(f"the build made no {MODULE}\n--- end of {log} ---\n{ui.tail(log)}")
            for text in re.findall(r"^KVM's MMU: .*", log.read_text(errors="replace"), re.M):
                step.note(text)
            product.parent.mkdir(exist_ok=True)
            partial = product.with_suffix(".partial")
            shutil.copy(build / MODULE, partial)
            os.replace(partial, product)
    return product


def clippy_module(root, kernel):
    """The kernel's own clippy on the module's crate; anything it says is an error."""
    build = OUT / f"clippy-{kernel.release}"
    log = OUT / "logs" / f"clippy-{kernel.release}.log"
    with cache.locked(OUT / f"clippy-{kernel.release}.lock", "clippy"):
        with ui.step("clippy: checking the module", log=log) as step:
            # clippy says nothing of a crate that it has checked already.
            cache.remove_tree(build)
            build.mkdir(parents=True)
            _kbuild(root, kernel, build, step, "CLIPPY=1", "rust/kvm_rmmu.o")
            warnings = find_warnings(log.read_text(errors="replace"))
            if warnings:
                raise ui.Error(f"clippy has something to say, see {log}:\n  " + "\n  ".join(warnings[:20]))


def _kbuild(root, kernel, build, step, *targets):
    # kbuild writes to the kernel's tree, too: what Rust's macros include of assembly is generated for each module again.
    # Clones that share a tree of ours take turns.
    turn = cache.locked(kernel.tree.with_suffix(".lock"), "a module") if kernel.in_cache else contextlib.nullcontext()
    with turn:
        root.run(["make", "-C", kernel.tree, f"M={buildroot.PROJECT}", f"MO={build}", *kernel.toolchain,
                  f"KERNELRELEASE={kernel.release}", "-j", ui.jobs(), *targets],
                 binds=[] if kernel.in_cache else [kernel.tree], log=step)


def _make_module(root, kernel, build, step, had_warnings):
    try:
        _kbuild(root, kernel, build, step, "modules")
    finally:
        warnings = find_warnings(step.log.read_text(errors="replace"))
        if warnings:
            had_warnings.touch()
    if warnings:
        raise ui.Error(f"the build printed warnings ({len(warnings)}), and none is allowed:\n  "
                       + "\n  ".join(warnings[:20]) + f"\n(whole log: {step.log})")


def find_warnings(text):
    """The lines of a build's output that are warnings of a compiler, of objtool, of modpost or of make."""
    return [line.strip() for line in text.splitlines()
            if re.search(r"(^|[\s:])warning(\[\w+\])?:", line, re.I)]

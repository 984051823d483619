# SPDX-License-Identifier: GPL-2.0
"""QEMU with some faults of its CPU mended, for modes in which they show.

Debian's QEMU runs all tests that it can. Under shadow paging it cannot: see FAULTS. So Debian's source of QEMU is built
once, for x86-64 machines only and without what the test VM has no use for, with one small edit a fault. The edits are
exact: where the source does not read as expected, the build fails and says so.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import archive
import buildroot
import cache
import ui

PACKAGE = "qemu"
# The package that the build root has QEMU from; both have the same version.
BINARY_PACKAGE = "qemu-system-x86"
NAME = "qemu-system-x86_64"
GIGABYTES = 3


@dataclass(frozen=True)
class Fault:
    """What is wrong, and the text of the source that is replaced. `count` is how often it occurs there."""

    what: str
    file: str
    old: str
    new: str
    count: int = 1


FAULTS = [
    Fault(
        "MOV from CR2, CR3, CR4 and CR8 is checked against the intercept of MOV from CR0, whose code is 0. "
        "A guest under shadow paging reads the shadow CR3 as its own.",
        "target/i386/tcg/decode-new.c.inc",
        "        if (decode->e.intercept) {\n",
        "        if (decode->e.has_intercept) {\n",
        count=2,
    ),
    Fault(
        "The error code of a page fault for a reserved bit lacks the bit that says that the entries are present.",
        "target/i386/tcg/system/excp_helper.c",
        "    error_code = PG_ERROR_RSVD_MASK;\n",
        "    error_code = PG_ERROR_RSVD_MASK | PG_ERROR_P_MASK;\n",
    ),
    Fault(
        "When an injected event has been delivered its type and vector stay in EVENTINJ, and the next exit reports "
        "them in EXITINTINFO.",
        "target/i386/tcg/seg_helper.c",
        "                 event_inj & ~SVM_EVTINJ_VALID);\n",
        "                 event_inj & SVM_EVTINJ_VALID ? 0 : event_inj);\n",
    ),
    Fault(
        "After a page fault the CPU still uses translations of that address which it had before, though the tables "
        "were read again and say otherwise. AMD's and Intel's processors forget them.",
        "target/i386/tcg/system/excp_helper.c",
        "        raise_stage2(env, &err, retaddr);\n    }\n",
        "        raise_stage2(env, &err, retaddr);\n    }\n    tlb_flush_page(cs, addr);\n",
    ),
    Fault(
        "VMRUN that injects an interrupt delivers it, and leaves its vector behind as an exception that is still to be "
        "delivered: when the loop that runs the guest ends before the guest exits, it comes again.",
        "target/i386/tcg/system/svm_helper.c",
        "            do_interrupt_x86_hardirq(env, vector, 1);\n",
        "            do_interrupt_x86_hardirq(env, vector, 1);\n            cs->exception_index = -1;\n",
    ),
]

BUILD_PACKAGES = ["bison", "bzip2", "flex", "gcc", "libc6-dev", "libglib2.0-dev", "make", "meson", "ninja-build", "patch",
                  "pkgconf", "python3", "python3-distlib", "python3-venv", "xz-utils", "zlib1g-dev"]

# All devices: a choice of few is less code, but QEMU does not link with every choice.
CONFIGURE = ["--target-list=x86_64-softmmu", "--without-default-features", "--enable-system", "--enable-tcg",
             "--disable-docs", "--disable-debug-info", "--disable-werror", "--disable-download",
             "--disable-install-blobs"]


def ensure(root):
    """The mended QEMU, made if need be; it runs with the libraries and the firmware of the build root."""
    version = buildroot.offer().versions[BINARY_PACKAGE]
    recipe = [[fault.file, fault.old, fault.new, fault.count] for fault in FAULTS]
    kind = cache.hash_key(recipe, CONFIGURE, root.is_host)

    def build(entry):
        _build(entry, version)
        (entry / cache.KIND).write_text(kind)

    try:
        directory = cache.keyed("qemu", version, recipe, CONFIGURE, root.is_host, build=build)
    except buildroot.FAILURES as error:
        # Another version with the same edits does as well; the archive may have moved to one that they do not fit.
        directory = cache.earlier("qemu", kind)
        if not directory:
            raise
        ui.note(f"QEMU {version} cannot be built, and an earlier one stays in use: {buildroot.first_line(error)}")
    return directory / NAME


def _build(directory, version):
    cache.require_space(GIGABYTES, "building QEMU")
    source = directory / "source"
    log = cache.log_path("qemu")
    with ui.step("QEMU: fetching Debian's source", log=log) as step:
        found = unpack_source(PACKAGE, version, directory / "archive", source, step)
    root = buildroot.make_for(BUILD_PACKAGES, directory / "rootfs", "QEMU's build", cache.log_path("qemu-root"))
    build = directory / "build"
    build.mkdir()
    log = cache.log_path("qemu-build")
    with ui.step("QEMU: building it with mended SVM emulation (5 to 15 minutes)", log=log) as step:
        for patch in _debian_patches(source):
            root.run(["patch", "-p1", "-s", "-i", patch], cwd=source, log=step)
        mend(f"QEMU {found}", FAULTS, source, __file__)
        root.run([source / "configure", *CONFIGURE], cwd=build, log=step)
        root.run(["ninja", "-j", ui.jobs(), NAME], cwd=build, log=step)
        root.run(["strip", build / NAME], log=step)
    shutil.copy2(build / NAME, directory / NAME)
    (directory / "version").write_text(f"{found}\n")
    for path in (source, build, directory / "archive", directory / "rootfs"):
        cache.remove_tree(path)


def _debian_patches(source):
    patches = source / "debian/patches"
    names = (text.partition("#")[0].split() for text in (patches / "series").read_text().splitlines())
    return [patches / name[0] for name in names if name]


def unpack_source(package, version, archives, source, step):
    """Fetches Debian's source of a package, or of the nearest version there is, and unpacks it; returns the version."""
    found = archive.download_source(buildroot.offer(), package, version, archives, step)
    if found != version:
        step.note(f"the archive has no source of {package} {version} now; using {found}")
    source.mkdir()
    for kind, options in (("orig", ["--strip-components=1"]), ("debian", [])):
        tars = list(archives.glob(f"*.{kind}.tar.*"))
        if len(tars) != 1:
            raise ui.Error(f"the source package of {package} {found} has {len(tars)} archives named {kind}, not one.")
        step.run(["tar", "-xf", tars[0], "-C", source, *options])
    return found


def mend(program, faults, source, where_edits_are):
    """Applies the edits. Each must find its text, exactly as often as expected."""
    for fault in faults:
        path = Path(source) / fault.file
        text = path.read_text() if path.exists() else ""
        count = text.count(fault.old)
        if count != fault.count:
            where = f"is there {count} times instead of {fault.count}" if text else "has no such file"
            raise ui.Error(
                f"{program} does not read as scripts/lib/{Path(where_edits_are).name} expects: in {fault.file} the text "
                f"{fault.old.strip()!r} {where}. If that version has the fault no more, take the edit out; else adapt "
                f"it. The fault: {fault.what}")
        path.write_text(text.replace(fault.old, fault.new))

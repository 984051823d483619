# SPDX-License-Identifier: GPL-2.0
"""Our own selftests: C programs and shell scripts under selftests/, built static and cached."""

import shutil
from pathlib import Path

import buildroot
import cache
import intree
import ui

SOURCE = buildroot.PROJECT / "selftests"
IN_GUEST = "/selftests"


def ensure(environment):
    """The directory that holds programs and scripts, laid out as the guest sees it below /selftests."""
    root = environment.root_handle
    sources = sorted(path for path in SOURCE.rglob("*") if path.is_file() and _is_built(path))
    return cache.keyed(
        "selftests-own" + environment.suffix, environment.booted.key, root.key, [str(path.relative_to(SOURCE)) for path in sources],
        cache.file_key(*sources, Path(intree.__file__)),
        build=lambda directory: _build(directory, environment),
    )


def _is_built(path):
    """Whether a file goes into the VM, or into what goes there."""
    below = path.relative_to(SOURCE).parts
    return below[0] not in ("expected", "guest", list_path().name, "upstream.list")


def _build(directory, environment):
    kernel, root = environment.booted, environment.root_handle
    with ui.step("selftests: building ours", log=cache.log_path("selftests-own")) as step:
        root.run(["make", "-s", "-C", SOURCE, "-j", ui.jobs(), f"CC={environment.kernel.cc}", f"OUTPUT={directory}"], log=step)
        root.run(["strip", *(path for path in directory.iterdir() if path.is_file())], log=step)
        for script in SOURCE.glob("*.sh"):
            shutil.copy2(script, directory / script.name)
        (directory / "lib").mkdir()
        for script in (SOURCE / "lib").glob("*.sh"):
            shutil.copy2(script, directory / "lib" / script.name)
        (directory / "intree-functions.list").write_text("\n".join(intree.functions(kernel.tree_host)) + "\n")
        shutil.copy(SOURCE / "intree-harmless.list", directory)
        _build_modules(directory, kernel, environment.builder, step)


def _build_modules(directory, kernel, root, step):
    """The test modules, one directory each below selftests/modules."""
    (directory / "modules").mkdir()
    for source in sorted((SOURCE / "modules").iterdir()):
        build = directory / "build" / source.name
        shutil.copytree(source, build)
        root.run(["make", "-s", "-C", kernel.tree, f"M={build}", *kernel.toolchain,
                  f"KERNELRELEASE={kernel.release}", "modules"], log=step)
        for module in build.glob("*.ko"):
            shutil.copy(module, directory / "modules" / module.name)
    shutil.rmtree(directory / "build", ignore_errors=True)


def files(environment):
    """What to put into the test VM: [(guest path, host path)]."""
    return [(IN_GUEST, ensure(environment))]


def list_path():
    return SOURCE / "rmmu.list"


def expected_path():
    return SOURCE / "expected" / "rmmu.tsv"

# SPDX-License-Identifier: GPL-2.0
"""Upstream's KVM selftests, built static from the kernel's source package and cached."""

import re
import shutil
from pathlib import Path

import cache
import ui

IN_GUEST = "/kvm"
# The same as a pattern: where a path begins, and not in /sys/kernel/debug/kvm.
_HERE = rf"(?<![\w./-]){IN_GUEST}"

# Programs that are built besides upstream's own: {name: (program, [(pattern, replacement, how often it is there)])}.
#
# small: two tests repeat one thing so often that an emulator needs minutes for it. These do the same less often.
# sleeping: for where instructions are counted, those of all threads. Upstream's wait for each other by spinning.
_SLEEP = "usleep(200);"
VARIANTS = {
    "hardware_disable_test_small": ("hardware_disable_test", [
        # The name that 7.2 has, and that of 7.3.
        (r"^(#define (?:FORK_NUM|NR_ITERATIONS))\s.*$", r"\1 (1ULL << 3)", 1),
    ]),
    "rseq_test_small": ("rseq_test", [
        (r"^(#define NR_TASK_MIGRATIONS)\s.*$", r"\1 2000", 1),
    ]),
    "dirty_log_perf_test_sleeping": ("dirty_log_perf_test", [
        # The main thread, for a vCPU to end an iteration; and a vCPU's thread, for the next one.
        (r"(while \(READ_ONCE\(vcpu_last_completed_iteration\[i\]\)\s*!=\s*iteration\))\s*;", rf"\1 {_SLEEP}", 2),
        (r"(while \(current_iteration == READ_ONCE\(iteration\) &&[^;{}]*\)) \{\}", rf"\1 {_SLEEP}", 1),
    ]),
    "access_tracking_perf_test_sleeping": ("access_tracking_perf_test", [
        (r"(while \(READ_ONCE\(vcpu_last_completed_iteration\[vcpu_idx\]\) !=[^;{}]*\{)\s*continue;", rf"\1 {_SLEEP}", 1),
        (r"(\n\tdo \{)(\s*if \(READ_ONCE\(memstress_args.stop_vcpus\)\))", rf"\1 {_SLEEP}\2", 1),
    ]),
}


def ensure(environment):
    """The directory that holds the programs, laid out as the guest sees it below /kvm."""
    kernel, root = environment.tests_of, environment.root_handle
    return cache.keyed(
        "selftests-kvm" + ("" if kernel is environment.kernel else environment.suffix), kernel.key, root.key, VARIANTS, _RECIPE,
        build=lambda directory: _build(directory, kernel, root, environment.kernel.cc),
    )


_RECIPE = """
set -e
tree=$1 work=$2 jobs=$3
make -s -C "$tree" CC="$4" headers_install INSTALL_HDR_PATH="$work/uapi"
exec make -s -C "$work/tools/testing/selftests/kvm" -j "$jobs" CC="$4" top_srcdir="$tree" \
    OUTPUT="$work/programs" EXTRA_CFLAGS="-static -w" KHDR_INCLUDES="-isystem $work/uapi/include" all
"""


def _build(directory, kernel, root, cc):
    work = directory / "work"
    tree = kernel.tree_host
    # A copy, for the tree belongs to the kernel's cache entry and variants are added.
    source = work / "tools/testing/selftests"
    source.mkdir(parents=True)
    for name in ("arch", "build", "include", "lib", "scripts"):
        (work / "tools" / name).symlink_to(tree / "tools" / name)
    # Some tests use the headers of other tests next to them.
    for name in ("kvm", "rseq", "cgroup", "clone3", "vfio", "lib.mk"):
        if (tree / "tools/testing/selftests" / name).exists():
            _copy(tree / "tools/testing/selftests" / name, source / name)
    for path in (tree / "tools/testing/selftests").glob("*.h"):
        _copy(path, source / path.name)
    _add_variants(source / "kvm")
    with ui.step("selftests: building upstream's KVM tests", log=cache.log_path("selftests-kvm")) as step:
        root.run(["sh", "-c", _RECIPE, "build", kernel.tree, work, ui.jobs(), cc], log=step)
        programs = work / "programs"
        names = [path.relative_to(programs) for path in programs.rglob("*")
                 if path.is_file() and path.stat().st_mode & 0o111]
        if len(names) < 50:
            raise ui.Error(f"only {len(names)} of upstream's KVM selftests were built: see {step.log}")
        for name in names:
            target = directory / name
            target.parent.mkdir(exist_ok=True)
            root.run(["strip", "-o", target, programs / name], log=step)
        for script in (source / "kvm/x86").glob("*.sh"):
            _copy(script, directory / "x86" / script.name)
    shutil.rmtree(work)


def _copy(source, target):
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _add_variants(kvm):
    makefile = kvm / "Makefile.kvm"
    lines = []
    for name, (program, changes) in VARIANTS.items():
        text = (kvm / f"{program}.c").read_text()
        for pattern, replacement, times in changes:
            text, count = re.subn(pattern, replacement, text, flags=re.M)
            if count != times:
                raise ui.Error(f"upstream's {program}.c has '{pattern}' {count} times, not {times}: mend VARIANTS in {__file__}")
        (kvm / f"{name}.c").write_text(text)
        lines.append(f"TEST_GEN_PROGS_x86 += {name}\n")
    makefile.write_text(makefile.read_text().replace("TEST_PROGS +=", "".join(lines) + "TEST_PROGS +=", 1))


def programs(directory):
    """The programs of a build, named as upstream names them."""
    return {str(path.relative_to(directory)): path for path in Path(directory).rglob("*") if path.is_file()}


def needed(environment, commands):
    """What to pack for shell commands: the programs they name, or all when they name none but are a shell's.

    All of them make the initramfs 100 MB larger, which costs seconds of every boot.
    """
    if commands and not re.search(rf"{_HERE}(?![\w.-])", commands):
        # Building them takes minutes.
        return []
    directory = ensure(environment)
    known = programs(directory)
    named = {name for name in re.findall(rf"{_HERE}/([\w./-]+)", commands) if name in known}
    if not named:
        return [(IN_GUEST, directory)]
    # A script runs the program of its own name.
    named |= {name.removesuffix(".sh") for name in named} & known.keys()
    return [(f"{IN_GUEST}/{name}", known[name]) for name in sorted(named)]

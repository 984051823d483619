# SPDX-License-Identifier: GPL-2.0
"""C sources of KVM and of this module, parsed by libclang in the build root; see clangview.py for what comes of it."""

import json
import shlex

import buildroot
import cache
import ui

CLANGVIEW = buildroot.PROJECT / "scripts" / "lib" / "clangview.py"

# What clang takes of gcc's flags, and needs to see the same sources.
PAIRS = ("-I", "-include")
KEPT_FLAGS = ("-nostdinc", "-fms-extensions", "-funsigned-char", "-fshort-wchar", "-m64")


def flags_of(directory, target):
    """What decides what a source says, of the command that made the object `target` of the build in `directory`."""
    made = directory / target
    command = (made.parent / f".{made.name}.cmd").read_text().splitlines()[0].partition(":=")[2]
    words, flags = iter(shlex.split(command)), ["-fno-builtin"]
    for word in words:
        if word in PAIRS:
            flags += [word, next(words)]
        elif word.startswith("-I"):
            flags.append(f"-I{directory / word[2:]}")
        elif word.startswith(("-D", "-std=")) or word in KEPT_FLAGS:
            flags.append(word)
    return flags


def parser_flags(root, chosen):
    """The flags of the kernel's build for a source of KVM, as far as they decide what the source says."""
    source = chosen.tree / "arch" / "x86" / "kvm"
    target = "mmu/page_track.o"

    def build(directory):
        with ui.step(f"data: compiling a source of KVM {chosen.release}", log=cache.log_path("data-flags")) as step:
            root.run(["make", "-C", chosen.tree, f"M={source}", f"MO={directory}", *chosen.toolchain,
                      f"KERNELRELEASE={chosen.release}", target],
                     binds=[] if chosen.modules_dir else [chosen.tree], log=step)

    directory = cache.keyed("data-flags", chosen.key, target, build=build)
    return flags_of(directory, target)


def parse(root, chosen, request, directory):
    """The answer of clangview.py."""
    (directory / "request.json").write_text(json.dumps(request))
    done = root.run([CLANGVIEW, directory / "request.json"], capture=True, binds=[] if chosen.modules_dir else [chosen.tree])
    return json.loads(done.stdout)


def functions(units):
    """{source: {function: what it does}} of an answer. What cannot be parsed is an error."""
    errors = [error for unit in units.values() for error in unit["errors"]]
    if errors:
        raise ui.Error("sources cannot be parsed:\n  " + "\n  ".join(errors[:10]))
    return {source: unit["functions"] for source, unit in units.items()}

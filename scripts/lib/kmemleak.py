# SPDX-License-Identifier: GPL-2.0
"""Ask the kernel's leak detector, before a test VM ends, what has been allocated and is referenced by nothing.

rmmu is unloaded first, so that nothing in its data hides an object and nothing of it may be left. Its functions then have
no names any more: the names are remembered beforehand.
"""

import bisect
import re
from dataclasses import dataclass

FILE = "/sys/kernel/debug/kmemleak"
LIMIT = 300
# kmemleak reports no object that is younger than 5 s. The second scan finds what an address on a stack or in a
# register hid from the first.
SCAN = f"sync; sleep 6; echo scan > {FILE} && sleep 1 && echo scan > {FILE} && echo scanned && cat {FILE}"

_ADDRESS = re.compile(r"\[<([0-9a-f]+)>\]|(0x[0-9a-f]{12,})")
_OURS = re.compile(r"\[kvm(_rmmu|_amd|_intel)?\]")


@dataclass
class Leaks:
    """What a scan found: reports of objects that KVM or rmmu allocated, and of all others."""

    ours: list
    others: list
    # Why there was no scan, if so.
    failed: str = ""

    @property
    def text(self):
        return "\n\n".join([*self.ours, *self.others]) + "\n"


def scan(vm):
    """Unloads rmmu, if it is there, and scans twice."""
    symbols = _symbols(vm)
    if symbols:
        unloaded = vm.run("rmmod kvm_rmmu", LIMIT)
        if unloaded.code != 0:
            return Leaks([], [], f"rmmu cannot be unloaded: {unloaded.output.strip()}")
    done = vm.run(SCAN, LIMIT)
    first, _, reports = done.output.partition("\n")
    if done.code != 0 or first != "scanned":
        return Leaks([], [], f"the scan failed (exit {done.code}): {done.output.strip()[:200]}")
    leaks = Leaks([], [])
    for report in re.split(r"^(?=unreferenced object )", reports, flags=re.M):
        if report.strip():
            named = _name(report.rstrip(), symbols)
            (leaks.ours if _OURS.search(named) else leaks.others).append(named)
    return leaks


def _symbols(vm):
    """Address and name of each function of rmmu, sorted; empty if it is not loaded."""
    listing = vm.run(r"grep -F '[kvm_rmmu]' /proc/kallsyms", LIMIT).output
    return sorted((int(address, 16), name) for address, name in
                  re.findall(r"^([0-9a-f]+) [tT] (\S+)\s", listing, re.M))


def _name(report, symbols):
    """A report in which the addresses of rmmu's functions have names."""
    if not symbols:
        return report
    starts = [start for start, _ in symbols]
    # The last function ends somewhere in its page.
    end = (starts[-1] | 0xfff) + 1

    def named(match):
        address = int(match[1] or match[2], 16)
        if not starts[0] <= address < end:
            return match[0]
        start, name = symbols[bisect.bisect_right(starts, address) - 1]
        return f"{match[0]} {name}+{address - start:#x} [kvm_rmmu]"

    return "\n".join(_ADDRESS.sub(named, line) if line.startswith("    [<") or line.startswith("    0x") else line
                     for line in report.splitlines())

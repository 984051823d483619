# SPDX-License-Identifier: GPL-2.0
"""The benchmark's rows: what runs for them, how their figures are found, and what is made of the figures.

A figure is (row, unit, owner, round, value). Rows come from our own program (selftests/bench), from upstream's perf
tests, from the boot of a Linux guest, and from files.
"""

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import elf
import intree
import qemu
import ui

OWNERS = ("in-tree", "rmmu")

# The modes that there are rows for (see testvm.py), and what the names of a mode's rows begin with.
MODES = {"default": "", "npt=0": "npt=0: "}

# Rows of a Linux guest: what selftests/bench-guest.sh prints, row, unit.
LINUX_GUEST = {
    "boot": ("Linux guest: boot", "time"),
    "forks": ("Linux guest: 200 times fork and exec", "time"),
    "faults": ("Linux guest: faults", "count"),
}

# Upstream's perf tests: (row, command, what to look for in its output), a pattern a figure. Times are virtual seconds. The
# virtual clock counts the instructions of all CPUs, so that threads must not spin while they wait: see upstream.py.
_SECONDS = r"(\d+\.\d+)s"
UPSTREAM = (
    ("demand_paging_test -b 64M", "/kvm/demand_paging_test -v 1 -b 64M",
     (("", rf"Total guest execution time:\s*{_SECONDS}"),)),
    ("demand_paging_test -b 128M, 2M pages", "/kvm/demand_paging_test -v 1 -b 128M -s anonymous_thp",
     (("", rf"Total guest execution time:\s*{_SECONDS}"),)),
    ("dirty_log_perf_test", "/kvm/dirty_log_perf_test_sleeping -v 1 -b 64M -i 3 -c {cpus}",
     (("populate", rf"Populate memory time:\s*{_SECONDS}"),
      ("dirty pass", rf"Iteration 2 dirty memory time:\s*{_SECONDS}"))),
    ("kvm_page_table_test", "/kvm/kvm_page_table_test -v 1 -b 64M -s anonymous",
     (("create", rf"KVM_CREATE_MAPPINGS: total execution time:\s*{_SECONDS}"),
      ("update", rf"KVM_UPDATE_MAPPINGS: total execution time:\s*{_SECONDS}"),
      ("adjust", rf"KVM_ADJUST_MAPPINGS: total execution time:\s*{_SECONDS}"))),
    ("memslot_perf_test, map", "/kvm/memslot_perf_test -f 0 -e 0 -l 1 -r 1 -s 128",
     (("", rf"Best runtime result was {_SECONDS} per iteration"),)),
    ("dirty_log_perf_test in a nested guest", "/kvm/dirty_log_perf_test_sleeping -v 1 -b 32M -i 3 -n -c {cpus}",
     (("populate", rf"Populate memory time:\s*{_SECONDS}"),
      ("dirty pass", rf"Iteration 2 dirty memory time:\s*{_SECONDS}"))),
    ("access_tracking_perf_test", "/kvm/access_tracking_perf_test_sleeping -v 1 -b 64M",
     (("populate", rf"Populating memory\s*:\s*{_SECONDS}"),
      ("mark idle", rf"Mark memory idle[^:]*:\s*{_SECONDS}"))),
)


@dataclass
class Row:
    """One row of the result, values by owner."""

    name: str
    unit: str
    values: dict = field(default_factory=lambda: {owner: [] for owner in OWNERS})

    def figure(self, owner):
        return statistics.median(self.values[owner])

    def ratio(self, paired):
        """rmmu to in-tree: of the medians, or the median of the ratios of pairs."""
        base, ours = (self.values[owner] for owner in OWNERS)
        if paired:
            return statistics.median(b / a if a else 1.0 for a, b in zip(base, ours))
        base, ours = self.figure("in-tree"), self.figure("rmmu")
        return ours / base if base else 1.0


class Table:
    """All rows, in the order in which they came."""

    def __init__(self, virtual):
        self.virtual = virtual
        self.rows = {}

    def add(self, name, unit, owner, value):
        if unit == "time":
            # Nanoseconds. The virtual clock moves by the instruction.
            unit, value = ("instructions", value / qemu.NS_PER_INSTRUCTION) if self.virtual else ("ns", value)
        self.rows.setdefault(name, Row(name, unit)).values[owner].append(value)

    def add_output(self, output):
        """Lines of selftests/bench; returns how many figures there were."""
        count = 0
        for line in output.splitlines():
            if line.startswith("result\t"):
                _, name, unit, owner, _, value = line.split("\t")
                self.add(name, unit, owner, float(value))
                count += 1
        return count

    def complete(self):
        """Rows that both owners have figures for."""
        return [row for row in self.rows.values() if all(row.values[owner] for owner in OWNERS)]

    def as_json(self):
        return [{"row": row.name, "unit": row.unit, "in_tree": row.figure("in-tree"), "rmmu": row.figure("rmmu"),
                 "ratio": round(row.ratio(row.unit == "ns"), 4)} for row in self.complete()]

    def spreads(self, tolerance=0.01):
        """Figures whose rounds differ by more than `tolerance` from one to the next."""
        lines = []
        for row in self.complete():
            for owner in OWNERS:
                values = row.values[owner]
                if max(values) - min(values) > tolerance * row.figure(owner):
                    shown, unit = _shown(values, row.unit)
                    lines.append(f"{row.name}: {owner} {' '.join(shown)} {unit}")
        return lines

    def write(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


def mode_of(row):
    """The mode that a row's name belongs to."""
    return next((mode for mode, prefix in MODES.items() if prefix and row.startswith(prefix)), "default")


def text(results):
    """The results as a table for people."""
    width = max(len(item["row"]) for item in results)
    lines = [f"{'':{width}} {'in-tree':>14} {'rmmu':>14} {'ratio':>7}"]
    for item in results:
        cells, unit = _shown((item["in_tree"], item["rmmu"]), item["unit"])
        lines.append(f"{item['row']:{width}} " + " ".join(f"{cell:>14}" for cell in cells) + f" {item['ratio']:7.3f}"
                     f"  {unit}")
    return "\n".join(lines)


def _shown(values, unit):
    """Figures of one row as texts, and the unit that they are in then."""
    if unit == "ns" and max(values) >= 1e5:
        return [f"{value / 1e6:,.2f}" for value in values], "ms"
    return [f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}" for value in values], unit


def differences(results, earlier, tolerance=0.01):
    """Rows whose figures differ by more than `tolerance` between two runs."""
    before = {item["row"]: item for item in earlier}
    lines = []
    for item in results:
        old = before.get(item["row"])
        if old is None:
            lines.append(f"{item['row']}: not in the earlier run")
            continue
        for key in ("in_tree", "rmmu"):
            if old[key] and abs(item[key] / old[key] - 1) > tolerance:
                lines.append(f"{item['row']}: {key} {old[key]:,.0f} -> {item[key]:,.0f} ({item[key] / old[key] - 1:+.1%})")
    return lines


def upstream_figures(patterns, output):
    """[(part of the row, ns)] that the output of one of upstream's perf tests holds."""
    found = []
    for part, pattern in patterns:
        match = re.search(pattern, output)
        if not match:
            raise ui.Error(f"upstream's perf test does not print '{pattern}' any more:\n{output}")
        found.append((part, float(match.group(1)) * 1e9))
    return found


def text_bytes(module, kvm, tree):
    """Size of our code, and of the functions in kvm.ko that it stands for."""
    ours = elf.Elf(Path(module).read_bytes(), str(module))
    code = sum(section.size for section in ours.sections
               if section.flags & elf.SHF_EXECINSTR and section.name.startswith(".text"))
    theirs = elf.Elf(kvm, "kvm.ko")
    names = set(intree.functions(tree))
    functions = {symbol.value: symbol.size for symbol in theirs.symbols
                 if symbol.type == elf.STT_FUNC and re.split(r"\.", symbol.name)[0] in names}
    return code, sum(functions.values())

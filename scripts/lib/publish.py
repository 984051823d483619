# SPDX-License-Identifier: GPL-2.0
"""Puts the results of a benchmark into the documentation: the whole table, the plot, and the main rows in the README.

A table replaces what is between two lines of its file, which contain `benchmark: begin` and `benchmark: end`.
"""

from pathlib import Path

import benchmark
import buildroot
import plot
import ui

DOCUMENT = buildroot.PROJECT / "Documentation" / "benchmarks.rst"
README = buildroot.PROJECT / "README.md"
BEGIN, END = "benchmark: begin", "benchmark: end"

# What the README shows, and how it calls that.
MAIN_ROWS = {
    "4K fault, read": "one 4K fault, VM exit to VM entry, one page a fault",
    "populate 256M of 4K": "guest reads 256M of resident 4K memory, in order",
    "populate 256M of 4K: faults": "the same: faults",
    "touch 256M of 4K at random": "the same at random",
    "touch 1/16 of 256M of 4K at random": "one page in 16, at random",
    "snapshot, sequential: reads": "restored snapshot, 64M: reads in order",
    "snapshot, 1/4 at random: reads": "restored snapshot: reads of a quarter, at random",
    "dirty log of 64M of 4K: write all pages": "dirty log: guest writes 64M again",
    "unmap 1G of 4K": "the host takes 1G of 4K pages away",
    "4K fault, write, page is new to the host": "one 4K fault, page is new to the host",
    "npt=0: switch among 8 address spaces, 4 pages written": "shadow paging: guest switches CR3, writes 4 pages",
    "4K fault of a VM that is not owned": "one 4K fault of a VM of in-tree KVM, rmmu loaded",
}


def publish(results, title):
    """Writes all of it."""
    _replace(DOCUMENT, ["::", "", *(f"    {line}".rstrip() for line in benchmark.text(results).splitlines())])
    _replace(README, _main_table(results))
    plot.draw(results, title, DOCUMENT.with_suffix(""))


def _main_table(results):
    by_name = {item["row"]: item for item in results}
    missing = [name for name in MAIN_ROWS if name not in by_name]
    if missing:
        raise ui.Error(f"the results lack rows that the README shows: {', '.join(missing)}")
    lines = ["| | in-tree | rmmu | ratio | |", "|---|---:|---:|---:|---|"]
    for name, shown in MAIN_ROWS.items():
        item = by_name[name]
        lines.append(f"| {shown} | {item['in_tree']:,.0f} | {item['rmmu']:,.0f} | {item['ratio']:.3f} | {item['unit']} |")
    return lines


def _replace(path, lines):
    text = Path(path).read_text().splitlines()
    places = [[number for number, line in enumerate(text) if marker in line] for marker in (BEGIN, END)]
    if [len(found) for found in places] != [1, 1]:
        raise ui.Error(f"{path} has not one line with '{BEGIN}' and one with '{END}'")
    (begin,), (end,) = places
    text[begin + 1:end] = ["", *lines, ""]
    Path(path).write_text("\n".join(text) + "\n")

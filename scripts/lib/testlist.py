# SPDX-License-Identifier: GPL-2.0
"""Lists of tests: what to run, for how long, on what condition, and what to expect.

A list has one test a line: NAME LIMIT TAGS COMMAND, where LIMIT is in seconds and TAGS are
comma-separated or "-". The tags:

  nested   runs a guest of a guest, which rmmu may refuse with an error-level message
  rmmu     needs VMs of rmmu's; it is not run on in-tree KVM
  errors   provokes errors, so error-level messages of rmmu are no failure
  no-vm    may pass without rmmu having served a VM
  slow     runs in `make check-all` only
  long     takes many minutes; runs with `scripts/check --long` only
  vmx      runs in `make check` in the modes with VMX, too; the others do when such a mode is asked for, or with --all
  tcg      is about QEMU's emulator, or needs more speed than the one with VMX has
  faults   makes allocations fail, so it is for the debug kernel only
  alone    gets a VM boot of its own, because it leaves the machine in another state
  demo     needs QEMU and a guest's kernel in the VM
  retry    fails now and then on in-tree KVM too, so it may be tried again
"""

from dataclasses import dataclass, field
from pathlib import Path

import ui

TAGS = {"nested", "rmmu", "errors", "no-vm", "slow", "long", "alone", "demo", "retry", "faults", "tcg", "vmx"}
RESULTS = {"PASS", "FAIL", "SKIP", "TIMEOUT"}
# In a column of rmmu: what in-tree KVM does.
SAME = "="


@dataclass(frozen=True)
class Test:
    name: str
    limit: int
    tags: frozenset
    command: str


def read(path):
    tests = []
    for number, text in _lines(path):
        fields = text.split(None, 3)
        if len(fields) != 4 or not fields[1].isdigit():
            raise ui.Error(f"{path}:{number}: expected NAME LIMIT TAGS COMMAND, found: {text}")
        tags = frozenset(fields[2].split(",")) - {"-"}
        if tags - TAGS:
            raise ui.Error(f"{path}:{number}: unknown tags {', '.join(sorted(tags - TAGS))}")
        tests.append(Test(fields[0], int(fields[1]), tags, fields[3]))
    names = [test.name for test in tests]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ui.Error(f"{path}: listed twice: {', '.join(sorted(twice))}")
    return tests


@dataclass
class Expectations:
    """Expected results: by test and column. Several results separated by "|" are all acceptable."""

    columns: list
    rows: dict = field(default_factory=dict)

    def override(self, other):
        """Take over what another table says about tests and columns, and its reason."""
        for test, row in other.rows.items():
            said = {column: value for column, value in row.items() if value != SAME}
            self.rows[test] = {**self.rows.get(test, {}), **said}

    def of(self, test, columns):
        """The set of acceptable results by the first of these columns that has one, and the reason."""
        row = self.rows.get(test, {})
        for column in columns:
            if row.get(column, SAME) != SAME:
                return set(row[column].split("|")), row.get("reason", "")
        return {"PASS"}, row.get("reason", "")


def read_expected(path):
    """A table with a header: test, one column a mode (and "rmmu" in front of it), reason."""
    lines = list(_lines(path))
    header = lines[0][1].split("\t")
    table = Expectations(header[1:])
    for number, text in lines[1:]:
        fields = text.split("\t")
        row = dict(zip(header[1:], fields[1:]))
        for column, value in row.items():
            if column != "reason" and value != SAME and set(value.split("|")) - RESULTS:
                raise ui.Error(f"{path}:{number}: {column} is '{value}', which is no result")
        table.rows[fields[0]] = row
    return table


def _lines(path):
    for number, text in enumerate(Path(path).read_text().splitlines(), 1):
        if text.strip() and not text.startswith("#"):
            yield number, text

# SPDX-License-Identifier: GPL-2.0
"""Count results, compare them with what is expected, and tell the user."""

from dataclasses import dataclass, field

import kmsg
import ui

# What a run that went wrong is worth in its summary, which may be all that is kept of it: so many failures, with so many
# lines of the log of each.
SHOWN_FAILURES = 8
SHOWN_LINES = 30


@dataclass
class Tally:
    """Results of a whole run. Its last line is the contract with CI."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list = field(default_factory=list)
    surprises: list = field(default_factory=list)
    # Where the emulator was at fault; the test ran again.
    emulator_faults: list = field(default_factory=list)
    # {(test, mode): {"in_tree": result, "rmmu": result}}
    table: dict = field(default_factory=dict)

    def add(self, name, result, why=""):
        """One result with nothing to compare with."""
        if result == "PASS":
            self.passed += 1
        elif result == "SKIP":
            self.skipped += 1
        else:
            self.failed += 1
            self.failures.append(f"{name}: {result} {why}".rstrip())

    def judge(self, name, outcome, expected, reason):
        """One outcome against the set of acceptable results; what to call it."""
        result = outcome.result
        if result in expected:
            if result == "PASS":
                self.passed += 1
            else:
                self.skipped += 1
            return result if result in ("PASS", "SKIP") else "XFAIL"
        wanted = "|".join(sorted(expected))
        if result == "PASS":
            self.passed += 1
            self.surprises.append(f"{name}: passed, and {wanted} was expected ({reason or 'no reason given'})")
            return "XPASS"
        self.failed += 1
        shown = kmsg.excerpt(outcome.output, SHOWN_LINES).splitlines() if len(self.failures) < SHOWN_FAILURES else []
        self.failures.append("\n".join((f"{name}: {result}, expected {wanted}: {outcome.why}", f"      log: {outcome.log}",
                                        *(f"      | {line[:200]}" for line in shown))))
        return result

    def record(self, test, mode, who, result):
        self.table.setdefault((test, mode), {})[who] = result

    def write_table(self, path, about):
        """The table, under a comment that says what it is about."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"# {about}", "test\tmode\tin_tree\trmmu"]
        for (test, mode), row in self.table.items():
            lines.append(f"{test}\t{mode}\t{row.get('in_tree', '-')}\t{row.get('rmmu', '-')}")
        path.write_text("\n".join(lines) + "\n")

    def finish(self):
        """Print the summary; the exit code."""
        for title, lines in (("Unexpected passes (update selftests/expected)", self.surprises),
                             (f"Faults of the emulator: {len(self.emulator_faults)} (see Documentation/testing.rst)",
                              self.emulator_faults),
                             ("Failures", self.failures)):
            if lines:
                print(f"\n{title}:")
                for line in lines:
                    print(f"  {line}")
        print(f"\n{self.passed} passed, {self.failed} failed, {self.skipped} skipped", flush=True)
        return 1 if self.failed or not self.passed else 0


def show(label, who, mode, outcome):
    """One line a test."""
    text = f"  {label:<7} {who:<7} {mode:<9} {outcome.test.name} ({outcome.seconds:.1f}s)"
    if label not in ("PASS",) and outcome.why:
        text += f": {outcome.why[:160]}"
    ui.line(text)
    for line in outcome.output.splitlines():
        if line.startswith("in-tree hits "):
            ui.line(f"          {line}")
    for check in outcome.skipped_checks:
        ui.line(f"          skipped: {check[:160]}")

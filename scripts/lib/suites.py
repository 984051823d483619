# SPDX-License-Identifier: GPL-2.0
"""The suites that run in the test VM: ours and upstream's, on in-tree KVM and on rmmu, a mode at a time."""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

import guest
import harness
import owntests
import qemu
import report
import testlist
import testvm
import ui
import upstream

UPSTREAM_LIST = owntests.SOURCE / "upstream.list"
UPSTREAM_EXPECTED = owntests.SOURCE / "expected" / "kvm-selftests.tsv"
DEBUG_EXPECTED = owntests.SOURCE / "expected" / "debug.tsv"

# One of upstream's tests wants 1 GiB of huge pages; another fills 1 GiB.
HUGEPAGES = 560
MEMORY = "6G"
# KASAN takes an eighth, and keeps freed memory for a while.
DEBUG_MEMORY = "8G"
RETRIES = 2


@dataclass(frozen=True)
class Suite:
    name: str
    tests: list
    expected: testlist.Expectations
    strict_tap: bool


def load(debug=False):
    """Both suites, ours first; with what is expected on the debug kernel, if that is to boot."""
    own, upstreams = testlist.read_expected(owntests.expected_path()), testlist.read_expected(UPSTREAM_EXPECTED)
    if debug:
        differences = testlist.read_expected(DEBUG_EXPECTED)
        own.override(differences)
        upstreams.override(differences)
    return [
        Suite("rmmu", testlist.read(owntests.list_path()), own, True),
        Suite("kvm", testlist.read(UPSTREAM_LIST), upstreams, False),
    ]


# How much to do: which tests, by their tags.
EFFORTS = {
    "normal": lambda tags: not tags & {"slow", "long"},
    # In a mode that nobody asked for, and whose machine is slow.
    "vmx": lambda tags: "vmx" in tags and not tags & {"slow", "long"},
    "slow": lambda tags: "long" not in tags,
    "long": lambda tags: "long" in tags,
}


def matches(test, patterns):
    return not patterns or any(pattern in test.name or fnmatch.fnmatch(test.name, pattern) for pattern in patterns)


def select(tests, on_rmmu, effort, patterns, debug, vmx=False):
    """The tests of a list that this run wants."""
    return [test for test in tests
            if (on_rmmu or "rmmu" not in test.tags)
            and EFFORTS[effort](test.tags)
            and (debug or "faults" not in test.tags)
            and not (vmx and "tcg" in test.tags)
            and matches(test, patterns)]


def run(environment, suite, mode, module, tally, logs, effort="normal", patterns=None):
    """Run a suite in a mode, on rmmu when there is a module; results go into the tally."""
    who = "rmmu" if module else "in-tree"
    debug = environment.booted.debug
    vmx = bool(testvm.MODES[mode].model)
    tests = select(suite.tests, bool(module), effort, patterns, debug, vmx)
    elsewhere = [test.name for test in select(suite.tests, bool(module), effort, patterns, True, vmx) if test not in tests]
    if elsewhere:
        ui.line(f"not for this kernel, which cannot make allocations fail (scripts/check --kernel debug): "
                f"{', '.join(elsewhere)}")
    plain = [test for test in tests if "demo" not in test.tags]
    with_guest = [test for test in tests if "demo" in test.tags]
    for group, files in ((plain, []), (with_guest, guest.files)):
        if group:
            extra = files(environment) if callable(files) else files
            _run_group(environment, suite, group, mode, module, who, tally, Path(logs), extra)


def _run_group(environment, suite, tests, mode, module, who, tally, logs, extra):
    commands = " ".join(test.command for test in tests)
    files = [*owntests.files(environment), *extra]
    if upstream.IN_GUEST + "/" in commands:
        files += upstream.needed(environment, commands)
    config = testvm.Config(
        mode=mode,
        files=files,
        hugepages=HUGEPAGES if "/kvm/" in commands else 0,
        machine=qemu.Options(memory=DEBUG_MEMORY if environment.booted.debug else MEMORY),
    )
    if module:
        config = harness.for_rmmu(config, module)
    ui.line(f"{suite.name} selftests on {who}, mode {mode}: {len(tests)} tests")
    with harness.Runner(environment, config, logs / f"{who}-{mode}", suite.strict_tap,
                        must_own=bool(module)) as runner:
        for test in tests:
            expected, reason = _expected(suite, test, mode, bool(module))
            outcome = _run_test(runner, test, expected)
            label = tally.judge(f"{who} {mode} {test.name}", outcome, expected, reason)
            if label == "XFAIL":
                outcome.why = f"as expected ({reason}); {outcome.why}"
            tally.record(test.name, mode, "rmmu" if module else "in_tree", outcome.result)
            report.show(label, who, mode, outcome)
    tally.emulator_faults += [f"{who} {mode} {name}: at {where}" for name, where in runner.emulator_faults]
    if module:
        ui.line(f"  audits of page tables: {runner.audited['audits']}, entries looked at: "
                f"{runner.audited['audited_entries']}, broken invariants: {runner.audited['audit_findings']}")
    for boot, leaks in runner.leaks:
        _judge_leaks(f"{who} {mode} no memory of KVM's or rmmu's leaked in boot {boot}", leaks, tally, runner.logs)


def _judge_leaks(name, leaks, tally, logs):
    """The verdict of the leak detector on one boot; what is not KVM's is told, and no failure."""
    why = leaks.failed or (f"{len(leaks.ours)} objects, see kmemleak-*.log in {logs}" if leaks.ours else "")
    tally.add(name, "FAIL" if why else "PASS", why)
    ui.line(f"  {'FAIL' if why else 'PASS':<7} {name}{f': {why}' if why else ''}")
    if leaks.others:
        ui.line(f"          leaked by others: {len(leaks.others)} objects, see kmemleak-*.log in {logs}")


def _run_test(runner, test, expected):
    """Run a test; one that fails now and then on in-tree too gets more chances, visibly."""
    outcome = runner.run(test)
    for attempt in range(RETRIES if "retry" in test.tags else 0):
        if outcome.result in expected:
            break
        ui.line(f"  again   {test.name}: {outcome.result} {outcome.why[:100]}")
        outcome = runner.run(test)
    return outcome


def _expected(suite, test, mode, on_rmmu):
    """Acceptable results, from the most specific column that says something."""
    columns = [mode, *testvm.MODES[mode].like, "default"]
    if on_rmmu:
        columns = [f"rmmu:{column}" for column in columns] + columns
    return suite.expected.of(test.name, columns)

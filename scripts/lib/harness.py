# SPDX-License-Identifier: GPL-2.0
"""Run a list of tests in the test VM: in as few boots as possible, whatever the tests do to it.

A test fails when its exit code or its TAP says so, when its time is up, when the kernel
warned while it ran, and, with rmmu loaded, when it left a VM or a page-table page behind.
A VM that died or hung fails the test that ran and is booted again for the next one. If it died of
a known fault of the emulator, and of nothing else, the test runs again once, in a new boot.

Besides what a test can say itself (PASS, FAIL, SKIP, TIMEOUT) there are CRASH (the VM died or
hung), KERNEL (it warned) and LEAK (something was left behind), which are never expected.
"""

import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import kmemleak
import kmsg
import tap
import testvm
import ui

STATS = "/sys/kernel/debug/rmmu/stats"
# Page-table pages are freed after an RCU grace period.
SETTLE_SECONDS = 10
# A machine that does not come up this often is not tried again.
BOOT_TRIES = 2


@dataclass
class Outcome:
    """What became of one test."""

    test: object
    result: str
    why: str
    seconds: float
    owned_vms: int = None
    output: str = ""
    log: Path = None
    skipped_checks: list = field(default_factory=list)


class Runner:
    """Runs tests under one configuration; boots VMs as needed. A context manager."""

    def __init__(self, environment, config, log_dir, strict_tap=False, must_own=False):
        self._environment = environment
        self._config = config
        self._logs = Path(log_dir)
        self._strict = strict_tap
        self._must_own = must_own
        self._vm = None
        self._boots = 0
        self._failed_boots = 0
        # What the leak detector found at the end of each boot, on a kernel that has it: (boot, kmemleak.Leaks).
        self.leaks = []
        # What rmmu's audits looked at in all tests.
        self.audited = {"audits": 0, "audited_entries": 0, "audit_findings": 0}
        # Faults of the emulator: (test, where).
        self.emulator_faults = []
        self._logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Whoever interrupts a run does not want to wait until the VM has time to say what it leaked.
        if kind:
            self._drop_vm()
        else:
            self._end_vm()

    @property
    def logs(self):
        return self._logs

    @property
    def boots(self):
        return self._boots

    def run(self, test):
        """One test, to its outcome; twice if the emulator was at fault. It is believed once a test."""
        outcome, where = self._attempt(test)
        if not where:
            return outcome
        believed = test.name not in (name for name, _ in self.emulator_faults)
        self.emulator_faults.append((test.name, where))
        what = f"a fault of the emulator: an INT3 at {where} that the kernel has taken away"
        if not believed:
            outcome.why += f" ({what}, for a second time)"
            return outcome
        kept = outcome.log.with_suffix(".emulator.log")
        outcome.log.replace(kept)
        ui.line(f"  again   {test.name}: {what}; log: {kept}")
        return self.run(test)

    def _attempt(self, test):
        """One run of a test: its outcome, and where the emulator was at fault, if it was."""
        if "alone" in test.tags:
            self._end_vm()
        started = time.monotonic()
        where = None
        try:
            outcome = self._run(test)
        except testvm.Crashed as crash:
            self._drop_vm()
            where = kmsg.emulator_fault(crash.console)
            outcome = Outcome(test, "CRASH", crash.reason, time.monotonic() - started,
                              output=f"{crash.output}\n{testvm.describe_crash(crash)}")
        if "alone" in test.tags:
            self._end_vm()
        outcome.log = self._logs / (re.sub(r"[^\w.=-]+", "_", test.name) + ".log")
        outcome.log.write_text(f"$ {test.command}\n{outcome.output}\n"
                               f"# {outcome.result} {outcome.why} ({outcome.seconds:.1f} s)\n")
        return outcome, where

    def command(self, command, limit=60):
        """A command that is no test, in the VM of the tests; its result."""
        return self._booted().run(command, limit)

    def _booted(self):
        if self._vm is None:
            if self._failed_boots == BOOT_TRIES:
                raise testvm.Crashed("the VM does not boot: see the first failure", "")
            self._failed_boots += 1
            self._boots += 1
            console = self._logs / f"console-{self._boots}.log"
            self._vm = testvm.TestVm(self._environment, self._config, console)
            log = self._vm.boot_kernel_log
            if kmsg.problems(log) or "rmmu-vm: cannot load" in log:
                self._drop_vm()
                raise testvm.Crashed("the VM booted with errors", log)
            self._failed_boots = 0
        return self._vm

    def _end_vm(self):
        """Ends a VM that is in order, after a look at what it leaked."""
        if self._vm and self._environment.booted.debug:
            try:
                leaks = kmemleak.scan(self._vm)
            except testvm.Crashed as crash:
                leaks = kmemleak.Leaks([], [], f"{crash.reason}\n{testvm.describe_crash(crash)}")
            self.leaks.append((self._boots, leaks))
            (self._logs / f"kmemleak-{self._boots}.log").write_text(leaks.text)
        self._drop_vm()

    def _drop_vm(self):
        if self._vm:
            self._vm.close()
            self._vm = None

    def _run(self, test):
        vm = self._booted()
        before = self._stats() if self._config.module else None
        done = vm.run(test.command, test.limit)
        result, why = tap.verdict(done.code, done.output, self._strict)
        problems = kmsg.problems(done.kernel, allow_rmmu_errors=bool(test.tags & {"errors", "nested"}),
                                 allow_no_memory="faults" in test.tags)
        output = done.output
        if problems:
            result, why = "KERNEL", f"kernel: {problems[0].strip()}" + (f" (and: {why})" if why else "")
        if result != "PASS":
            output += f"\n--- kernel messages ---\n{done.kernel}"
        outcome = Outcome(test, result, why, done.seconds, output=output,
                          skipped_checks=tap.skipped_checks(done.output))
        if before is not None:
            self._judge_rmmu(outcome, before)
        return outcome

    def _stats(self):
        """rmmu's counters; empty when the module is not loaded."""
        text = self._vm.run(f"cat {STATS} 2>/dev/null", 10).output
        return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}

    def _judge_rmmu(self, outcome, before):
        deadline = time.monotonic() + SETTLE_SECONDS * self._environment.booted.time_factor
        while True:
            now = self._stats()
            left = {name: now.get(name) for name in ("vms_owned", "table_pages") if now.get(name, 0)}
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        problem = ""
        # A test may load the module anew, which begins to count anew.
        gains = {name: now.get(name, 0) - (before.get(name, 0) if before.get(name, 0) <= now.get(name, 0) else 0)
                 for name in self.audited}
        for name, gain in gains.items():
            self.audited[name] += gain
        if not now:
            problem = "rmmu is not loaded any more"
            # What follows must not run on in-tree KVM by mistake.
            self._end_vm()
        elif left:
            problem = "left behind: " + ", ".join(f"{name} {value}" for name, value in left.items())
            self._end_vm()
        elif gains["audit_findings"]:
            problem = f"audits found {gains['audit_findings']} broken invariants, see the kernel's messages"
        else:
            outcome.owned_vms = now.get("vms_owned_total", 0) - before.get("vms_owned_total", 0)
            if self._must_own and outcome.owned_vms == 0 and outcome.result == "PASS" and "no-vm" not in outcome.test.tags:
                problem = "rmmu served none of its VMs"
        if problem:
            outcome.result = "LEAK" if left else "FAIL"
            outcome.why = f"{problem} (and: {outcome.why})" if outcome.why else problem


def for_rmmu(config, module, params="own_new_vms=1 audit_at_end=1"):
    """A configuration with rmmu on top, which audits the page tables of every VM when it ends."""
    return replace(config, module=Path(module), module_params=params)

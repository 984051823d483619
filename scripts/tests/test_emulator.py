# SPDX-License-Identifier: GPL-2.0
"""The emulator's fault with text that the kernel pokes: recognised exactly, forgiven once a test, and counted."""

import contextlib
import io
import subprocess
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import kmsg
import report
import suites
import testlist
import testvm

OOPS = """\
<6>[   60.100000] rmmu-vm: begin 7
[   61.000001] Oops: int3: 0000 [#1] SMP NOPTI
[   61.000002] CPU: 0 UID: 0 PID: 0 Comm: swapper/0 Tainted: G           OE       7.2.12+deb14-amd64 #1 PREEMPT(lazy)  Debian 7.2.12-1
[   61.000003] Tainted: [O]=OOT_MODULE, [E]=UNSIGNED_MODULE
[   61.000004] Hardware name: QEMU Standard PC (Q35 + ICH9, 2009), BIOS 1.17.0-debian-1.17.0-1 04/01/2014
[   61.000005] RIP: 0010:__schedule+0x2a4/0x1a40
[   61.000006] Code: 89 e7 e8 11 22 33 00 48 8b 45 c8 65 48 8b 0d 10 20 30 02 48 89 45 d0 0f <1f> 44 00 00 48 8b 7d c0 e8 10 20 00 00
[   61.000007] RSP: 0018:ffffffff83203e10 EFLAGS: 00000086
[   61.000008] Call Trace:
[   61.000009]  <TASK>
[   61.000010]  schedule_idle+0x23/0x40
[   61.000011]  do_idle+0x1a6/0x210
[   61.000012]  cpu_startup_entry+0x29/0x30
[   61.000013]  rest_init+0xcc/0xd0
[   61.000014]  </TASK>
[   61.000015] Modules linked in: kvm_rmmu(OE) kvm_amd kvm irqbypass
[   61.000016] ---[ end trace 0000000000000000 ]---
[   61.000017] RIP: 0010:__schedule+0x2a4/0x1a40
[   61.000018] Kernel panic - not syncing: Fatal exception
"""
# What the kernel prints, too, when it stops: where the other CPUs are.
OTHERS = """\
[   61.000019] Sending NMI from CPU 0 to CPUs 1-2:
[   61.000020] NMI backtrace for cpu 1
[   61.000021] RIP: 0010:pv_native_safe_halt+0xf/0x20
[   61.000022] Code: f3 0f 1e fa eb 07 0f 00 2d d5 ba 15 00 fb e9 <10> cc cc cc cc 90 66 66 2e 0f 1f 84 00 00 00 00 00 90 90
[   61.000023] Call Trace:
[   61.000024]  default_idle+0x9/0x20
"""
# Another CPU runs the same stale translation before the first one has stopped it.
SECOND = """\
[   61.000016] Oops: int3: 0000 [#2] SMP NOPTI
[   61.000016] CPU: 2 UID: 0 PID: 1549 Comm: kworker/2:3 Tainted: G      D    OE       7.2.12+deb14-amd64 #1 PREEMPT(lazy)  Debian 7.2.12-1
[   61.000017] RIP: 0010:__schedule+0x2a4/0x1a40
[   61.000017] Code: 89 e7 e8 11 22 33 00 48 8b 45 c8 65 48 8b 0d 10 20 30 02 48 89 45 d0 0f <1f> 44 00 00 48 8b 7d c0 e8 10 20 00 00
"""
END = "[   61.000016] ---[ end trace"
NOP = "0f <1f> 44 00 00 48"
PLACE = "__schedule+0x2a4/0x1a40"


def changed(old, new):
    """The report with another text in it."""
    assert old in OOPS
    return OOPS.replace(old, new)


class Signature(unittest.TestCase):
    """kmsg.emulator_fault()."""

    def test_the_exact_signature_is_recognised(self):
        for text in (OOPS, OOPS + OTHERS, OOPS.replace("exception", "exception in interrupt")):
            self.assertEqual(kmsg.emulator_fault(text), PLACE)

    def test_other_cpus_may_run_the_same_translation(self):
        self.assertEqual(kmsg.emulator_fault(OOPS.replace(END, SECOND + END)), PLACE)
        self.assertEqual(kmsg.emulator_fault(OOPS + SECOND), PLACE)

    def test_what_another_cpu_dies_of_counts(self):
        for second in (SECOND.replace("Oops: int3: 0000", "Oops: 0000"), SECOND.replace("Oops: int3", "Oops: general protection fault"),
                       SECOND.replace("0f <1f> 44", "cc <1f> 44"), SECOND.replace("1a40\n", "1a40 [kvm_rmmu]\n")):
            with self.subTest(second=second):
                self.assertIsNone(kmsg.emulator_fault(OOPS.replace(END, second + END)))

    def test_only_the_trap_itself_counts(self):
        in_a_module = OOPS.replace(PLACE, f"{PLACE} [kvm]")
        without_code = OOPS.replace("Code: 89 e7", "Code: Unable to access opcode bytes at 0xffffffffc05ffff0. 89 e7")
        for text in (in_a_module, without_code, without_code.replace("RIP: 0010:" + PLACE, "RIP: 0033:0x401000")):
            with self.subTest(text=text):
                self.assertIsNone(kmsg.emulator_fault(text + OTHERS))

    def test_each_instruction_that_the_kernel_pokes_is_recognised(self):
        for code in ("66 <90> 48 8b 7d c0", "e9 <10> 20 00 00 48", "eb <10> 48 8b 7d c0", "e8 <10> 20 00 00 48"):
            with self.subTest(code=code):
                self.assertEqual(kmsg.emulator_fault(changed(NOP, code)), PLACE)

    def test_an_int3_that_is_there_is_none_of_the_emulator(self):
        for code in ("cc <1f> 44 00 00 48", "cc <cc> cc cc cc cc", "90 <cc> cc cc cc cc", "0f <0b> 44 00 00 48", "48 <8b> 7d c0 e8 10"):
            with self.subTest(code=code):
                self.assertIsNone(kmsg.emulator_fault(changed(NOP, code)))

    def test_a_frame_of_rmmu_on_any_stack_is_none_of_the_emulator(self):
        other_cpu = "[   61.000019] NMI backtrace for cpu 1\n[   61.000020] Call Trace:\n[   61.000021]  fault+0x1/0x2 [kvm_rmmu]\n"
        for text in (changed("do_idle+0x1a6/0x210", "rmmu_page_fault+0x1a6/0x210 [kvm_rmmu]"),
                     changed("do_idle+0x1a6/0x210", "? rmmu_page_fault+0x1a6/0x210 [kvm_rmmu]"), OOPS + other_cpu):
            with self.subTest(text=text):
                self.assertIsNone(kmsg.emulator_fault(text))

    def test_a_trap_in_a_module_is_none_of_the_emulator(self):
        for module in ("kvm", "kvm_amd", "kvm_rmmu"):
            with self.subTest(module=module):
                self.assertIsNone(kmsg.emulator_fault(OOPS.replace("+0x2a4/0x1a40", f"+0x2a4/0x1a40 [{module}]")))

    def test_another_oops_is_none_of_the_emulator(self):
        for kind in ("Oops: 0002 [#1] SMP NOPTI", "Oops: general protection fault: 0000 [#1] SMP NOPTI",
                     "Oops: invalid opcode: 0000 [#1] SMP NOPTI", "Oops: int3: 0000 [#2] SMP NOPTI",
                     "Oops: int3: 0010 [#1] SMP NOPTI", "BUG: unable to handle page fault for address: 0000000000000010"):
            with self.subTest(kind=kind):
                self.assertIsNone(kmsg.emulator_fault(changed("Oops: int3: 0000 [#1] SMP NOPTI", kind)))

    def test_any_other_report_beside_it_is_none_of_the_emulator(self):
        for before, after in (("WARNING: CPU: 1 PID: 9 at mm/memory.c:1 f+0x1/0x2\n", ""), ("", "BUG: soft lockup - CPU#1\n"),
                              ("<3>[   60.0] kvm_rmmu: VM bugged\n", "")):
            with self.subTest(before=before, after=after):
                self.assertIsNone(kmsg.emulator_fault(before + OOPS + after))

    def test_a_report_that_is_cut_short_proves_nothing(self):
        for end in ("RIP: 0010", "Code: "):
            with self.subTest(end=end):
                self.assertIsNone(kmsg.emulator_fault(OOPS[:OOPS.index(end)]))

    def test_a_quiet_log_has_no_fault(self):
        self.assertIsNone(kmsg.emulator_fault("[    1.0] all is well\n"))


class Machine:
    """A test VM of which the script says how each command ends: a console to crash with, or None to pass."""

    script = []
    boots = 0
    boot_kernel_log = ""

    def __init__(self, *_):
        Machine.boots += 1

    def run(self, command, limit):
        if command != "test":
            return testvm.Result(0, "", "", 0.1)
        console = Machine.script.pop(0)
        if console is not None:
            raise testvm.Crashed("the VM died during the command", console)
        return testvm.Result(0, "1..1\nok 1\n", "", 0.1)

    def close(self):
        pass


class Retry(unittest.TestCase):
    """What becomes of a test, and of the run."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="rmmu-test-")
        self.addCleanup(scratch.cleanup)
        self.logs = Path(scratch.name)
        patch = mock.patch.object(testvm, "TestVm", Machine)
        patch.start()
        self.addCleanup(patch.stop)
        Machine.boots = 0

    def run_tests(self, *scripts, tags=()):
        """Runs one test a script in one suite: the tally, and all that was printed."""
        Machine.script = [console for script in scripts for console in script]
        tests = [testlist.Test(f"t{number}", 10, frozenset(tags), "test") for number, _ in enumerate(scripts)]
        suite = suites.Suite("rmmu", tests, testlist.Expectations([]), True)
        booted = types.SimpleNamespace(debug=False, time_factor=1)
        environment = types.SimpleNamespace(booted=booted)
        tally, said = report.Tally(), io.StringIO()
        with contextlib.redirect_stdout(said), mock.patch.object(suites.owntests, "files", lambda environment: []):
            suites.run(environment, suite, "default", None, tally, self.logs)
            tally.code = tally.finish()
        self.assertEqual(Machine.script, [])
        return tally, said.getvalue()

    def test_the_fault_is_told_and_the_test_runs_again_in_a_new_boot(self):
        tally, said = self.run_tests([OOPS, None], [None])
        self.assertEqual((tally.passed, tally.failed, tally.code, Machine.boots), (2, 0, 0, 2))
        self.assertIn(f"again   t0: a fault of the emulator: an INT3 at {PLACE}", said)
        self.assertIn("Faults of the emulator: 1 (", said)
        self.assertEqual(said.splitlines()[-1], "2 passed, 0 failed, 0 skipped")
        self.assertIn("Oops: int3", (self.logs / "in-tree-default" / "t0.emulator.log").read_text())

    def test_a_second_time_is_a_failure(self):
        tally, said = self.run_tests([OOPS, OOPS], [None])
        self.assertEqual((tally.passed, tally.failed, tally.code), (1, 1, 1))
        self.assertIn("for a second time", said)
        self.assertIn("Faults of the emulator: 2 (", said)

    def test_a_second_time_is_a_failure_for_tests_that_are_tried_again_too(self):
        tally, _ = self.run_tests([OOPS, OOPS, OOPS, OOPS], tags=["retry"])
        self.assertEqual((tally.passed, tally.failed), (0, 1))

    def test_each_test_is_forgiven_once(self):
        tally, said = self.run_tests([OOPS, None], [OOPS, None])
        self.assertEqual((tally.passed, tally.failed), (2, 0))
        self.assertIn("Faults of the emulator: 2 (", said)

    def test_what_fails_after_the_fault_is_a_failure(self):
        tally, _ = self.run_tests([OOPS, "[ 1.0] BUG: unable to handle page fault\n"])
        self.assertEqual((tally.passed, tally.failed), (0, 1))

    def test_any_other_crash_is_a_failure_at_once(self):
        for console in (changed("do_idle+0x1a6/0x210", "walk+0x1a6/0x210 [kvm_rmmu]"), changed("Oops: int3: 0000", "Oops: 0000"),
                        changed(NOP, "cc <cc> cc cc cc cc"), ""):
            with self.subTest(console=console):
                tally, said = self.run_tests([console])
                self.assertEqual((tally.passed, tally.failed, tally.code), (0, 1, 1))
                self.assertNotIn("emulator", said)

    def test_the_summary_shows_what_the_kernel_said(self):
        report_line = "[    1.0] BUG: unable to handle page fault for address 17"
        _, said = self.run_tests(["[    0.9] all is well\n" + report_line + "\n"])
        summary = said[said.index("\nFailures:"):]
        self.assertIn(f"      | {report_line}", summary)
        self.assertIn("t0.log", summary)

    def test_the_summary_of_a_run_where_all_fails_is_short(self):
        _, said = self.run_tests(*(["[ 1.0] BUG: one\n" * 1000] for _ in range(100)))
        self.assertLess(len(said.splitlines()), 700)


class Death(unittest.TestCase):
    """How a machine that died is told: what ended it, and what it said."""

    def crash(self, command):
        """The crash of a machine whose emulator is a shell command."""
        with tempfile.TemporaryDirectory(prefix="rmmu-test-") as scratch:
            said = Path(scratch) / "said"
            with open(said, "wb") as output:
                process = subprocess.Popen(["sh", "-c", command], stderr=output)
            process.wait()
            machine = types.SimpleNamespace(
                receive=lambda deadline: b"", running=lambda: process.poll() is None, wait=process.wait, stop=lambda: None,
                console=lambda: "[ 1.0] the last line\n", stderr_log=said)
            vm = testvm.TestVm.__new__(testvm.TestVm)
            vm._machine, vm._pending, vm._patience = machine, b"half a li", 1
            with self.assertRaises(testvm.Crashed) as raised:
                vm._until("@@end", 1, "the command")
        return raised.exception

    def test_a_guest_that_ends_itself_is_all_there_is_to_tell(self):
        crash = self.crash("exit 0")
        self.assertEqual(crash.reason, "the VM died during the command")
        self.assertEqual(crash.output, "half a li")
        self.assertNotIn("--- emulator ---", testvm.describe_crash(crash))

    def test_an_emulator_that_fails_is_named_with_its_words(self):
        crash = self.crash("echo assertion failed >&2; exit 3")
        self.assertIn("the emulator exited with status 3", crash.reason)
        self.assertRegex(testvm.describe_crash(crash), "the last line\n.*emulator.*\nassertion failed")

    def test_an_emulator_that_was_killed_is_named(self):
        self.assertIn("the emulator was ended by signal 9", self.crash("kill -9 $$").reason)

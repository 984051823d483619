# SPDX-License-Identifier: GPL-2.0
"""What is built and packed for a command in the test VM."""

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import upstream


class Needed(unittest.TestCase):
    """upstream.needed()."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="rmmu-test-")
        self.addCleanup(scratch.cleanup)
        self.built = Path(scratch.name)
        (self.built / "x86").mkdir()
        for name in ("dirty_log_test", "x86/smm_test"):
            (self.built / name).touch()
        patch = mock.patch.object(upstream, "ensure", return_value=self.built)
        self.ensure = patch.start()
        self.addCleanup(patch.stop)

    def test_a_command_of_none_of_upstreams_builds_nothing(self):
        for command in ("cat /x", "ls /sys/kernel/debug/kvm/*", "cat /sys/module/kvm/parameters/tdp_mmu", "ls /kvm-x /kvmx",
                        "dmesg | grep x86/kvm", "/selftests/smoke"):
            with self.subTest(command=command):
                self.assertEqual(upstream.needed(None, command), [])
        self.ensure.assert_not_called()

    def test_a_command_that_names_some_gets_these(self):
        self.assertEqual(upstream.needed(None, "(/kvm/dirty_log_test -M dirty-log; '/kvm/x86/smm_test')"),
                         [(f"/kvm/{name}", self.built / name) for name in ("dirty_log_test", "x86/smm_test")])

    def test_a_command_that_goes_there_gets_all(self):
        for command in ("cd /kvm && ./dirty_log_test", "ls /kvm", "ls /kvm/", "for test in /kvm/x86/*; do $test; done", ""):
            with self.subTest(command=command):
                self.assertEqual(upstream.needed(None, command), [("/kvm", self.built)])

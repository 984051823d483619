# SPDX-License-Identifier: GPL-2.0
"""A command that cannot go on says why and what to do, whatever the reason: never with a traceback."""

import re
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path

import support
import ui

BUILD = """
    import kernel
    kernel.build_module(None, kernel.Kernel("7.2.0", "7.2", Path("/nowhere"), [], "key"))
"""


def is_running(pid):
    """Whether there is such a process which has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def read_only(path):
    """Shell commands that make a directory read-only, for root too."""
    return f"mount --bind '{path}' '{path}'; mount -o remount,bind,ro '{path}'; cd '{path}'"


class Places(support.Checkout):
    """Directories that cannot be written."""

    @support.needs_root
    def test_a_read_only_checkout_is_named(self):
        done = self.run_command(self.script(BUILD), before=read_only(self.project))
        self.assert_clear(done, self.project / "out", "Read-only file system", "clone it to another place")

    def test_a_checkout_of_another_user_is_named(self):
        self.project.chmod(0o555)
        done = self.run_command([*support.AS_NOBODY, *self.script(BUILD)])
        self.assert_clear(done, self.project / "out", "Permission denied", "clone it to another place")

    @support.needs_root
    def test_a_read_only_cache_is_named(self):
        (self.cache / "rmmu").mkdir(parents=True)
        for command in (["scripts/setup"], ["scripts/setup", "--refresh"], ["scripts/build-module"], ["scripts/host-test"],
                        ["scripts/in-root", "true"], ["scripts/demo"]):
            with self.subTest(command=command):
                done = self.run_command(command, before=f"{read_only(self.cache)}; cd '{self.project}'")
                self.assert_clear(done, self.cache / "rmmu", "Read-only file system", "XDG_CACHE_HOME")

    def test_a_cache_of_another_user_is_named(self):
        (self.cache / "rmmu" / "family").mkdir(parents=True)
        (self.cache / "rmmu" / "offer.json").touch()
        (self.cache / "rmmu").chmod(0o555)
        done = self.run_command([*support.AS_NOBODY, "scripts/setup", "--clean"])
        self.assert_clear(done, self.cache / "rmmu", "Permission denied", "cannot delete")

    def test_a_home_that_cannot_be_written_is_named(self):
        self.scratch.chmod(0o555)
        for command in ("scripts/host-test", "scripts/setup", "scripts/check", "scripts/bench"):
            with self.subTest(command=command):
                done = self.run_command([*support.AS_NOBODY, command], cache=False)
                self.assertNotIn("Traceback", done.stdout)
                self.assertEqual(done.returncode, 1)
        done = self.run_command([*support.AS_NOBODY, "scripts/setup", "--clean"], cache=False)
        self.assert_clear(done, self.scratch / ".cache" / "rmmu", "XDG_CACHE_HOME")

    def test_a_path_that_kbuild_cannot_take_is_refused_by_name(self):
        for name, shown in (("a b", "' '"), ("a:b", "':'"), ("a#b", "'#'"), ("a$b", "'$'")):
            with self.subTest(name=name):
                place = self.scratch / name
                self.project.rename(place)
                self.project = place
                for command in ("scripts/build-module", "scripts/setup", "scripts/check", "scripts/demo"):
                    self.assert_clear(self.run_command([command]), f"'{place}'", shown, "Clone it to another place")
        self.project.rename(self.scratch / "plain")
        self.project = self.scratch / "plain"
        self.cache = self.scratch / "a b"
        self.assert_clear(self.run_command(["scripts/setup"]), self.cache, "' '", "XDG_CACHE_HOME")

    @support.needs_root
    def test_a_user_without_a_home_is_told(self):
        done = self.run_command([*support.AS_NOBODY, "scripts/setup", "--clean"], home=False, cache=False)
        self.assert_clear(done, "no home directory", "XDG_CACHE_HOME")

    @support.needs_root
    def test_a_full_disk_is_named(self):
        self.cache.mkdir()
        fill = self.script("""
            import cache
            cache.keyed("big", build=lambda directory: (directory / "file").write_bytes(b"x" * (1 << 20)))
        """)
        done = self.run_command(fill, before=f"mount -t tmpfs -o size=64k none '{self.cache}'")
        self.assert_clear(done, "No space left on device", "make clean-cache", "larger disk")

    @support.needs_root
    def test_what_an_interrupted_build_left_is_made_again(self):
        make = self.script("""
            import cache
            def fail(directory):
                (directory / "half").touch()
                raise ui.Error("on purpose")
            for _ in range(2):
                try:
                    cache.keyed("entry", build=fail)
                except ui.Error as error:
                    print(error)
            print(sorted(path.name for path in cache.keyed("entry", build=lambda d: (d / "whole").touch()).iterdir()))
        """)
        done = self.run_command(make)
        self.assertEqual((done.returncode, done.stdout), (0, "on purpose\non purpose\n['whole']\n"))


class Commands(support.Checkout):
    """Programs that fail or are not there, and people who do not want to wait."""

    def test_a_failed_command_is_named(self):
        done = self.run_command(self.script("import subprocess\nsubprocess.run(['false', 'a b'], check=True)"))
        self.assert_clear(done, "'false 'a b'' failed (exit 1)")

    def test_a_missing_program_is_named(self):
        done = self.run_command(self.script("import subprocess\nsubprocess.run(['rmmu-no-such-program'])"))
        self.assert_clear(done, "the program rmmu-no-such-program is missing", "Install it")

    def test_a_missing_file_is_named(self):
        done = self.run_command(self.script("open('/nowhere/at/all')"))
        self.assert_clear(done, "/nowhere/at/all: No such file or directory")

    def test_an_error_of_the_scripts_is_still_shown_whole(self):
        done = self.run_command(self.script("return {}['rmmu']"))
        self.assertIn("Traceback", done.stdout)

    def test_an_interrupt_ends_the_command_that_runs(self):
        command = self.script("""
            with ui.step("waiting", log=sys.argv[1]) as step:
                step.run(["sh", "-c", "echo begun $$; exec sleep 600"])
        """)
        log = self.scratch / "log"
        # A shell ignores interrupts in what it starts in the background, and these tests may be that.
        child = subprocess.Popen(["env", "--default-signal=INT", *map(str, command), str(log)], stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)
        while not (begun := re.search(r"^begun (\d+)$", log.read_text() if log.exists() else "", re.M)):
            self.assertIsNone(child.poll())
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate()
        self.assertEqual((child.returncode, output.splitlines()[-1]), (130, "rmmu: interrupted"))
        self.assertNotIn("Traceback", output)
        # If the interrupt came while the command was being started, the kernel ends it when its parent has ended.
        deadline = time.monotonic() + 120
        while is_running(int(begun[1])):
            self.assertLess(time.monotonic(), deadline)

    def test_a_reader_that_goes_away_is_no_error(self):
        command = self.script("for _ in range(100000):\n    print('a line')")
        child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        child.stdout.readline()
        child.stdout.close()
        errors = child.stderr.read()
        child.stderr.close()
        self.assertEqual((child.wait(), errors), (128 + signal.SIGPIPE, ""))


class Explanations(unittest.TestCase):
    """ui.explain() beside the commands."""

    def test_a_time_limit_is_named(self):
        with self.assertRaises(subprocess.TimeoutExpired) as caught:
            subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.01, check=False)
        self.assertIn("did not end within", ui.explain(caught.exception))

    def test_an_error_of_the_scripts_has_no_explanation(self):
        self.assertIsNone(ui.explain(KeyError("x")))

# SPDX-License-Identifier: GPL-2.0
"""Each thing that the set-up demands of the archive moves, and the set-up copes or says what to do."""

import contextlib
import io
import json
import os
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import archive
import buildroot
import cache
import emulator
import fakearchive
import kernel
import ui

REAL_RUN = subprocess.run
EXPIRED = "E: Release file for http://mirror.invalid/debian/dists/forky/InRelease is expired (invalid since 3d)."
NEXT = {"CONFIG_CC_VERSION_TEXT": '"x86_64-linux-gnu-gcc-16 (Debian 16.2.0-4) 16.2.0"', "CONFIG_AS_VERSION": "24751",
        "CONFIG_LD_VERSION": "24751", "CONFIG_PAHOLE_VERSION": "133", "CONFIG_BINDGEN_VERSION_TEXT": '"bindgen 0.73.0"'}


class SetUp(unittest.TestCase):
    """A cache of its own, and an archive that only this test moves."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="rmmu-test-")
        self.addCleanup(scratch.cleanup)
        scratch = Path(scratch.name)
        self.world = fakearchive.World(scratch / "world.json")
        self.world.path.write_text(json.dumps(fakearchive.world(buildroot.package_names())))
        keyring = scratch / "keyring"
        keyring.touch()
        environ = {"XDG_CACHE_HOME": str(scratch / "cache")}
        os.environ.pop("RMMU_MIRROR", None)
        for patch in (mock.patch.dict(os.environ, environ), mock.patch.object(archive, "KEYRING", keyring),
                      mock.patch.object(archive, "host_is_suite", lambda: False), mock.patch("os.geteuid", lambda: 0),
                      mock.patch.object(archive.time, "sleep", lambda seconds: None),
                      mock.patch.object(buildroot.Root, "run", self.run_in_root),
                      mock.patch.object(ui.Step, "run", self.run_in_step), mock.patch("subprocess.run", self.run_on_host)):
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(self.new_process)
        self.new_process()
        self.said = ""

    def run_on_host(self, argv, **options):
        if argv[0] not in fakearchive.PROGRAMS:
            return REAL_RUN(argv, **options)
        return subprocess.CompletedProcess(argv, *fakearchive.run(self.world.path, argv))

    def run_in_step(self, argv, cwd=None, check=True, **_):
        code, output = fakearchive.run(self.world.path, argv, cwd)
        # mock.patch.object() leaves out which step it is: all logs of the set-up are in one directory.
        for log in (cache.dir() / "logs").glob("*.log"):
            with open(log, "a", encoding="utf-8") as out:
                out.write(output)
        if check and code:
            raise ui.Error(f"'{ui.brief(argv)}' failed (exit {code})\n{output}")
        return code

    def run_in_root(self, argv, check=True, **_):
        code = fakearchive.play(self.world.path, argv)
        if check and code:
            raise ui.Error(f"'{ui.brief(argv)}' failed (exit {code})")
        return subprocess.CompletedProcess(argv, code)

    @staticmethod
    def new_process():
        """Forgets what a process knows that has set up already."""
        buildroot._offer = None
        buildroot._asked = False
        for fd in cache._in_use.values():
            os.close(fd)
        cache._in_use.clear()

    def set_up(self, refresh=False):
        """One command's set-up: its kernel. What it prints is in self.said."""
        self.new_process()
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                return kernel.set_up(refresh)
        finally:
            self.said = said.getvalue()

    def move(self, **changes):
        """Changes packages' versions; None takes a package away."""
        with self.world as data:
            for name, version in changes.items():
                name = name.replace("_", "-")
                if version is None:
                    del data["packages"][name]
                else:
                    data["packages"][name] = {"Version": version}

    def move_kernel(self, version, release, **more):
        with self.world as data:
            data["packages"] = {name: fields for name, fields in data["packages"].items() if not name.startswith("linux-")}
            data["packages"].update(fakearchive.kernel_packages(release, version, **more))

    def earlier(self):
        """A complete set-up, as it was before the archive moved."""
        return self.set_up()

    def assert_falls_back(self, before, *words):
        """A refresh keeps the earlier set-up and says why; and the next command does not try anew."""
        root, stock = self.set_up(refresh=True)
        self.assertEqual((root.path, stock.tree), (before[0].path, before[1].tree))
        for word in (*words, "stays in use"):
            self.assertIn(word, self.said)
        with self.world as data:
            asked = data["asked"]
        root, stock = self.set_up()
        self.assertEqual((root.path, stock.tree, self.said), (before[0].path, before[1].tree, ""))
        with self.world as data:
            self.assertEqual(data["asked"], asked)
        self.assertTrue((stock.tree / ".config").exists() and stock.vmlinuz.exists())


class Tools(SetUp):
    """Compilers and other tools move on after Debian built its kernel."""

    def test_a_first_set_up_is_complete_and_quiet_the_next_time(self):
        root, stock = self.set_up()
        self.assertEqual(stock.release, fakearchive.RELEASE)
        self.assertNotIn("tools have moved", self.said)
        self.assertEqual(self.set_up()[1].tree, stock.tree)
        self.assertEqual(self.said, "")

    def test_a_debian_revision_of_the_tools_is_told_in_one_line(self):
        with self.world as data:
            data["tree_config"] = NEXT
        self.set_up()
        lines = [line for line in self.said.splitlines() if "tools have moved" in line]
        self.assertEqual(len(lines), 1, self.said)
        self.assertIn("AS_VERSION 24750 -> 24751", lines[0])
        self.assertIn("and 1 more", lines[0])

    def test_each_note_about_a_tool_may_differ(self):
        for name, value in {**NEXT, "CONFIG_RUSTC_LLVM_VERSION": "220109", "CONFIG_RUSTC_VERSION": "109702",
                            "CONFIG_RUSTC_LLVM_MAJOR_VERSION": "23", "CONFIG_GCC_VERSION": "160300",
                            "CONFIG_RUSTC_VERSION_TEXT": '"rustc 1.97.1 (rebuilt)"', "CONFIG_CC_HAS_COUNTED_BY": None,
                            "CONFIG_RUSTC_HAS_SPAN_FILE": None, "CONFIG_RUSTC_HAS_NEWS": "y", "CONFIG_LD_CAN_DO_MORE": "y",
                            "CONFIG_PAHOLE_HAS_LANG_EXCLUDE": None, "CONFIG_TOOLS_SUPPORT_RELR": "y",
                            "CONFIG_CC_NO_ARRAY_BOUNDS": "y", "CONFIG_GCC_ASM_GOTO_OUTPUT_BROKEN": "y"}.items():
            with self.subTest(option=name):
                have = {key: old for key, old in {**fakearchive.CONFIG, name: value}.items() if old is not None}
                code, tools = kernel.differences(fakearchive.CONFIG, have)
                self.assertEqual((code, [item[0] for item in tools]), ([], [name]))

    def test_each_option_that_changes_code_is_refused(self):
        for name, value in {"CONFIG_KVM": None, "CONFIG_NEW": "y", "CONFIG_FUNCTION_ALIGNMENT": "32",
                            "CONFIG_GCC_VERSION": "170100", "CONFIG_CLANG_VERSION": "210108", "CONFIG_CC_IS_GCC": None,
                            "CONFIG_CC_OPTIMIZE_FOR_SIZE": "y", "CONFIG_LD_ORPHAN_WARN": "y", "CONFIG_AS_IS_LLVM": "y",
                            "CONFIG_GCC_PLUGINS": "y", "CONFIG_RUST": None}.items():
            with self.subTest(option=name):
                have = {key: old for key, old in {**fakearchive.CONFIG, name: value}.items() if old is not None}
                code, _ = kernel.differences(fakearchive.CONFIG, have)
                self.assertEqual([item[0] for item in code], [name])

    def test_an_option_that_changes_code_is_named_when_nothing_else_is_there(self):
        with self.world as data:
            data["tree_config"] = {**NEXT, "CONFIG_FUNCTION_ALIGNMENT": "32"}
        with self.assertRaises(ui.Error) as caught:
            self.set_up()
        self.assertIn("CONFIG_FUNCTION_ALIGNMENT: stock 16, tree 32", str(caught.exception))
        self.assertNotIn("AS_VERSION", str(caught.exception))

    def test_a_tree_that_does_not_fit_leaves_the_earlier_set_up(self):
        for changes, words in (({"tree_config": {"CONFIG_KVM": "y"}}, "changes code"),
                               ({"tree_symbols": ["_RNvCsxyz_6kernel1f"]}, "Rust symbols"),
                               ({"tree_symbols": []}, "exports no Rust symbols")):
            with self.subTest(changes=changes):
                before = self.earlier()
                with self.world as data:
                    saved = {key: data[key] for key in changes}
                    data.update(changes)
                self.move(rustc="1.98-1")
                self.assert_falls_back(before, words)
                self.move(rustc="1.0-1")
                with self.world as data:
                    data.update(saved)

    def test_another_rustc_names_both_versions(self):
        with self.world as data:
            data["tree_symbols"] = ["_RNvCsxyz_6kernel1f"]
            data["tree_config"] = {"CONFIG_RUSTC_VERSION_TEXT": '"rustc 1.98.0"'}
        with self.assertRaises(ui.Error) as caught:
            self.set_up()
        self.assertIn("the kernel was built by rustc 1.97.1, and Debian forky has rustc 1.98.0", str(caught.exception))

    def test_an_earlier_set_up_goes_only_when_the_new_one_is_complete(self):
        before = self.earlier()
        self.move(gcc="17-1")
        root, stock = self.set_up(refresh=True)
        self.assertNotEqual(root.path, before[0].path)
        self.assertFalse(before[0].path.exists() or before[1].tree.exists())
        self.assertEqual(self.set_up()[1].tree, stock.tree)


class Kernels(SetUp):
    """Image, headers and source move, one without the others, or to another place."""

    def test_a_newer_kernel_is_taken(self):
        self.earlier()
        self.move_kernel("7.2.13-1", "7.2.13+deb14-amd64")
        self.assertEqual(self.set_up(refresh=True)[1].release, "7.2.13+deb14-amd64")

    def test_parts_of_different_versions_are_no_kernel(self):
        before = self.earlier()
        for part in ("linux-headers-7.2.13+deb14-amd64", "linux-source-7.2", "linux-modules-7.2.13+deb14-amd64"):
            with self.subTest(part=part):
                self.move_kernel("7.2.13-1", "7.2.13+deb14-amd64")
                with self.world as data:
                    data["packages"][part]["Version"] = "7.2.12-1"
                root, stock = self.set_up(refresh=True)
                self.assertEqual((root.path, stock.tree), (before[0].path, before[1].tree))
                self.assertIn("earlier set-up", self.said)

    def test_a_series_that_is_not_supported_leaves_the_earlier_set_up(self):
        before = self.earlier()
        self.move_kernel("9.9.1-1", "9.9.1+deb14-amd64")
        root, stock = self.set_up(refresh=True)
        self.assertEqual((root.path, stock.tree), (before[0].path, before[1].tree))
        self.assertIn("9.9.1", self.said)

    def test_a_series_that_is_not_supported_is_named_when_nothing_else_is_there(self):
        self.move_kernel("9.9.1-1", "9.9.1+deb14-amd64")
        with self.assertRaisesRegex(ui.Error, r"offers Linux 9\.9\.1.*rmmu supports the series"):
            self.set_up()

    def test_files_that_packages_do_not_hold_leave_the_earlier_set_up(self):
        for name in ("vmlinuz", ".config", "Module.symvers"):
            with self.subTest(name=name):
                before = self.earlier()
                self.move_kernel("7.2.13-1", "7.2.13+deb14-amd64")
                with self.world as data:
                    data["missing_files"] = [name]
                self.assert_falls_back(before, f"hold no {name}")
                self.move_kernel("7.2.12-1", fakearchive.RELEASE)
                with self.world as data:
                    data["missing_files"] = []

    def test_a_step_that_fails_leaves_the_earlier_set_up(self):
        for program in ("dpkg-deb", "depmod", "unpack-source.sh", "prepare-tree.sh", "mmdebstrap"):
            with self.subTest(program=program):
                before = self.earlier()
                self.move_kernel("7.2.13-1", "7.2.13+deb14-amd64")
                self.move(zstd=f"2-{len(program)}")
                with self.world as data:
                    data["fails"] = {program: "E: on purpose"}
                self.assert_falls_back(before, program)
                with self.world as data:
                    data["fails"] = {}
                self.move_kernel("7.2.12-1", fakearchive.RELEASE)
                self.move(zstd="1.0-1")

    def test_a_download_that_is_gone_leaves_the_earlier_set_up(self):
        before = self.earlier()
        self.move_kernel("7.2.13-1", "7.2.13+deb14-amd64")
        with self.world as data:
            data["gone"] = ["linux-source-7.2"]
        self.assert_falls_back(before, "apt-get")

    def test_a_kept_offer_that_the_archive_has_moved_past_is_asked_for_again(self):
        self.earlier()
        # The kernel's entry goes, and what was offered is not in the archive any more.
        self.new_process()
        cache.remove_tree(cache.dir() / "kernel")
        self.move_kernel("7.2.13-1", "7.2.13+deb14-amd64")
        self.assertEqual(self.set_up()[1].release, "7.2.13+deb14-amd64")
        self.assertIn("that failed with what apt offered earlier", self.said)

    def test_a_compiler_that_is_not_there_is_no_traceback(self):
        before = self.earlier()
        self.move_kernel("7.2.13-1", "7.2.13+deb14-amd64", compiler="gcc-17-for-host")
        root, stock = self.set_up(refresh=True)
        self.assertEqual((root.path, stock.tree), (before[0].path, before[1].tree))
        self.assertIn("no stock kernel", self.said)


class Packages(SetUp):
    """Packages and suites come and go."""

    def test_a_package_that_is_gone_leaves_the_earlier_set_up(self):
        before = self.earlier()
        for name in buildroot.package_names():
            with self.subTest(package=name):
                self.move(**{name: None})
                root, stock = self.set_up(refresh=True)
                self.assertEqual((root.path, stock.tree), (before[0].path, before[1].tree))
                self.assertIn(f"has no package {name}.", self.said)
                self.move(**{name: "1.0-1"})

    def test_a_package_that_is_gone_is_named_when_nothing_else_is_there(self):
        self.move(bindgen=None)
        with self.assertRaisesRegex(ui.Error, r"has no package bindgen\..*root-packages"):
            self.set_up()

    def test_an_archive_that_changes_meanwhile_is_asked_again(self):
        self.earlier()
        self.new_process()
        cache.remove_tree(cache.dir() / "root")
        for left in (cache.dir() / "kernel").glob("*.complete"):
            left.unlink()
        self.move(make="5.0-1")
        root, _ = self.set_up()
        self.assertEqual(buildroot.installed(root.path, ["make"]), {"make": "5.0-1"})

    def test_an_archive_that_changes_between_question_and_download_leaves_the_earlier_set_up(self):
        before = self.earlier()
        self.move(make="5.0-1")
        with self.world as data:
            data["installed"] = {"make": "5.0-2"}
        self.assert_falls_back(before, "the archive changed")

    def test_an_expired_release_file_is_accepted_and_told(self):
        with self.world as data:
            data["update_always"] = EXPIRED
        self.set_up()
        self.assertIn("past its Valid-Until date", self.said)
        self.assertFalse(buildroot.offer().valid_until)

    def test_other_troubles_of_the_release_file_are_explained(self):
        for message, words in (("E: The repository 'http://m forky Release' does not have a Release file.", "RMMU_MIRROR"),
                               ("E: Release file for http://m is not valid yet (invalid for another 3d).", "clock"),
                               ("W: GPG error: NO_PUBKEY 0123456789ABCDEF", "debian-archive-keyring"),
                               ("E: Failed to fetch http://m  Connection timed out", "Connection timed out")):
            with self.subTest(message=message):
                with self.world as data:
                    data["update_always"] = message
                with self.assertRaisesRegex(ui.Error, words):
                    self.set_up()

    def test_a_mirror_that_is_away_leaves_the_earlier_set_up(self):
        before = self.earlier()
        with self.world as data:
            data["update_always"] = "E: Failed to fetch http://mirror.invalid  Connection timed out"
        root, stock = self.set_up(refresh=True)
        self.assertEqual((root.path, stock.tree), (before[0].path, before[1].tree))

    def test_a_mirror_that_fails_now_and_then_is_asked_again(self):
        with self.world as data:
            data["update"] = ["E: Failed to fetch", "E: Failed to fetch"]
        self.set_up()

    def test_a_release_of_the_suite_is_accepted(self):
        options = archive._Apt("http://mirror.invalid", True).options()
        self.assertIn("Acquire::AllowReleaseInfoChange::Suite=true", options)


class Sources(SetUp):
    """Source packages of QEMU, which modes of the tests need."""

    def fetch(self, version):
        directory = cache.dir() / "source"
        if directory.exists():
            cache.remove_tree(directory)
        with contextlib.redirect_stdout(io.StringIO()), ui.step("fetching", log=cache.log_path("source")) as step:
            return archive.download_source(buildroot.offer(), "qemu", version, directory, step)

    def test_the_source_of_the_binary_is_taken(self):
        with contextlib.redirect_stdout(io.StringIO()):
            buildroot.offer()
        self.assertEqual(self.fetch("1.0-1"), "1.0-1")

    def test_the_nearest_source_takes_the_place_of_one_that_is_gone(self):
        with contextlib.redirect_stdout(io.StringIO()):
            buildroot.offer()
        with self.world as data:
            data["sources"] = {"qemu": ["0.9-1", "1.1-1", "1.2-1"]}
            data["gone"] = ["qemu=1.2-1"]
        self.assertEqual(self.fetch("1.0-1"), "1.1-1")

    def test_a_suite_of_sources_that_is_gone_leaves_the_others(self):
        with contextlib.redirect_stdout(io.StringIO()):
            buildroot.offer()
        with self.world as data:
            data["update_always"] = "E: The repository 'http://m sid Release' does not have a Release file."
        self.assertEqual(self.fetch("1.0-1"), "1.0-1")

    def test_a_source_that_is_gone_is_named(self):
        with contextlib.redirect_stdout(io.StringIO()):
            buildroot.offer()
        with self.world as data:
            data["sources"] = {}
        with self.assertRaisesRegex(ui.Error, r"no source package of qemu .* 1\.0-1"):
            self.fetch("1.0-1")

    def test_a_qemu_that_cannot_be_built_leaves_the_earlier_one(self):
        root = self.set_up()[0]
        with mock.patch.object(emulator, "_build", lambda entry, version: (entry / emulator.NAME).write_text(version)):
            first = emulator.ensure(root)
        self.move(qemu_system_x86="2.0-1")
        with self.world as data:
            data["sources"] = {}
        root = self.set_up(refresh=True)[0]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self.assertEqual(emulator.ensure(root), first)
        self.assertIn("QEMU 2.0-1 cannot be built, and an earlier one stays in use", said.getvalue())
        with mock.patch.object(emulator, "CONFIGURE", ["--another"]), self.assertRaises(ui.Error), \
                contextlib.redirect_stdout(io.StringIO()):
            emulator.ensure(root)

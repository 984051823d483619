# SPDX-License-Identifier: GPL-2.0
"""Kernels of other suites and flavours, over an archive that exists only here."""

import contextlib
import io
import unittest
from unittest import mock

import fakearchive
import test_setup

import archive
import buildroot
import kernel
import suitekernel
import ui

FORKY = fakearchive.RELEASE
CLOUD = FORKY.replace("-amd64", "-cloud-amd64")
NEWER = "7.3.4+deb13-amd64"
OLDER = "7.3-amd64"
ROWS = [archive.Supported("7.2", "forky", "forky"), archive.Supported("7.3", "experimental", "sid"),
        archive.Supported("7.3", "trixie-backports", "trixie")]


class OtherKernels(test_setup.SetUp):
    def setUp(self):
        super().setUp()
        patch = mock.patch.object(archive, "supported", lambda: ROWS)
        patch.start()
        self.addCleanup(patch.stop)
        gone = dict.fromkeys(fakearchive.kernel_packages())
        with self.world as data:
            data["packages"].update(fakearchive.kernel_packages(CLOUD))
            gone.update(dict.fromkeys(fakearchive.kernel_packages(CLOUD)))
            data["suites"] = {
                "experimental": gone | fakearchive.kernel_packages(OLDER, "7.3~rc7-1"),
                "trixie-backports": gone | fakearchive.kernel_packages(NEWER, "7.3.4-1", compiler="gcc-14-for-host"),
                "trixie": {"rustc": {"Version": "1.85.1"}, "gcc-14-for-host": {"Version": "14.2"}},
            }

    def quietly(self, function, *args):
        self.new_process()
        with contextlib.redirect_stdout(io.StringIO()):
            return function(*args)

    def found(self):
        return self.quietly(suitekernel.find)

    def test_every_flavour_of_every_suite_is_found(self):
        self.assertEqual({(one.row.suite, one.kernel.release, one.flavour) for one in self.found()},
                         {("forky", FORKY, "amd64"), ("forky", CLOUD, "cloud-amd64"), ("experimental", OLDER, "amd64"),
                          ("trixie-backports", NEWER, "amd64")})

    def test_a_release_is_newer_than_its_candidates(self):
        self.assertEqual(self.quietly(suitekernel.newest, "7.3").kernel.release, NEWER)

    def test_the_set_up_takes_the_stock_flavour(self):
        self.assertEqual(self.set_up()[1].release, FORKY)

    def test_a_flavour_gets_a_tree_of_its_own_in_the_build_root(self):
        root, stock = self.set_up()
        other_root, other = self.quietly(kernel.select, CLOUD)
        self.assertEqual((other.release, other_root.path), (CLOUD, root.path))
        self.assertNotEqual(other.tree, stock.tree)
        self.assertEqual(other.toolchain, stock.toolchain)
        self.assertTrue(other.in_cache)
        with self.world as data:
            asked = data["asked"]
        self.assertEqual(self.quietly(kernel.select, CLOUD)[1].tree, other.tree)
        with self.world as data:
            self.assertEqual(data["asked"], asked, "what is kept needs no network")

    def test_a_suite_whose_tools_are_those_of_the_build_root_is_built_for_there(self):
        root, _ = self.set_up()
        self.assertEqual(self.quietly(kernel.select, OLDER)[0].path, root.path)

    def test_a_suite_with_other_tools_gets_a_root_of_its_own(self):
        root, _ = self.set_up()
        other, chosen = self.quietly(kernel.select, NEWER)
        self.assertEqual(chosen.release, NEWER)
        self.assertNotEqual(other.path, root.path)
        versions = buildroot.installed(other.path, ["rustc", "gcc-14-for-host", "qemu-system-x86"])
        self.assertEqual(versions, {"rustc": "1.85.1", "gcc-14-for-host": "14.2"})

    def test_a_tree_that_does_not_fit_its_kernel_is_refused(self):
        self.set_up()
        with self.world as data:
            data["tree_symbols"] = [fakearchive.SYMBOL.format(hash="other")]
        with self.assertRaisesRegex(ui.Error, "are not the stock kernel's"):
            self.quietly(kernel.select, CLOUD)

    def test_a_kernel_that_no_suite_has_is_named(self):
        with self.assertRaisesRegex(ui.Error, r"7\.2\.99\+deb14-amd64.*none of the suites.*scripts/kernels"):
            self.quietly(kernel.select, "7.2.99+deb14-amd64")
        with self.assertRaisesRegex(ui.Error, r"6\.1\.0.*not a kernel that rmmu supports.*7\.2, 7\.3"):
            self.quietly(kernel.select, "6.1.0")

    def test_a_kernel_that_boots_has_image_and_modules(self):
        _, chosen = self.quietly(lambda: suitekernel.ensure(suitekernel.find_release(CLOUD), boots=True))
        self.assertTrue(chosen.vmlinuz.exists())
        self.assertEqual(chosen.modules_dir.name, CLOUD)

    def test_what_no_suite_has_any_more_is_deleted(self):
        _, old = self.quietly(lambda: suitekernel.ensure(suitekernel.find_release(CLOUD), boots=True))
        self.quietly(suitekernel.prune)
        self.assertTrue(old.tree.exists())
        with self.world as data:
            for name in fakearchive.kernel_packages(CLOUD):
                data["packages"].pop(name, None)
            data["packages"].update(fakearchive.kernel_packages())
        archive.discard()
        self.quietly(suitekernel.prune)
        self.assertFalse(old.tree.exists())
        self.assertFalse(old.vmlinuz.exists())

    def test_a_mirror_that_is_away_leaves_what_was_offered(self):
        before = [one.kernel for one in self.found()]
        with self.world as data:
            data["update_always"] = "E: the network is away"
        with mock.patch.object(archive, "OFFER_DAYS", -1):
            self.assertEqual([one.kernel for one in self.found()], before)



if __name__ == "__main__":
    unittest.main()

# SPDX-License-Identifier: GPL-2.0
"""make install and make uninstall below a DESTDIR, and what keeps a package from being built, as DKMS would see it."""

import os
import subprocess
import sys

import support

RELEASE = "7.2.12-test"


class Install(support.Checkout):
    def setUp(self):
        super().setUp()
        self.module("7.2.12-test")
        self.top = self.scratch / "top"
        # depmod of the host would look at the made-up modules.
        tools = self.scratch / "bin"
        tools.mkdir()
        (tools / "depmod").write_text(f"#!/bin/sh\necho \"$@\" >> {self.scratch}/depmod.log\n")
        (tools / "depmod").chmod(0o755)
        self.before = f'PATH={tools}:$PATH'

    def module(self, release):
        path = self.project / "out" / release / "kvm_rmmu.ko"
        path.parent.mkdir(parents=True)
        path.write_text(release)

    def install(self, *arguments, code=0):
        argv = ["sh", "-c", f'{self.before} exec "$@"', "sh", sys.executable, "-B", self.project / "scripts" / "install",
                "--destdir", self.top, *arguments]
        done = self.run_command(argv)
        self.assert_clear(done, code=code)
        return done.stdout

    def test_what_is_installed_is_taken_away_again(self):
        (self.top / "lib/modules" / RELEASE / "updates").mkdir(parents=True)
        (self.top / "lib/modules" / RELEASE / "updates" / "other.ko").touch()
        before = sorted(path for path in self.top.rglob("*") if path.is_file())
        self.install()
        module = self.top / "lib/modules" / RELEASE / "updates/kvm_rmmu.ko"
        self.assertEqual(module.read_text(), RELEASE)
        self.assertIn("softdep kvm post: kvm_rmmu", (self.top / "etc/modprobe.d/kvm-rmmu.conf").read_text())
        self.assertEqual((self.scratch / "depmod.log").read_text(), f"-b {self.top} {RELEASE}\n")
        self.install("--uninstall")
        self.assertEqual(sorted(path for path in self.top.rglob("*") if path.is_file()), before)
        self.assertEqual((self.scratch / "depmod.log").read_text().count(RELEASE), 2)

    def test_settings_that_somebody_changed_stay(self):
        settings = self.top / "etc/modprobe.d/kvm-rmmu.conf"
        settings.parent.mkdir(parents=True)
        settings.write_text("options kvm_rmmu own_new_vms=0\n")
        self.assertIn("kept", self.install())
        self.assertIn("kept", self.install("--uninstall"))
        self.assertEqual(settings.read_text(), "options kvm_rmmu own_new_vms=0\n")

    def test_what_to_install_is_clear(self):
        self.assertIn("run 'make KVER=7.2.99' first", self.install("--kver", "7.2.99", code=1))
        self.module("7.2.13-test")
        self.assertIn("say which one", self.install(code=1))
        self.install("--kver", "7.2.13-test")
        self.assertEqual([path.parent.parent.name for path in self.top.rglob("kvm_rmmu.ko")], ["7.2.13-test"])
        self.install("--kver", RELEASE)
        self.install("--uninstall")
        self.assertEqual(list(self.top.rglob("kvm_rmmu.ko")), [])


class DkmsBuild(support.Checkout):
    """scripts/package/dkms-build --check on a machine that is made up: each thing that may be missing is named."""

    def setUp(self):
        super().setUp()
        self.tools = self.scratch / "bin"
        self.tools.mkdir()
        for name in ("bindgen", "python3", "pahole", "flex", "bison", "bc", "xz", "make", "test-gcc"):
            self.tool(name, "exit 0")
        self.tool("rustc", f'[ "$1" = --version ] && echo "rustc 1.97.1" || echo {self.scratch}/rust')
        self.tool("df", "echo head; echo x 1 1 2000000 1% /")
        self.packages = {f"linux-headers-{RELEASE}": "7.2.12-1", "linux-source-7.2": "7.2.12-1"}
        self.headers = self.scratch / "headers"
        self.headers.mkdir()
        (self.headers / ".config").write_text('CONFIG_CC_VERSION_TEXT="test-gcc (Debian) 16"\n'
                                              'CONFIG_RUSTC_VERSION_TEXT="rustc 1.97.1"\n')
        (self.headers / "Module.symvers").touch()
        self.source = self.scratch / "linux-source-7.2.tar.xz"
        self.source.touch()
        self.library = self.scratch / "rust/lib/rustlib/src/rust/library/core/src/lib.rs"
        self.library.parent.mkdir(parents=True)
        self.library.touch()

    def tool(self, name, body):
        (self.tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.tools / name).chmod(0o755)

    def check(self):
        known = "".join(f'[ "$4" != {name} ] || echo "installed {version}"\n' for name, version in self.packages.items())
        self.tool("dpkg-query", known)
        for name in ("cut", "sed", "awk", "tail"):
            path = self.tools / name
            if not path.exists():
                path.symlink_to(next(f"{place}/{name}" for place in ("/usr/bin", "/bin") if os.path.exists(f"{place}/{name}")))
        return subprocess.run(["/bin/sh", self.project / "scripts/package/dkms-build", "--check", RELEASE], text=True,
                              cwd=self.scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                              env={"PATH": str(self.tools), "RMMU_HEADERS": str(self.headers), "RMMU_SOURCE": str(self.source)})

    def assert_refused(self, *words):
        done = self.check()
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertTrue(done.stdout.startswith(f"kvm-rmmu cannot be built for Linux {RELEASE}: "), done.stdout)
        self.assertEqual(done.stdout.count("\n"), 1, done.stdout)
        for word in words:
            self.assertIn(word, done.stdout)

    def test_all_is_there(self):
        done = self.check()
        self.assertEqual((done.returncode, done.stdout), (0, ""))

    def test_no_headers(self):
        (self.headers / "Module.symvers").unlink()
        self.assert_refused(f"Install linux-headers-{RELEASE}")

    def test_no_source(self):
        self.source.unlink()
        self.assert_refused("Install linux-source-7.2")

    def test_source_of_another_version(self):
        self.packages["linux-source-7.2"] = "7.2.13-1"
        self.assert_refused("7.2.12-1", "7.2.13-1")

    def test_no_rust(self):
        (self.tools / "rustc").unlink()
        self.assert_refused("Install rustc")

    def test_another_rust(self):
        self.tool("rustc", f'[ "$1" = --version ] && echo "rustc 1.98.0" || echo {self.scratch}/rust')
        self.assert_refused("rustc 1.98.0", "the very same compiler")

    def test_no_source_of_rusts_library(self):
        self.library.unlink()
        self.assert_refused("Install rust-src")

    def test_no_bindgen(self):
        (self.tools / "bindgen").unlink()
        self.assert_refused("Install bindgen")

    def test_no_compiler(self):
        (self.tools / "test-gcc").unlink()
        self.assert_refused("there is no test-gcc")

    def test_too_little_disk(self):
        self.tool("df", "echo head; echo x 1 1 700000 1% /")
        self.assert_refused("1200 MB", "700 MB are free")

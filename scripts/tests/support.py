# SPDX-License-Identifier: GPL-2.0
"""What the tests of the scripts share: a copy of the scripts to run, as other users and on read-only file systems."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent
IS_ROOT = os.geteuid() == 0
# A user without rights, and without a home directory: no entry of the password file has this number.
NOBODY = 64321
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
             "--"] if IS_ROOT else []
needs_root = unittest.skipUnless(IS_ROOT, "mounts file systems, which only root can do")


class Checkout(unittest.TestCase):
    """A test that runs commands in a copy of the checkout, where it may do as it likes."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="rmmu-test-")
        self.addCleanup(scratch.cleanup)
        self.scratch = Path(scratch.name)
        self.scratch.chmod(0o755)
        self.cache = self.scratch / "cache"
        self.project = self.scratch / "rmmu"
        shutil.copytree(SCRIPTS, self.project / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(SCRIPTS.parent / "Makefile", self.project)

    def script(self, body):
        """A new script of the checkout, whose main function has this body."""
        path = self.project / "scripts" / "try"
        path.write_text("import sys\nfrom pathlib import Path\n"
                        "sys.path.insert(0, str(Path(__file__).resolve().parent / 'lib'))\n"
                        "import ui\n\n\ndef main():\n" + textwrap.indent(textwrap.dedent(body), "    ")
                        + "\n\nui.main(main)\n")
        return [sys.executable, "-B", path]

    def run_command(self, argv, before="", home=True, cache=True):
        """Runs a command; `before` are shell commands that come first, in a mount namespace if they mount anything."""
        env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
        if home:
            env["HOME"] = str(self.scratch)
        if cache:
            env["XDG_CACHE_HOME"] = str(self.cache)
        argv = [str(word) for word in argv]
        if before:
            argv = ["unshare", "--mount", "sh", "-ec", f'{before}\nexec "$@"', "sh", *argv]
        return subprocess.run(argv, env=env, cwd=self.project, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, check=False, timeout=300)

    def assert_clear(self, done, *words, code=1):
        """The command ended with a message that has these words, and with no traceback."""
        self.assertNotIn("Traceback", done.stdout)
        self.assertEqual(done.returncode, code, done.stdout)
        for word in words:
            self.assertIn(str(word), done.stdout)

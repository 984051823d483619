# SPDX-License-Identifier: GPL-2.0
"""The command rmmu, on files that are made up; the live table in a pseudo terminal, with keys as somebody types them."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import unittest
import xml.dom.minidom
from pathlib import Path

import support

COMMAND = support.SCRIPTS / "rmmu"
CONTROL = """\
module format 1
module vms_owned 2
71-0 fault_around_bytes 65536
71-0 pages_4K 100
71-0 pages_2M 3
71-0 pages_1G 0
71-0 tables 7
71-0 faults_fixed {fixed}
71-0 faults_fast 5
71-0 around_mapped_ahead 80
71-0 around_used 20
71-0 something_new 9
72-1 pages_4K 5000
72-1 faults_fixed 40
"""
PAGE_TABLE = """\
# root level 5
0x000000000000-0x000000010000       64K 4K rwxAD
0x000000200000-0x000000600000     4096K 2M rwxA-
0x000040000000-0x000080000000  1048576K 1G rwxA-
0x0000fec00000-0x0000fec01000        4K 4K rw---
# root level 5 smm
0x000000000000-0x000000001000        4K 4K rwxAD
"""
COLUMNS, LINES = 160, 24


class Host(unittest.TestCase):
    """A machine with two processes that have VMs of rmmu, one of which has another of in-tree KVM, as has a third."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="rmmu-test-")
        self.addCleanup(scratch.cleanup)
        self.host = Path(scratch.name)
        self.write("dev/rmmu", CONTROL.format(fixed=1000))
        for pid, name in ((71, "firecracker"), (72, "qemu"), (80, "crosvm")):
            self.write(f"proc/{pid}/comm", f"{name}\n")
        for name in ("71-12", "72-12", "72-13", "80-9"):
            self.write(f"sys/kernel/debug/kvm/{name}/pages_4k", "10\n")
            self.write(f"sys/kernel/debug/kvm/{name}/pf_fixed", "33\n")
        self.write("sys/kernel/debug/rmmu/vms/71-0/page_table", PAGE_TABLE)

    def write(self, path, text):
        target = self.host / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # In one step: somebody may be reading it.
        partial = target.with_name(target.name + ".new")
        partial.write_text(text)
        partial.replace(target)


class Rmmu(Host):
    def run_command(self, *arguments, code=0):
        done = subprocess.run([sys.executable, "-B", COMMAND, "--host", self.host, *arguments], text=True,
                              capture_output=True, check=False, timeout=60)
        self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stdout if code == 0 else done.stderr

    def test_list_has_vms_of_both_kinds(self):
        rows = [line.split() for line in self.run_command("list").splitlines()[1:]]
        self.assertEqual([row[:3] for row in rows],
                         [["71-0", "firecracker", "rmmu"], ["72-1", "qemu", "rmmu"], ["72-?", "qemu", "in-tree"],
                          ["80-9", "crosvm", "in-tree"]])
        self.assertEqual(rows[0][3:10], ["6544K", "100", "3", "0", "7", "1005", "-"])
        self.assertEqual(rows[0][-2:], ["80", "25%"])
        # Of a VM of in-tree KVM what KVM counts; of one that cannot be told from its process's other VMs nothing.
        self.assertEqual(rows[3][3:9], ["40K", "10", "0", "0", "-", "33"])
        self.assertEqual(set(rows[2][3:]), {"-"})

    def test_without_the_module_only_vms_of_in_tree_kvm_are_known(self):
        (self.host / "dev/rmmu").unlink()
        rows = [line.split()[:3] for line in self.run_command("list").splitlines()[1:]]
        self.assertEqual({row[2] for row in rows}, {"in-tree"})
        self.assertEqual(len(rows), 4)

    def test_another_format_is_refused(self):
        self.write("dev/rmmu", CONTROL.replace("format 1", "format 2"))
        self.assertIn("speaks format 2", self.run_command("list", code=1))

    def test_show_draws_each_root(self):
        lines = self.run_command("show", "71").splitlines()
        self.assertEqual(lines[0], "VM 71-0 (firecracker)")
        self.assertTrue(lines[1].startswith("root level 5: "))
        self.assertIn("root level 5 smm: 4K mapped", "\n".join(lines))
        drawn = "".join(line for line in lines if "|" in line)
        self.assertIn("@", drawn)
        self.assertIn(".", drawn)

    def test_a_character_stands_for_what_it_covers(self):
        self.write("sys/kernel/debug/rmmu/vms/71-0/page_table",
                   "# root level 4\n0x000000000000-0x000000010000       64K 4K rwxAD\n"
                   "0x000000010000-0x000000018000       32K 4K rwxAD\n0x000000200000-0x000000400000     2048K 2M rwxAD\n")
        lines = self.run_command("show", "71-0").splitlines()
        self.assertIn("a character is 64K", lines[1])
        self.assertEqual(lines[2], "0x000000000000 |*-" + " " * 30 + "#" * 32 + "|")

    def test_pictures_are_written(self):
        target = self.host / "map.svg"
        self.run_command("show", "71", "--svg", target)
        document = xml.dom.minidom.parse(str(target))
        fills = {node.getAttribute("fill") for node in document.getElementsByTagName("rect")}
        self.assertLessEqual({"#5b8def", "#d97b2b"}, fills)
        try:
            from PIL import Image
        except ImportError:
            self.assertIn("python3-pil", self.run_command("show", "71", "--png", self.host / "map.png", code=1))
        else:
            self.run_command("show", "71", "--png", self.host / "map.png")
            with Image.open(self.host / "map.png") as image:
                self.assertEqual(image.size[0], 512)

    def test_show_says_what_it_cannot_show(self):
        self.assertIn("is a VM of in-tree KVM", self.run_command("show", "80", code=1))
        self.assertIn("there is no VM 99", self.run_command("show", "99", code=1))
        self.write("dev/rmmu", CONTROL.format(fixed=1) + "71-5 pages_4K 1\n")
        self.assertIn("71-0, 71-5", self.run_command("show", "71", code=1))
        self.assertIn("the VM ended", self.run_command("show", "71-5", code=1))
        self.write("sys/kernel/debug/rmmu/vms/71-0/page_table", "# root level 5\nnonsense\n")
        self.assertIn("'nonsense'", self.run_command("show", "71-0", code=1))


class Terminal:
    """A program in a pseudo terminal. It is asked for what it shows, and never waited for by time."""

    def __init__(self, argv):
        self.child, self.fd = pty.fork()
        if self.child == 0:
            os.environ.update(TERM="vt100", LANG="C", LINES=str(LINES), COLUMNS=str(COLUMNS))
            os.execv(argv[0], argv)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self.shown = ""

    def until(self, pattern):
        """Reads on until what the program has written matches."""
        while not (found := re.search(pattern, self.shown, re.S)):
            ready, _, _ = select.select([self.fd], [], [], 60)
            try:
                data = os.read(self.fd, 1 << 16) if ready else b""
            except OSError:
                data = b""
            if not data:
                raise AssertionError(f"the program does not write {pattern!r}; it wrote {self.shown!r}")
            # Without what moves the cursor and chooses colours.
            self.shown += re.sub(r"\x1b[\[(][0-9;?]*[A-Za-z]", " ", data.decode(errors="replace"))
        self.shown = self.shown[found.end():]
        return found

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def end(self):
        """The exit status."""
        while True:
            try:
                if not os.read(self.fd, 1 << 16):
                    break
            except OSError:
                break
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


class Top(Host):
    def start(self):
        terminal = Terminal([sys.executable, "-B", str(COMMAND), "--host", str(self.host), "top", "--interval", "0.1"])
        terminal.until("2 VMs of rmmu, 2 of in-tree KVM; sorted by faults")
        terminal.until("71-0 +firecracker +rmmu")
        return terminal

    def test_the_table_lives(self):
        terminal = self.start()
        # Only what changes is written anew: more digits of a counter, and another owner of a process's VM.
        self.write("dev/rmmu", CONTROL.format(fixed=2000000))
        terminal.until("2000")
        self.write("dev/rmmu", "module format 1\n")
        terminal.until("in-tree")
        terminal.type("q")
        self.assertEqual(terminal.end(), 0)

    def test_keys_sort_and_end(self):
        terminal = self.start()
        terminal.type("s")
        terminal.until("mapped")
        terminal.type("s")
        terminal.until("vm")
        terminal.type("q")
        self.assertEqual(terminal.end(), 0)


class Rates(unittest.TestCase):
    def test_rates_are_differences_by_time(self):
        module = {}
        source = COMMAND.read_text().replace("sys.exit(main())", "")
        exec(compile(source, str(COMMAND), "exec"), module)
        vm = module["Vm"]
        before, now = (vm("1-0", 1, "x", "rmmu", faults={"fixed": fixed, "fast": 3}) for fixed in (100, 160))
        self.assertEqual(module["rates"](now, before, 2.0), {"fixed": 30.0, "fast": 0.0})
        self.assertIsNone(module["rates"](now, None, 2.0))
        # A VM of the same name that began anew has no negative rate.
        self.assertEqual(module["rates"](before, now, 1.0), {"fixed": 0, "fast": 0.0})

# SPDX-License-Identifier: GPL-2.0
"""Run one QEMU: the stock kernel, an initramfs, a console log and a control channel.

QEMU comes from the build root and runs straight from there through the root's own
dynamic loader: no chroot, no privileges. It dies with this process whatever happens.
The emulator is always TCG; /dev/kvm of the host is never opened.
"""

import json
import os
import select
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import ui


@dataclass
class Options:
    """The machine a test runs on."""

    # CPUs for the tests. There may be one more, see spare_cpu.
    smp: int = 2
    memory: str = "4G"
    cpu: str = "max,+svm,+npt"
    cmdline: str = ""
    extra: list = field(default_factory=list)
    # Instead of the build root's own QEMU.
    program: Path = None
    # The machine's clock counts instructions, so that what is timed is the same whatever else this host does.
    icount: bool = False

    @property
    def spare_cpu(self):
        """CPU 0 runs no test, see "The CPU that no test runs on" in Documentation/testing.rst.

        With icount QEMU emulates all CPUs in one thread, and none of that can happen.
        """
        return not self.icount

    @property
    def cpu_list(self):
        """The CPUs that tests run on."""
        first = int(self.spare_cpu)
        return list(range(first, first + self.smp))

    @property
    def cpus(self):
        """The same for taskset."""
        return f"{self.cpu_list[0]}-{self.cpu_list[-1]}"


# Each instruction takes this long by the clock of a machine with icount.
ICOUNT_SHIFT = 1
NS_PER_INSTRUCTION = 1 << ICOUNT_SHIFT
# There, one iteration of a string instruction is one instruction. A kernel that believes them to be fast copies by the
# byte: pages would cost far more than all that is measured. Without these features it copies by eight.
ICOUNT_CPU = ",-erms,-fsrm,-fzrm,-fsrs,-fsrc"

# tsc=reliable: TCG's clock is the host's, the watchdog only misjudges it under load. no_timer_check: so does a check at
# boot, which gives the timer interrupt too little time to come.
# The rest turns a dying kernel into a log and an exit instead of a silent hang.
CMDLINE = (
    "console=ttyS0 loglevel=6 tsc=reliable no_timer_check panic=-1 oops=panic unknown_nmi_panic=1 "
    "panic_print=0x40 printk.devkmsg=on log_buf_len=4M no_hash_pointers slab_nomerge"
)


def binary(root, program=None):
    """The command that runs the build root's QEMU, or another one built for that root, from outside the root."""
    root = Path(root)
    qemu = program or root / "usr/bin/qemu-system-x86_64"
    if not qemu.exists():
        raise ui.Error(f"{qemu} is missing: run scripts/setup")
    if root == Path("/") and not program:
        return [str(qemu)]
    firmware = [root / "usr/share/qemu", root / "usr/share/seabios"]
    command = with_loader(root, qemu)
    for directory in firmware:
        command += ["-L", str(directory)]
    return command


def with_loader(root, program):
    """The command that runs a program with the loader and the libraries of the build root, from outside the root."""
    loader = root / "lib64/ld-linux-x86-64.so.2"
    libraries = [root / "lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu"]
    return [str(loader), "--library-path", ":".join(map(str, libraries)), str(program)]


class Machine:
    """A running QEMU. Use it as a context manager: leaving it ends the machine."""

    def __init__(self, root, kernel, initrd, console_log, options=None, interactive=False):
        self.options = options or Options()
        self.console_log = Path(console_log)
        self._control, control_end = socket.socketpair()
        self._qmp, qmp_end = socket.socketpair()
        fds = [control_end.fileno(), qmp_end.fileno()]
        cmdline = f"{CMDLINE} {self.options.cmdline}"
        command = [
            *binary(root, self.options.program),
            "-machine", "q35,usb=off,vmport=off",
            *self._clock(),
            "-cpu", self.options.cpu + (ICOUNT_CPU if self.options.icount else ""),
            "-smp", str(self.options.smp + int(self.options.spare_cpu)),
            "-m", self.options.memory,
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-run-with", "exit-with-parent=on",
            "-kernel", str(kernel),
            "-initrd", str(initrd),
            "-append", cmdline.strip(),
            "-chardev", f"socket,id=ctl,fd={fds[0]}",
            "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=ctl,name=rmmu.ctl",
            "-chardev", f"socket,id=qmp,fd={fds[1]}",
            *self._monitor(),
            *self._console(interactive),
            *self.options.extra,
        ]
        self.console_log.write_bytes(b"")
        self.stderr_log = self.console_log.with_suffix(".qemu")
        with open(self.stderr_log, "wb") as stderr:
            self._process = subprocess.Popen(
                command,
                pass_fds=fds,
                stdin=None if interactive else subprocess.DEVNULL,
                stdout=None if interactive else stderr,
                stderr=stderr,
            )
        control_end.close()
        qmp_end.close()
        self._pending = b""

    def _monitor(self):
        # A mended QEMU may be older than the build root's: it may not know the new form, but still knows the old one.
        if self.options.program:
            return ["-mon", "chardev=qmp,mode=control"]
        return ["-object", "monitor-qmp,id=qmp0,chardev=qmp"]

    def _clock(self):
        if not self.options.icount:
            return ["-accel", "tcg,thread=multi"]
        return ["-accel", "tcg,thread=single", "-icount", f"shift={ICOUNT_SHIFT},sleep=off", "-seed", "1",
                "-rtc", "base=2026-01-01,clock=vm"]

    def _console(self, interactive):
        log = str(self.console_log)
        if interactive:
            return ["-chardev", f"stdio,id=con,signal=off,logfile={log}", "-serial", "chardev:con"]
        return ["-chardev", f"file,id=con,path={log}", "-serial", "chardev:con"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def running(self):
        return self._process.poll() is None

    def wait(self):
        """Wait for the machine to end by itself; its exit status."""
        return self._process.wait()

    def send(self, line):
        """One line to the agent in the guest."""
        self._control.sendall(line.encode() + b"\n")

    def receive(self, deadline):
        """The next bytes from the agent; b"" when the machine is gone, None when time is up."""
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        ready, _, _ = select.select([self._control], [], [], left)
        if not ready:
            return None
        try:
            return self._control.recv(1 << 16)
        except ConnectionResetError:
            return b""

    def diagnose(self, seconds=5):
        """Send a hung guest an NMI, which makes its kernel print where it is, and die."""
        try:
            self._qmp.settimeout(seconds)
            for command in ("qmp_capabilities", "inject-nmi"):
                self._qmp.sendall(json.dumps({"execute": command}).encode() + b"\n")
            self._process.wait(seconds)
        except (OSError, subprocess.TimeoutExpired):
            pass

    def console(self):
        return self.console_log.read_text(errors="replace").replace("\r", "")

    def stop(self):
        if self.running():
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for channel in (self._control, self._qmp):
            channel.close()

    def cpu_seconds(self):
        """CPU time this QEMU has used: a machine that uses none is stuck."""
        ticks = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")

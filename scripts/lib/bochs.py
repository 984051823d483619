# SPDX-License-Identifier: GPL-2.0
"""Run one Bochs: the stock kernel on a CPU with VMX, with what qemu.Machine has: a console log and a control channel.

The machine is a bare one: CPUs, memory, timers, two serial ports. The first is the console; the second, which is a
socket on this end, carries what the agent in the guest and the harness say.
"""

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import kernelimage
import qemu
import ui
import vmxemulator

MIB = 1 << 20
CONNECT_SECONDS = 30
# Bochs takes no more of the host for all memory of a machine.
MOST_MIB = 2048


@dataclass
class Options:
    """The machine a test runs on."""

    # A directory that vmxemulator.ensure() made.
    program: Path
    # CPUs. All of them run tests: they take turns in one thread, so that what hurts with QEMU cannot happen.
    smp: int = 2
    # One of Bochs's CPU models; see testvm.MODES.
    model: str = "corei7_skylake_x"
    memory_mib: int = MOST_MIB
    # Besides what is at the beginning: (start, size) of memory far up.
    far_memory: tuple = ()
    # Translations survive VM exits until they are flushed; or else none does, as Bochs would have it.
    keep_translations: bool = True
    cmdline: str = ""

    def ranges(self):
        """The machine's RAM above the first MiB, as (start, size)."""
        return [(MIB, (self.memory_mib - 1) * MIB), *self.far_memory]


def cpus(count):
    """The CPUs that tests run on, for taskset."""
    return f"0-{count - 1}"


# Instructions of one CPU in a second of the machine's time.
INSTRUCTIONS_PER_SECOND = 50_000_000
# The machine has no tables of ACPI. MWAIT makes Bochs look at each store of all CPUs, HLT does not. With mitigations KVM
# empties caches that are not there at each VM entry. The CPUs claim the frequency of what they are a model of.
# What is blacklisted checks signatures for seconds, and what rodata=off leaves out are the kernel's page tables.
CMDLINE = (
    "acpi=off idle=halt mitigations=off rodata=off initcall_blacklist=load_system_certificate_list "
    f"tsc_early_khz={INSTRUCTIONS_PER_SECOND // 1000}"
)
# A second of the machine's time takes up to ten of a processor, and others may use that, too.
PATIENCE = 20
# What tests that can do less do less by.
WORK = 5


class Machine:
    """A running Bochs. Use it as a context manager: leaving it ends the machine."""

    def __init__(self, root, kernel, initrd, console_log, options, interactive=False):
        self.options = options
        self.console_log = Path(console_log)
        self.stderr_log = self.console_log.with_suffix(".bochs")
        self.console_log.write_bytes(b"")
        self._process = self._control = None
        self._scratch = tempfile.TemporaryDirectory(prefix="rmmu-bochs-")
        try:
            self._start(root, kernel, initrd)
        except BaseException:
            self.stop()
            raise

    def _start(self, root, kernel, initrd):
        scratch = Path(self._scratch.name)
        cmdline = f"{qemu.CMDLINE} {CMDLINE} {self.options.cmdline}".strip()
        images = kernelimage.images(kernel, initrd, cmdline, self.options.ranges(), self.options.smp)
        with socket.create_server(("127.0.0.1", 0)) as server:
            settings = scratch / "bochsrc"
            settings.write_text("\n".join(self._settings(scratch, images, server.getsockname()[1])) + "\n")
            command = ["setpriv", "--pdeathsig", "KILL", "--", *qemu.with_loader(Path(root), self.options.program / vmxemulator.NAME),
                       "-q", "-f", str(settings)]
            with open(self.stderr_log, "wb") as stderr:
                self._process = subprocess.Popen(command, cwd=scratch, env=self._environment(),
                                                 stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
            self._control = self._accept(server)

    def _environment(self):
        variables = {name: value for name, value in os.environ.items() if name != vmxemulator.KEEP_TRANSLATIONS}
        if self.options.keep_translations:
            variables[vmxemulator.KEEP_TRANSLATIONS] = "1"
        return variables

    def _accept(self, server):
        server.settimeout(0.2)
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return server.accept()[0]
            except TimeoutError:
                if not self.running() or time.monotonic() > deadline:
                    raise ui.Error(f"Bochs does not start: {self.stderr_log.read_text(errors='replace')[-2000:]}") from None

    def _settings(self, scratch, images, port):
        options = self.options
        highest = max(start + size for start, size in options.ranges())
        firmware = options.program / vmxemulator.FIRMWARE
        yield f"cpu: model={options.model}, count={options.smp}, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0"
        total = sum(size for _, size in options.ranges()) // MIB + 1
        yield f"memory: guest={highest // MIB}, host={total}, block_size=4096"
        yield f"romimage: file={firmware}"
        # It wants one, and nobody runs it.
        yield f"vgaromimage: file={_write(scratch / 'vga.rom', bytes(512))}"
        for number, image in enumerate(images, 1):
            path = _write(scratch / f"image{number}", image.data)
            yield f"optramimage{number}: file={path}, address={image.address:#x}"
        yield f"com1: enabled=1, mode=file, dev={self.console_log.resolve()}"
        yield f"com2: enabled=1, mode=socket-client, dev=127.0.0.1:{port}"
        yield from ("pci: enabled=1, chipset=i440fx", "display_library: nogui", "vga: extension=none", "mouse: enabled=0",
                    "speaker: enabled=0", "parport1: enabled=0", "ata0: enabled=0", "ata1: enabled=0",
                    "clock: sync=none, time0=utc", "log: -", "panic: action=fatal",
                    "error: action=ignore", "info: action=ignore", "debug: action=ignore")

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
        """A hung guest cannot be made to say where it is."""

    def console(self):
        return self.console_log.read_text(errors="replace").replace("\r", "")

    def stop(self):
        if self._process and self.running():
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        if self._control:
            self._control.close()
        self._scratch.cleanup()

    def cpu_seconds(self):
        """CPU time this Bochs has used."""
        ticks = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")


def _write(path, data):
    path.write_bytes(data)
    return path

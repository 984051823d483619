# SPDX-License-Identifier: GPL-2.0
"""The test VM: the stock kernel in QEMU with KVM (and rmmu, if wanted) loaded, which runs commands.

One machine runs any number of commands. What a command printed, its exit code and the
kernel messages that came meanwhile return together. A machine that dies or hangs raises
`Crashed`, which carries the console; the caller boots another one and goes on.
"""

import re
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import bochs
import initramfs
import kmsg
import qemu

SOURCE = Path(__file__).resolve().parents[2]

BOOT_SECONDS = 300
# Copying by one instruction a byte, which unpacks the initramfs, is slow where instructions are counted.
ICOUNT_BOOT_SECONDS = 1200
# Modules that tests load when they need them, and that not every kernel has: memory to swap to.
FOR_TESTS = ("zram",)
# How long the guest's own time limit may be late before the machine counts as hung.
GRACE_SECONDS = 30


GIB = 1 << 30


@dataclass(frozen=True)
class Mode:
    """A way to run KVM: module parameters and CPU features, and whether it takes a QEMU with mended SVM emulation (see
    emulator.py), or with VMX a CPU model of Bochs and perhaps memory far up."""

    params: dict = field(default_factory=dict)
    cpu: str = ""
    mended: bool = False
    # Modes whose expected results count where this one's are not in the table, the nearest first.
    like: tuple = ()
    model: str = ""
    far_memory: tuple = ()

    @property
    def patience(self):
        """How much longer than the machine's own time things may take here."""
        return bochs.PATIENCE if self.model else 1

    @property
    def vendor(self):
        return "kvm-intel" if self.model else "kvm-amd"


MODES = {
    "default": Mode(),
    # The emulated CPU has five-level paging unless it is taken away.
    "4-level": Mode(cpu=",-la57"),
    "tdp_mmu=0": Mode({"kvm": "tdp_mmu=0"}),
    "npt=0": Mode({"kvm_amd": "npt=0"}, mended=True),
    # With PML. Nearly all memory is where a part of its address could be taken for the level of a root.
    "ept": Mode(model="corei7_skylake_x", far_memory=((20 * GIB, GIB),)),
    "ept-nopml": Mode(model="corei7_haswell_4770", like=("ept",)),
    # Neither PML nor accessed and dirty bits.
    "ept-noad": Mode(model="corei7_sandy_bridge_2600k", like=("ept",)),
    "ept=0": Mode({"kvm_intel": "ept=0"}, model="corei7_skylake_x", like=("ept",)),
}

VMX_MODES = [name for name, mode in MODES.items() if mode.model]


@dataclass
class Config:
    """What the machine holds when it is up."""

    mode: str = "default"
    module: Path = None
    module_params: str = "own_new_vms=1"
    kernel_params: dict = field(default_factory=dict)
    # The mode's own of kvm-amd and kvm-intel, unless something else is named.
    load: list = None
    pack: list = field(default_factory=list)
    files: list = field(default_factory=list)
    hugepages: int = 0
    machine: qemu.Options = field(default_factory=qemu.Options)
    mended: bool = False
    # With VMX: see bochs.Options.
    keep_translations: bool = True

    @property
    def vendor(self):
        return MODES[self.mode].vendor

    def boot(self, environment, initrd, console_log, interactive=False):
        """The machine, running. Each huge page costs some ms of boot: the kernel clears it."""
        mode, kernel = MODES[self.mode], environment.booted
        options = self._vmx_options(environment) if mode.model else self._qemu_options(environment)
        options = replace(options, cmdline=f"hugepages={self.hugepages} {kernel.cmdline} {self.machine.cmdline}")
        machine = bochs.Machine if mode.model else qemu.Machine
        return machine(environment.root, environment.vmlinuz, initrd, console_log, options, interactive)

    def cpus(self):
        """The CPUs that tests run on, for taskset."""
        return bochs.cpus(self.machine.smp) if MODES[self.mode].model else self.machine.cpus

    def _vmx_options(self, environment):
        mode = MODES[self.mode]
        return bochs.Options(environment.bochs(), self.machine.smp, mode.model, far_memory=mode.far_memory,
                             keep_translations=self.keep_translations,
                             memory_mib=bochs.MOST_MIB - sum(size for _, size in mode.far_memory) // bochs.MIB)

    def _qemu_options(self, environment):
        mode, kernel = MODES[self.mode], environment.booted
        return replace(self.machine,
                       cpu=self.machine.cpu + mode.cpu,
                       extra=[*self.machine.extra, *kernel.qemu],
                       program=environment.mended_qemu() if self.mended or mode.mended else self.machine.program)


@dataclass
class Result:
    """One command that ran to its end or to its time limit."""

    code: int
    output: str
    kernel: str
    seconds: float

    TIMED_OUT = 124


class Crashed(Exception):
    """The machine died or hung; `console` is its kernel's log since the command began, `emulator` what that program said."""

    def __init__(self, reason, console, output="", emulator=""):
        super().__init__(reason)
        self.reason = reason
        self.console = console
        self.output = output
        self.emulator = emulator


def pack(config, environment, interactive=False):
    """The initramfs for a configuration."""
    archive = initramfs.Archive()
    archive.file("/bin/busybox", environment.busybox, 0o755)
    archive.file("/init", SOURCE / "selftests/guest/init", 0o755)
    # The kernel opens the console before init can mount devtmpfs.
    archive.device("/dev/console", 5, 1)
    modules = initramfs.ModuleTree(environment.modules_dir, signed=not MODES[config.mode].model)
    load = [config.vendor] if config.load is None else config.load
    modules.pack(archive, [*load, *config.pack, *filter(modules.has, FOR_TESTS)])
    for path, source in config.files:
        source = Path(source)
        if source.is_dir():
            archive.tree(path, source)
        else:
            archive.file(path, source)
    # Upstream's emulator tests need the prefix that forces emulation.
    params = {"kvm": ["force_emulation_prefix=1"]}
    for chosen in (MODES[config.mode].params, config.kernel_params):
        for name, value in chosen.items():
            params.setdefault(name.replace("-", "_"), []).append(value)
    options = [f"options {name} {' '.join(values)}\n" for name, values in params.items() if values]
    archive.data("/etc/modprobe.conf", "".join(options))
    settings = {
        "MODE": config.mode,
        "INTERACTIVE": int(interactive),
        "MODULES": " ".join(load),
        "VENDOR": config.vendor,
        "CONTROL": "/dev/ttyS1" if MODES[config.mode].model else "",
        "WORK": bochs.WORK if MODES[config.mode].model else 1,
        "TIME_FACTOR": environment.booted.time_factor,
        "CPUS": config.cpus(),
    }
    if config.module:
        archive.file("/lib/modules/kvm_rmmu.ko", config.module)
        settings["RMMU"] = "/lib/modules/kvm_rmmu.ko"
        settings["RMMU_PARAMS"] = config.module_params
    archive.data("/etc/rmmu-vm.conf", "".join(f"{key}='{value}'\n" for key, value in settings.items()))
    return archive


class TestVm:
    """A booted test VM; a context manager."""

    def __init__(self, environment, config, console_log=None, echo=None):
        self._echo = echo
        self._time_factor = environment.booted.time_factor
        self._patience = MODES[config.mode].patience
        self._serial = 0
        self._pending = b""
        self._scratch = tempfile.TemporaryDirectory(prefix="rmmu-vm-")
        scratch = Path(self._scratch.name)
        self._machine = None
        try:
            initrd = scratch / "initrd"
            pack(config, environment).write(initrd)
            log = console_log or scratch / "console.log"
            started = time.monotonic()
            self._machine = config.boot(environment, initrd, log)
            limit = ICOUNT_BOOT_SECONDS if config.machine.icount else BOOT_SECONDS
            self.boot_kernel_log = self._until(r"@@ready", limit * self._time_factor, "boot")
            self.boot_seconds = time.monotonic() - started
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self._machine:
            self._machine.stop()
        self._scratch.cleanup()

    def run(self, command, limit):
        """Run a shell command for `limit` seconds at most; longer on a kernel that is slow."""
        limit *= self._time_factor
        grace = GRACE_SECONDS * self._time_factor
        self._serial += 1
        ident = str(self._serial)
        self._mark = len(self._machine.console())
        try:
            self._machine.send(f"{ident} {limit} {command}")
        except OSError:
            raise self._crash("the VM is gone", "") from None
        self._until(rf"@@begin {ident}", grace, "start of the command")
        output, ended = self._until(rf"@@kmsg {ident} (\d+) (\d+)", limit + grace, "the command", live=True)
        kernel = self._until(rf"@@end {ident}", grace, "its kernel messages", already=output)
        # The agent puts a newline before its mark, in case the command's last line had none.
        output = output[:-1] if output.endswith("\n") else output
        return Result(int(ended.group(1)), output, kernel, int(ended.group(2)) / 1000)

    _mark = 0

    def _until(self, mark, seconds, what, live=False, already=""):
        """Text up to the line that is `mark`. With `live` also its match, and echo as it comes."""
        end = re.compile(rb"^" + mark.encode() + rb"\r?\n", re.MULTILINE)
        seconds *= self._patience
        deadline = time.monotonic() + seconds
        shown = 0
        while True:
            found = end.search(self._pending)
            if live and self._echo:
                # Only whole lines, so that a mark which is still arriving never shows.
                stop = found.start() if found else self._pending.rfind(b"\n") + 1
                if stop > shown:
                    self._echo(self._pending[shown:stop].decode(errors="replace"))
                    shown = stop
            if found:
                text = self._pending[: found.start()].decode(errors="replace")
                match = re.match(mark, found.group().decode(errors="replace"))
                self._pending = self._pending[found.end():]
                return (text, match) if live else text
            data = self._machine.receive(deadline)
            if data is None:
                self._machine.diagnose()
                raise self._crash(f"the VM hung: no end of {what} within {seconds:.0f} s", already)
            if not data:
                raise self._crash(f"the VM died during {what}", already)
            self._pending += data

    def _crash(self, reason, already):
        time.sleep(0.2)
        # A guest that panics ends its emulator with status 0. Whatever else ends it is the emulator's or the host's affair.
        status = 0 if self._machine.running() else self._machine.wait()
        if status:
            reason += "; the emulator " + (f"was ended by signal {-status}" if status < 0 else f"exited with status {status}")
        self._machine.stop()
        output = already + self._pending.decode(errors="replace")
        console = self._machine.console()[self._mark:]
        return Crashed(reason, console, output, self._machine.stderr_log.read_text(errors="replace")[-2000:])


def describe_crash(crash):
    text = f"{crash.reason}\n--- console ---\n{kmsg.excerpt(crash.console)}"
    return text + (f"\n--- emulator ---\n{crash.emulator}" if crash.emulator.strip() else "")

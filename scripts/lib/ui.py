# SPDX-License-Identifier: GPL-2.0
"""What the scripts say to the person who runs them: steps with times, errors that tell what to do.

Output is plain lines, fit for a terminal and for a CI log alike:

    [    0s] build root: installing Debian forky
    [   30s]   ... 30s: Unpacking rust-src (1.97.1-1) ...
    [   62s]   done in 62s

What a step's commands print goes to a log file. Its end is shown only when a command fails.
"""

import contextlib
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent

HEARTBEAT_SECONDS = 30
TAIL_LINES = 30

# Descriptors which every child must keep: the cache's locks. A child that outlives us then still holds them.
KEEP_FDS = set()


class Error(Exception):
    """Something the user has to know about. The text says what happened and what to do."""


def _start_time():
    # One `make` runs several commands: they share one clock.
    try:
        return float(os.environ["RMMU_START_TIME"])
    except (KeyError, ValueError):
        now = time.time()
        os.environ["RMMU_START_TIME"] = str(now)
        return now


_START = _start_time()


def line(text):
    """Prints one line with the time since the command started."""
    print(f"[{max(0, time.time() - _START):5.0f}s] {text}", flush=True)


def note(text):
    """Prints a detail of the step that is running."""
    line("  " + text)


def jobs():
    """How many jobs a parallel make may run."""
    return len(os.sched_getaffinity(0))


def seconds(value):
    """A duration for people."""
    if value < 10:
        return f"{value:.1f}s"
    if value < 120:
        return f"{value:.0f}s"
    return f"{int(value) // 60}m{int(value) % 60:02d}s"


def brief(argv):
    """The beginning of a command, for a message."""
    text = shlex.join(map(str, argv))
    return text if len(text) <= 80 else text[:77] + "..."


def tail(path, lines=TAIL_LINES):
    """The last lines of a log file."""
    try:
        with open(path, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 64 * 1024))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(re.split(r"[\r\n]+", text.rstrip())[-lines:])


class Step:
    """One named step; commands run through it write to its log."""

    def __init__(self, title, log=None):
        self.title = title
        self.log = Path(log) if log else None
        self.begin = time.monotonic()
        self._spoke = False
        line(title)

    def elapsed(self):
        return time.monotonic() - self.begin

    def note(self, text):
        self._spoke = True
        note(text)

    def run(self, argv, cwd=None, env=None, check=True, stdin=subprocess.DEVNULL, shown=None):
        """Runs a command with its output in the step's log; shows that it is alive every half minute.

        `shown` is what the log says that was run, if not the command itself.
        """
        argv = [str(arg) for arg in argv]
        if self.log is None:
            raise ValueError(f"step '{self.title}' has no log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            out.write(f"$ {shlex.join(map(str, shown or argv))}\n\n".encode())
            out.flush()
            # A session of its own, so that an interrupt can end the command with all of its children. If we are killed,
            # the command is told to stop as well.
            child = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "--", *argv], cwd=cwd, env=env, stdin=stdin,
                                     stdout=out, stderr=out, start_new_session=True, pass_fds=tuple(KEEP_FDS))
            try:
                code = self._wait(child)
            except BaseException:
                end_group(child)
                raise
        if check and code != 0:
            raise Error(f"{self.title}: '{brief(argv)}' failed (exit {code})\n"
                        f"--- end of {self.log} ---\n{tail(self.log)}\n--- (whole log: {self.log})")
        return code

    def _wait(self, child):
        while True:
            try:
                return child.wait(HEARTBEAT_SECONDS)
            except subprocess.TimeoutExpired:
                last = tail(self.log, 1).strip()[:80]
                self.note(f"... {seconds(self.elapsed())}: {last}")

    def finish(self):
        took = self.elapsed()
        if took >= 2 or self._spoke:
            note(f"done in {seconds(took)}")


def end_group(child):
    """Ends a command that was started in a session of its own, with its children."""
    for sig, grace in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
            return


@contextlib.contextmanager
def step(title, log=None):
    """`with ui.step("title", log=path) as s: s.run([...])` prints the title, progress and the time taken."""
    current = Step(title, log)
    if current.log:
        current.log.parent.mkdir(parents=True, exist_ok=True)
        current.log.write_bytes(b"")
    yield current
    current.finish()


def explain(error):
    """What an error of the system or of a command means, and what to do; None for an error of rmmu's scripts."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"'{brief(_words(error.cmd))}' failed (exit {error.returncode}); what it said is above."
    if isinstance(error, subprocess.TimeoutExpired):
        return f"'{brief(_words(error.cmd))}' did not end within {error.timeout:.0f} s."
    if not isinstance(error, OSError):
        return None
    name, reason = error.filename, error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"{name or 'a file'}: {reason}. Make room ('make clean' deletes out/, 'make clean-cache' all that rmmu "
                "keeps in its cache), or set XDG_CACHE_HOME to a directory on a larger disk.")
    if error.errno == errno.ENOENT and name and os.sep not in str(name):
        return f"the program {name} is missing, or not in PATH ({os.environ.get('PATH', '')}). Install it and retry."
    if not name:
        return f"{reason}."
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{name}: {reason}."
    if Path(os.path.abspath(name)).is_relative_to(PROJECT):
        return (f"{name}: {reason}. rmmu writes to its own directory, {PROJECT}: let it be writable for the user who "
                "runs the command, or clone it to another place.")
    return (f"{name}: {reason}. Use another user, or set XDG_CACHE_HOME and TMPDIR to directories that you can write; "
            "the cache is $XDG_CACHE_HOME/rmmu, or ~/.cache/rmmu.")


def _words(command):
    return [command] if isinstance(command, (str, Path)) else command


def main(function):
    """Runs a command's main function; errors become one message and exit status 1."""
    def terminated(signum, _frame):
        raise SystemExit(128 + signum)
    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGHUP, terminated)
    try:
        code = function() or 0
        sys.stdout.flush()
        sys.exit(code)
    except Error as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\nrmmu: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone, e.g. head. Python would say so again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
    print(f"\nrmmu: {message}", file=sys.stderr, flush=True)
    sys.exit(1)

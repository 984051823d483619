# SPDX-License-Identifier: GPL-2.0
"""The cache of everything that is slow to make: $XDG_CACHE_HOME/rmmu (~/.cache/rmmu).

An entry is a directory NAME/KEY, where KEY is a hash of all that went into it. The protocol:

1. KEY.lock is held exclusively by whoever builds the entry, and shared by whoever uses it.
2. The builder starts from an empty directory and writes the mark KEY.complete last. A directory without its mark
   is never used: an interrupted build is deleted by the next one.
3. The builder's children inherit the lock, so a build that lost its parent cannot write into its successor's entry.
4. Once a new key of a name is complete, the other keys of that name are deleted, unless someone holds their lock. Build
   root and kernel are one set-up: of these the others are deleted when both are complete.

An entry never moves, because what is built in it may contain its own path.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import ui

# A file of an entry that tells which other entries of its name can take its place: those with the same text in it.
KIND = "kind"

_in_use = {}


def dir():
    """The cache directory; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # The specification says that a relative path is to be ignored.
    try:
        base = Path(base) if base.startswith("/") else Path.home() / ".cache"
    except RuntimeError as error:
        raise ui.Error("this user has no home directory, and so rmmu has no place for its cache. "
                       "Set XDG_CACHE_HOME to a directory that you can write.") from error
    path = base / "rmmu"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ui.Error(f"cannot make the cache directory {path}: {error.strerror}. "
                       "Set XDG_CACHE_HOME to a directory that you can write.") from error
    return path.resolve()


def log_path(name):
    """Where a step keeps its log."""
    return dir() / "logs" / f"{name}.log"


def hash_key(*parts):
    """A short key of values that JSON can hold; paths and bytes count as text."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_key(*paths):
    """A hash of the contents of files, to be used as a part of a key."""
    digest = hashlib.sha256()
    for path in sorted(str(path) for path in paths):
        data = Path(path).read_bytes()
        digest.update(f"{Path(path).name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


def keyed(name, *key_parts, build, keep_others=False):
    """The directory of the entry `name` made from `key_parts`; `build(directory)` fills it if it is not there.

    The entry stays reserved until this process ends. Only one key of a name is kept, unless the caller wants the others
    kept: what differs in kind needs a name of its own.
    """
    key = hash_key(*key_parts)
    family = dir() / name
    family.mkdir(parents=True, exist_ok=True)
    entry = family / key
    if entry in _in_use:
        return entry
    complete = family / f"{key}.complete"

    fd = _lock(family / f"{key}.lock", fcntl.LOCK_SH, f"{name} {key}")
    if not complete.exists():
        os.close(fd)
        fd = _lock(family / f"{key}.lock", fcntl.LOCK_EX, f"{name} {key}")
        try:
            if not complete.exists():
                _build(fd, entry, complete, build, keep_others)
        except BaseException:
            # Another run, or this one with other parts, may go on.
            os.close(fd)
            raise
        fcntl.flock(fd, fcntl.LOCK_SH)
    _in_use[entry] = fd
    os.utime(complete)
    return entry


def earlier(name, kind):
    """A complete entry of that kind, for when a new one cannot be made, or None. It stays reserved, too."""
    for complete in (dir() / name).glob("*.complete"):
        entry = complete.with_suffix("")
        fd = _lock(entry.with_suffix(".lock"), fcntl.LOCK_SH, f"{name} {entry.name}")
        if complete.exists() and (entry / KIND).exists() and (entry / KIND).read_text() == kind:
            _in_use[entry] = fd
            return entry
        os.close(fd)
    return None


def keep_on_exec():
    """Lets the entries stay reserved when this process becomes another program."""
    for fd in _in_use.values():
        os.set_inheritable(fd, True)


def is_family(path):
    """Whether a directory of the cache holds entries."""
    return any(re.fullmatch(r"[0-9a-f]{16}\.lock", child.name) for child in Path(path).iterdir())


def is_complete(name, *key_parts):
    """Whether the entry is there, without making it."""
    return (dir() / name / f"{hash_key(*key_parts)}.complete").exists()


def _build(fd, entry, complete, build, keep_others):
    remove_tree(entry)
    entry.mkdir()
    ui.KEEP_FDS.add(fd)
    try:
        build(entry)
    finally:
        ui.KEEP_FDS.discard(fd)
    # The mark must not reach the disk before what it vouches for.
    subprocess.run(["sync", "--file-system", str(entry)], check=False)
    partial = complete.with_suffix(".partial")
    partial.write_text("complete\n")
    os.replace(partial, complete)
    if not keep_others:
        prune(entry.parent, keep=entry.name)


def _lock(path, mode, what):
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            ui.note(f"waiting for another run that is making {what} (lock {path})")
            fcntl.flock(fd, mode)
        # Whoever pruned the entry meanwhile has deleted the lock's file too: ours must be the one that others see.
        try:
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


@contextlib.contextmanager
def locked(path, what):
    """Holds a lock file exclusively; children inherit it, like a builder's."""
    fd = _lock(Path(path), fcntl.LOCK_EX, what)
    ui.KEEP_FDS.add(fd)
    try:
        yield
    finally:
        ui.KEEP_FDS.discard(fd)
        os.close(fd)


def prune_unused(name):
    """Deletes the entries of a name that no process uses; those of this process stay. Returns what was deleted."""
    return prune(dir() / name)


def prune(family, keep=None, only=None):
    """Deletes the entries of a directory that nobody uses, except `keep`, or just `only`. Returns what was deleted."""
    gone = []
    keys = {match[1] for path in family.iterdir() if (match := re.fullmatch(r"([0-9a-f]{16})(\..*)?", path.name))}
    if only:
        keys &= {only}
    for key in sorted(keys - {keep}):
        lock = family / f"{key}.lock"
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        (family / f"{key}.complete").unlink(missing_ok=True)
        remove_tree(family / key)
        lock.unlink(missing_ok=True)
        os.close(fd)
        gone.append(family / key)
    return gone


def remove_tree(path):
    """Deletes a directory, but refuses while anything is mounted in it."""
    path = Path(path)
    if not path.exists():
        return
    inside = str(path.resolve()) + "/"
    for mount in Path("/proc/self/mountinfo").read_text().splitlines():
        target = mount.split()[4].encode().decode("unicode_escape")
        if (target + "/").startswith(inside):
            raise ui.Error(f"{target} is mounted, so {path} cannot be deleted. "
                           f"Unmount it (umount {target}), then retry.")
    done = subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False)
    if done.returncode != 0:
        raise ui.Error(f"cannot delete {path}: see above. If it is another user's, run the command as that user.")


def require_space(gigabytes, why):
    """Fails if the cache's file system has less room than that."""
    free = shutil.disk_usage(dir()).free / 1e9
    if free < gigabytes:
        raise ui.Error(f"{why} needs about {gigabytes} GB in {dir()}, and {free:.1f} GB are free. "
                       "Make room ('make clean-cache' deletes what rmmu keeps there), or set XDG_CACHE_HOME to a "
                       "directory on a larger disk.")

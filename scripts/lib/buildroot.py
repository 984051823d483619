# SPDX-License-Identifier: GPL-2.0
"""The build root: a Debian root directory with the compilers, QEMU and libraries that building and testing need.

On a host that runs the suite itself the root is "/", and the packages are installed with apt-get. On any other host
mmdebstrap makes a root in the cache, keyed by the packages, their versions and the way it is made.

Commands run in the root in a mount namespace of their own, so nothing stays mounted when they end, however they end.
The project, the cache and /tmp are seen there under the paths that they have on the host.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import archive
import cache
import ui

PROJECT = ui.PROJECT
PACKAGE_LIST = PROJECT / "scripts" / "root-packages"
GIGABYTES = 5
SUITE_GIGABYTES = 3

# What the root is made with. All of it is part of the root's key.
MMDEBSTRAP_OPTIONS = [
    "--mode=root", "--variant=apt", "--format=directory", f"--architectures={archive.ARCHITECTURE}", "--verbose",
    '--aptopt=Acquire::Retries "3"',
    # The root can be made again at any time: it need not survive a power cut while it is made.
    "--dpkgopt=force-unsafe-io",
    # Unused and large: documentation, static LLVM libraries, the parts of Rust's source that are not its library.
    "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/info/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/lintian/*", "--dpkgopt=path-exclude=/usr/lib/llvm-*/lib/*.a",
    "--dpkgopt=path-exclude=/usr/src/rustc-*/src/*", "--dpkgopt=path-exclude=/usr/src/rustc-*/compiler/*",
    "--dpkgopt=path-include=/usr/src/rustc-*/library/*",
]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Variables of the caller that commands in the root get: how to reach the network, and knobs of tests.
PASSED = re.compile(r"(?i)(https?|ftp|all|no)_proxy$|(TERM|CI|NO_COLOR|RUST_BACKTRACE|RMMU_\w+|PROPTEST_\w+|LOOM_\w+|"
                    r"CARGO_(HTTP|NET|REGISTR)\w+)$")

# The answer of apt that this process works with, and whether it has asked for it itself.
_offer = None
_asked = False

# What can go wrong with a set-up and leaves an earlier one usable.
FAILURES = (ui.Error, OSError, subprocess.SubprocessError)
FALLBACK_HOURS = 24

ENTER = Path(__file__).resolve().parent / "enter-root.sh"


class Root:
    """A place to run commands in; `path` is its directory on the host."""

    def __init__(self, path, key):
        self.path = Path(path)
        self.key = key

    @property
    def is_host(self):
        return str(self.path) == "/"

    def argv(self, argv, cwd=None, env=None, binds=()):
        """The host command that runs `argv` in the root. It replaces itself: its process is the command's."""
        command = ["env", "-i", f"--chdir={cwd or PROJECT}",
                   *(f"{name}={value}" for name, value in self._environment(env).items()), *map(str, argv)]
        if self.is_host:
            return command
        mounts = []
        for kind, source, target in self._mounts(binds):
            mounts += [kind, str(source), str(target)]
        return ["unshare", "--mount", "--propagation", "private", "--", str(ENTER), str(self.path),
                *mounts, "--", *command]

    def _environment(self, env):
        passed = {name: value for name, value in os.environ.items() if PASSED.match(name)}
        home = os.environ.get("HOME", "/root") if self.is_host else "/root"
        return {"PATH": PATH, "HOME": home, "LANG": "C.UTF-8", **passed, **(env or {})}

    def _mounts(self, binds):
        for path in ("/dev", "/proc", "/sys"):
            yield "tree", path, path
        # Names are looked up and certificates are trusted as on the host.
        for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
            if os.path.exists(path):
                yield "ro", os.path.realpath(path), path
        for path in ("/tmp", PROJECT, cache.dir()):
            yield "rw", path, path
        for bind in binds:
            if isinstance(bind, (str, Path)):
                bind = (bind, bind)
            yield (bind[2] if len(bind) > 2 else "rw"), bind[0], bind[1]

    def sees(self, path, binds=()):
        """Whether commands in the root see that host path under its own name."""
        shown = [target for kind, source, target in self._mounts(binds) if str(source) == str(target)]
        return self.is_host or any(Path(path).is_relative_to(target) for target in shown)

    def run(self, argv, cwd=None, env=None, binds=(), log=None, check=True, capture=False, stdin=None, timeout=None):
        """Runs a command in the root.

        Its output goes to ours, to the file `log`, to the log of the ui.Step `log`, or with `capture` into the
        result's stdout. A failure is a ui.Error unless `check` is off. Without `stdin` it reads nothing.
        """
        command = self.argv(argv, cwd, env, binds)
        if isinstance(log, ui.Step):
            code = log.run(command, check=False, shown=argv)
            if check and code != 0:
                raise ui.Error(_failure(argv, code, log.log))
            return subprocess.CompletedProcess(argv, code)
        output = open(log, "ab") if log else (subprocess.PIPE if capture else None)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL if stdin is None else stdin, stdout=output,
                                  stderr=subprocess.STDOUT if log else None, text=True, timeout=timeout,
                                  pass_fds=tuple(ui.KEEP_FDS), check=False)
        finally:
            if log:
                output.close()
        if check and done.returncode != 0:
            raise ui.Error(_failure(argv, done.returncode, log))
        return done


def _failure(argv, code, log):
    text = f"'{ui.brief(argv)}' failed (exit {code})"
    return text + (f"\n--- end of {log} ---\n{ui.tail(log)}\n--- (whole log: {log})" if log else "")


def package_names(group=None):
    """The packages named in scripts/root-packages; with `group`, those of one paragraph, by its heading."""
    text = PACKAGE_LIST.read_text()
    if group:
        text = next(part for part in text.split("\n\n") if part.startswith(f"# {group}"))
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return sorted({line for line in lines if line})


def offer(refresh=False):
    """What apt offers us; from the cache while that is recent, so that a warm run needs no network."""
    global _offer, _asked
    if _offer is None or refresh:
        names = package_names()
        _offer = None if refresh else archive.load(names, archive.OFFER_DAYS)
        if _offer is None:
            with cache.locked(cache.dir() / "offer.lock", "a list of packages"):
                # Whoever had the lock before us may have asked already.
                _offer = None if refresh else archive.load(names, archive.OFFER_DAYS)
                if _offer is None:
                    _offer, _asked = _ask(names), True
    return _offer


def _ask(names):
    old = next((kept for kept in (archive.load(names), archive.load_complete(names)) if kept and _is_ready(kept)), None)
    try:
        new = archive.ask(names)
        if old and archive.newest_supported(new) is None:
            archive.choose_kernel(new)
    except FAILURES as error:
        # What is complete here still works when the mirror is away, or when the suite has moved past us.
        if not old:
            raise
        ui.note(f"using the build root and kernel of an earlier set-up, because: {first_line(error)}")
        archive.save(old, hours=1)
        return old
    archive.save(new)
    return new


def with_fallback(make, is_complete):
    """What `make()` makes of apt's offer. If it fails: of what apt offers now, and then of the last complete set-up.

    `is_complete(offer)` tells whether all that `make()` needs is there.
    """
    global _offer, _asked
    try:
        return make()
    except FAILURES as error:
        failure = error
    if _offer is None:
        raise failure
    names = package_names()
    if not _asked and os.access(cache.dir(), os.W_OK):
        # An offer can be days old, and the archive have moved on. What is gone from there cannot be fetched.
        before = _offer
        ui.note(f"that failed with what apt offered earlier: {first_line(failure)}")
        try:
            with cache.locked(cache.dir() / "offer.lock", "a list of packages"):
                _offer, _asked = archive.ask(names), True
                archive.save(_offer)
            if _offer != before:
                return make()
        except FAILURES as error:
            failure = error
    earlier = archive.load_complete(names)
    if earlier is None or earlier == _offer or not is_complete(earlier):
        raise failure
    kernel = archive.newest_supported(earlier)
    ui.note(f"the new set-up failed: {first_line(failure)}")
    ui.note(f"the earlier one stays in use, with Linux {kernel.version if kernel else '(none)'}; it is tried again in "
            f"{FALLBACK_HOURS} hours, or by 'make refresh'. Logs: {cache.log_path('*')}")
    _offer = earlier
    archive.save(earlier, hours=FALLBACK_HOURS)
    return make()


def first_line(error):
    """What one of FAILURES says, in short."""
    return (str(error) if isinstance(error, ui.Error) else ui.explain(error)).splitlines()[0]


def _compiler_and_packages(an_offer):
    # Without a supported kernel the root still serves trees of the user's own.
    kernel = archive.newest_supported(an_offer)
    return sorted({*package_names(), *([kernel.compiler] if kernel else [])})


def _key_parts(an_offer):
    packages = {name: an_offer.versions[name] for name in _compiler_and_packages(an_offer)}
    return archive.SUITE, packages, MMDEBSTRAP_OPTIONS


def key_of(an_offer):
    """The key of the root that an offer makes, or None if that root is not there."""
    if archive.host_is_suite():
        packages = _compiler_and_packages(an_offer)
        have = installed("/", packages)
        return _host_key(have) if have.keys() >= set(packages) else None
    parts = _key_parts(an_offer)
    return cache.hash_key(*parts) if cache.is_complete("root", *parts) else None


def _is_ready(an_offer):
    """Whether a set-up from this offer is there and has a supported kernel."""
    if archive.newest_supported(an_offer) is None:
        return False
    return archive.host_is_suite() or cache.is_complete("root", *_key_parts(an_offer))


def ensure(any_kernel=False):
    """The build root, made if need be; unless `any_kernel`, only if a supported stock kernel is to be had."""
    require_plain_paths()
    return with_fallback(lambda: make(any_kernel), key_of)


def require_plain_paths():
    """Refuses paths that make and Kbuild take for several words, or for something of their own."""
    for what, path, advice in (("rmmu is in", PROJECT, "Clone it to another place"),
                               ("rmmu's cache is in", cache.dir(), "Set XDG_CACHE_HOME to another directory")):
        strange = sorted(set(re.findall(r"[^\w/.,+@~=-]", str(path))))
        if strange:
            raise ui.Error(f"{what} '{path}', and the kernel's build system cannot work with a path that has "
                           f"{' or '.join(map(repr, strange))} in it. {advice}.")


def make(any_kernel=False):
    """The same, without falling back to an earlier one."""
    if os.geteuid() != 0 and not archive.host_is_suite():
        raise ui.Error("building and testing happen in a Debian root that is entered with mount and chroot, which only "
                       "root can do here. Run the command as root (for example with sudo).")
    found = offer()
    if not any_kernel:
        archive.choose_kernel(found)
    if archive.host_is_suite():
        return _host_root(_compiler_and_packages(found))
    parts = _key_parts(found)
    if not cache.is_complete("root", *parts):
        cache.require_space(GIGABYTES, "the set-up")
    path = cache.keyed("root", *parts, keep_others=True,
                       build=lambda directory: _make_root(directory, found, parts[1]))
    return Root(path / "rootfs", cache.hash_key(*parts))


def installed(root_path, names):
    """Versions of packages in a root, {name: version}; packages which are not wholly installed are left out."""
    command = ["dpkg-query", "--admindir", f"{str(root_path).rstrip('/')}/var/lib/dpkg",
               "-W", "-f", "${db:Status-Abbrev}\t${Package}\t${Version}\n", *names]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    rows = [row.split("\t") for row in done.stdout.splitlines()]
    return {row[1]: row[2] for row in rows if row[0].startswith("ii")}


def _host_root(packages):
    have = installed("/", packages)
    missing = [name for name in packages if name not in have]
    if missing:
        install_on_host(missing)
        have = installed("/", packages)
    return Root("/", _host_key(have))


def _host_key(have):
    return cache.hash_key("host", archive.SUITE, have)


def install_on_host(packages):
    """Installs packages on the host."""
    if os.geteuid() != 0:
        raise ui.Error(f"these packages are missing: {' '.join(packages)}. "
                       f"Run this as root once, or install them with: apt-get install {' '.join(packages)}")
    archive.host_apt_update()
    with ui.step(f"host: installing {' '.join(packages)}", log=cache.log_path("host-apt")) as step:
        step.run(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "Acquire::Retries=3", "install", "--yes",
                  "--no-install-recommends", *packages])


def make_for(packages, directory, purpose, log, options=()):
    """A root with other packages, made with more options of mmdebstrap; the caller deletes it. On a host that runs the
    suite: the host."""
    if archive.host_is_suite():
        return _host_root(packages)
    _mmdebstrap(directory, offer(), packages, f"{purpose}: a root of its own with {len(packages)} packages", log,
                options)
    return Root(directory, None)


def _make_root(directory, found, packages):
    target = directory / "rootfs"
    _mmdebstrap(target, found, packages, f"build root: installing Debian {archive.SUITE} with {len(packages)} packages "
                "(1 to 3 minutes)", cache.log_path("root"))
    if installed(target, packages) != packages:
        archive.discard()
        raise ui.Error("the archive changed while the build root was made. Run the same command again.")


def make_of_suite(found, packages):
    """A root of another suite with packages, {name: version}, of its offer, made if need be; it is for building only."""
    if os.geteuid() != 0:
        raise ui.Error(f"a kernel of Debian {found.suite} is built for in a root of that suite, which only root can make and "
                       "enter. Run the command as root (for example with sudo).")
    if not shutil.which("mmdebstrap"):
        install_on_host(["mmdebstrap"])
    parts = found.suite, packages, MMDEBSTRAP_OPTIONS
    if not cache.is_complete("root-suite", *parts):
        cache.require_space(SUITE_GIGABYTES, f"a root of Debian {found.suite}")

    def build(directory):
        _mmdebstrap(directory / "rootfs", found, packages, f"compilers: installing Debian {found.suite} with {len(packages)} "
                    "packages (1 to 3 minutes)", cache.log_path(f"root-{found.suite}"))

    path = cache.keyed("root-suite", *parts, keep_others=True, build=build)
    return Root(path / "rootfs", cache.hash_key(*parts))


def _mmdebstrap(target, found, packages, title, log, options=()):
    if not archive.KEYRING.exists():
        raise ui.Error(f"{archive.KEYRING} is missing. Install the package debian-archive-keyring.")
    options = [*options, *(f"--aptopt={text}" for text in archive.proxy_options())]
    if not found.valid_until:
        options.append('--aptopt=Acquire::Check-Valid-Until "false"')
    source = f"deb [signed-by={archive.KEYRING}] {found.mirror} {found.suite} main"
    with ui.step(title, log=log) as step:
        step.run(["mmdebstrap", *MMDEBSTRAP_OPTIONS, *options, f"--include={','.join(packages)}",
                  found.suite, str(target), source])

# SPDX-License-Identifier: GPL-2.0
"""What Debian's archive offers for the suite we build on, asked through the host's own apt.

apt runs with lists of its own in the cache, and with the host's configuration: proxies, certificates and credentials
apply as they do to the host. The mirror is the one that serves the host's own Debian suite. RMMU_MIRROR overrides it.

The answer ("the offer") is kept: apt is asked again only when the answer is older than OFFER_DAYS, when what we ask for
changed, or by `make refresh`. Between these, nothing here touches the network.
"""

import json
import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

import cache
import ui

SUITE = "forky"
ARCHITECTURE = "amd64"
# Where else a source package may come from when the suite's own is missing.
SOURCE_SUITES = (SUITE, "sid", "stable")
OFFER_DAYS = 7
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUPPORTED_KERNELS = Path(__file__).resolve().parent.parent / "supported-kernels"


@dataclass
class KernelOffer:
    """A stock kernel and the packages it is made of; every name is derived from the archive's metadata."""
    release: str
    version: str
    series: str
    compiler: str
    packages: dict = field(default_factory=dict)


@dataclass
class Offer:
    """The archive's answer: versions of the packages asked for, and the stock kernels."""
    mirror: str
    valid_until: bool
    versions: dict
    kernels: list
    suite: str = SUITE


@dataclass(frozen=True)
class Supported:
    """A line of scripts/supported-kernels: a series, the suite that has its kernels, and the suite of the compilers."""
    series: str
    suite: str
    tools: str


def supported():
    """The lines of scripts/supported-kernels."""
    rows = (text.partition("#")[0].split() for text in SUPPORTED_KERNELS.read_text().splitlines())
    return [Supported(*row) for row in rows if row]


def supported_series():
    """The kernel series that rmmu can be built for, from scripts/supported-kernels."""
    return list(dict.fromkeys(row.series for row in supported()))


def series_of(version):
    """The series of a kernel release or package version: 7.2 of 7.2.12-1."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return f"{match[1]}.{match[2]}" if match else version


def newest_supported(offer):
    """The newest supported kernel of the offer, or None."""
    supported = supported_series()
    return next((kernel for kernel in offer.kernels if kernel.series in supported), None)


def choose_kernel(offer):
    """The newest supported kernel of the offer; without one, says what there is and what to do."""
    chosen = newest_supported(offer)
    if chosen:
        return chosen
    supported = supported_series()
    names = ", ".join(f"Linux {k.version} ({k.release})" for k in offer.kernels) or "no stock kernel with its source"
    raise ui.Error(
        f"Debian {SUITE} offers {names}; rmmu supports the series {', '.join(supported)}. "
        "Get a version of rmmu whose scripts/supported-kernels lists the kernel's series, or build for a prepared "
        "source tree of a supported kernel with 'make KDIR=/path/to/tree'.")


class _Apt:
    """apt with a state of its own for one suite on one mirror."""

    def __init__(self, mirror, valid_until, sources_of=(), suite=SUITE):
        self.mirror = mirror
        self.valid_until = valid_until
        # Lists of packages, or of the source packages of some suites.
        self.sources_of = sources_of
        self.suite = suite
        self.home = cache.dir() / "apt" / (f"{suite}-source" if sources_of else suite)

    def options(self):
        home = self.home
        return [
            "-o", f"Dir::State={home}/state", "-o", f"Dir::State::status={home}/status",
            "-o", f"Dir::Cache={home}/cache", "-o", f"Dir::Etc::sourcelist={home}/sources.list",
            "-o", "Dir::Etc::sourceparts=-", "-o", "Dir::Etc::preferences=-", "-o", "Dir::Etc::preferencesparts=-",
            "-o", f"APT::Architecture={ARCHITECTURE}", "-o", f"APT::Architectures::={ARCHITECTURE}",
            "-o", "APT::Get::List-Cleanup=true", "-o", "Acquire::Languages=none", "-o", "Acquire::Retries=3",
            # A host may have the checks of dates off altogether: the root's are off only if they must be.
            "-o", "Acquire::Check-Date=true",
            "-o", f"Acquire::Check-Valid-Until={'true' if self.valid_until else 'false'}",
            # On the day of a release the suite is stable instead of testing, with another version.
            "-o", "Acquire::AllowReleaseInfoChange::Suite=true", "-o", "Acquire::AllowReleaseInfoChange::Version=true",
            "-o", "APT::Sandbox::User=root",
        ]

    def prepare(self):
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        (self.home / "status").touch()
        kinds = [("deb-src", suite) for suite in self.sources_of] or [("deb", self.suite)]
        (self.home / "sources.list").write_text("".join(
            f"{kind} [signed-by={KEYRING}] {self.mirror} {suite} main\n" for kind, suite in kinds))

    def query(self, *argv):
        done = subprocess.run([argv[0], *self.options(), *argv[1:]], text=True, capture_output=True, check=False)
        return done.stdout

    def show(self, names):
        """The archive's control data of packages: name -> fields of the newest version."""
        found = {}
        if not names:
            return found
        for stanza in self.query("apt-cache", "show", "--no-all-versions", *names).split("\n\n"):
            fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", stanza, re.M))
            if "Package" in fields and fields["Package"] not in found:
                found[fields["Package"]] = fields
        return found

    def names(self, prefix):
        return self.query("apt-cache", "pkgnames", prefix).split()


def host_is_suite():
    """Whether the host runs the very suite we build on."""
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return False
    fields = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', text, re.M))
    return fields.get("ID") == "debian" and fields.get("VERSION_CODENAME") == SUITE


def mirror():
    """The mirror of Debian's main archive that the host uses."""
    chosen = os.environ.get("RMMU_MIRROR")
    if chosen:
        return chosen
    # The labels come from the lists: apt knows them only after an update.
    for attempt in ("lists", "update"):
        done = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)\t$(ORIGIN)\t$(LABEL)\t$(CODENAME)",
                               "Created-By: Packages"], text=True, capture_output=True, check=False)
        rows = [row.split("\t") for row in done.stdout.splitlines() if row.count("\t") == 3]
        sites = [site for site, origin, label, codename in rows
                 if origin == "Debian" and label == "Debian" and "-" not in codename]
        if sites:
            return _plain_site(sites[0])
        if attempt == "lists":
            if os.geteuid() != 0:
                break
            host_apt_update()
    raise ui.Error("the host's apt configuration names no mirror of Debian's main archive. "
                   "Set RMMU_MIRROR to the URL of one and retry.")


def _plain_site(site):
    # Cloud images name a file with a list of mirrors instead of a mirror.
    match = re.match(r"mirror\+file:(/.*)", site)
    if not match:
        return site
    try:
        for text in Path(match[1]).read_text().splitlines():
            words = text.partition("#")[0].split()
            if words:
                return words[0]
    except OSError as error:
        raise ui.Error(f"apt's list of mirrors cannot be read: {error}. Set RMMU_MIRROR to the URL of one.") from error
    raise ui.Error(f"apt's list of mirrors {match[1]} is empty. Set RMMU_MIRROR to the URL of a Debian mirror.")


def host_apt_update():
    """Updates the host's package lists; mirrors fail now and then, so it tries three times."""
    with ui.step("host: apt-get update", log=cache.log_path("host-apt")) as step:
        for attempt in range(3):
            if step.run(["apt-get", "-o", "Acquire::Retries=3", "update"], check=attempt == 2) == 0:
                return
            step.note("the update failed; trying again")
            time.sleep(5)


def proxy_options():
    """The host's apt settings for reaching the network, as lines of an apt configuration file."""
    done = subprocess.run(["apt-config", "dump"], text=True, capture_output=True, check=False)
    wanted = re.compile(r"Acquire::(https?|ftp)(::|\s)", re.I)
    return [text for text in done.stdout.splitlines() if wanted.match(text) and not text.endswith('"";')]


def _update(apt):
    """Fetches the suite's lists. An expired Release file is accepted in a second try, and said."""
    log = cache.log_path("archive")
    with ui.step(f"archive: asking apt what Debian {apt.suite} offers", log=log) as step:
        apt.prepare()
        for attempt in range(4):
            log.write_bytes(b"")
            # The check below reads apt's messages: they must not be translated.
            code = step.run(["env", "LC_ALL=C", "apt-get", *apt.options(), "-o", "APT::Update::Error-Mode=any",
                             "update"], check=False)
            if code == 0:
                return
            text = "\n".join(row for row in log.read_text(errors="replace").splitlines() if row[:2] in ("E:", "W:"))
            if apt.valid_until and "is expired" in text:
                step.note(f"the mirror's Release file of {apt.suite} is past its Valid-Until date (the mirror lags). "
                          "Going on without that check, for the build root only; signatures are still verified.")
                apt.valid_until = False
            elif attempt < 3:
                step.note("apt-get update failed; trying again")
                time.sleep(5)
        hint = ""
        if "NO_PUBKEY" in text:
            hint = f"The host's {KEYRING} is too old for {apt.suite}: upgrade the package debian-archive-keyring.\n"
        elif "not valid yet" in text:
            hint = "The Release file is from the future: set the host's clock.\n"
        elif "does not have a Release file" in text:
            hint = (f"The mirror {apt.mirror} does not have {apt.suite} (any more): set RMMU_MIRROR to one that has.\n")
        raise ui.Error(f"apt cannot fetch the lists of Debian {apt.suite}.\n{hint}{text}\n(whole log: {log})")


def _kernels(apt, flavours=False):
    """The suite's stock kernels, newest first, that have headers and source of the very same version.

    With `flavours` the kernels for clouds and for real time, too.
    """
    pattern = re.compile(rf"linux-image-(\d.*-{ARCHITECTURE})")
    releases = [match[1] for name in apt.names("linux-image-") if (match := pattern.fullmatch(name))
                and not re.search(r"-(dbg|unsigned)-" if flavours else r"-(rt|cloud|dbg|unsigned)-", match[1])]
    images = apt.show([f"linux-image-{release}" for release in releases])
    kernels = []
    for release in releases:
        image = images.get(f"linux-image-{release}")
        if not image:
            continue
        version, series = image["Version"], series_of(image["Version"])
        parts = re.findall(r"linux-(?:base|binary|modules)-" + re.escape(release), image.get("Depends", ""))
        names = [f"linux-image-{release}", *sorted(set(parts)), f"linux-headers-{release}", f"linux-source-{series}"]
        found = apt.show(names)
        # Right after an upload the parts can differ: such a kernel cannot be built for.
        if any(found.get(name, {}).get("Version") != version for name in names):
            continue
        compiler = re.search(r"\bgcc-\d+[a-z0-9-]*", found[f"linux-headers-{release}"].get("Depends", ""))
        kernels.append(KernelOffer(release, version, series, compiler[0] if compiler else "gcc",
                                   {name: found[name]["Version"] for name in names}))
    return _newest_first(kernels)


def is_newer(version, other):
    """Whether a version is newer than another, as dpkg has it."""
    return subprocess.run(["dpkg", "--compare-versions", version, "gt", other], check=False).returncode == 0


def _newest_first(kernels):
    ordered = []
    for kernel in kernels:
        place = 0
        while place < len(ordered) and is_newer(ordered[place].version, kernel.version):
            place += 1
        ordered.insert(place, kernel)
    return ordered


def ask(names):
    """Asks apt now, through the network."""
    apt = _Apt(mirror(), True)
    _update(apt)
    kernels = _kernels(apt)
    wanted = sorted(set(names) | {kernel.compiler for kernel in kernels})
    found = apt.show(wanted)
    missing = [name for name in names if name not in found]
    if missing:
        raise ui.Error(f"Debian {SUITE} at {apt.mirror} has no package {', '.join(missing)}. "
                       "The mirror may be incomplete: set RMMU_MIRROR to another one and run 'make refresh'. If Debian has "
                       "renamed it, get a version of rmmu whose scripts/root-packages has the new name.")
    # A kernel cannot be built for without the compiler that its headers ask for.
    kernels = [kernel for kernel in kernels if kernel.compiler in found]
    return Offer(apt.mirror, apt.valid_until, {name: fields["Version"] for name, fields in found.items()}, kernels)


def ask_suite(suite, names=(), with_kernels=False):
    """What another suite offers, asked now: packages of these names, and its kernels of every flavour."""
    apt = _Apt(mirror(), True, suite=suite)
    _update(apt)
    found = apt.show(sorted(names))
    kernels = _kernels(apt, flavours=True) if with_kernels else []
    return Offer(apt.mirror, apt.valid_until, {name: fields["Version"] for name, fields in found.items()}, kernels, suite)


def _offer_path():
    return cache.dir() / "offer.json"


def _complete_path():
    return cache.dir() / "complete.json"


def load(names, max_age_days=None):
    """The offer that was kept, or None if there is none, it is too old or it does not answer for these packages."""
    return _load(_offer_path(), names, max_age_days)


def load_complete(names):
    """The same of the offer that the last complete set-up was made from, of any age and mirror."""
    return _load(_complete_path(), names, None, any_mirror=True)


def _load(path, names, max_age_days, any_mirror=False):
    try:
        kept = json.loads(path.read_text())
        offer = _parse(kept)
        age_days = (time.time() - kept["time"]) / 86400
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if max_age_days is not None and not -1 <= age_days <= max_age_days:
        return None
    override = None if any_mirror else os.environ.get("RMMU_MIRROR")
    kernel = newest_supported(offer)
    needed = {*names, *([kernel.compiler] if kernel else [])}
    if (override and override != offer.mirror) or not needed <= offer.versions.keys():
        return None
    return offer


def _parse(kept):
    return Offer(kept["mirror"], kept["valid_until"], kept["versions"],
                 [KernelOffer(**kernel) for kernel in kept["kernels"]], kept.get("suite", SUITE))


def suite_offer(name, ask):
    """What `ask()` says, kept under a name for OFFER_DAYS. A mirror that cannot be asked leaves what was kept before."""
    path = cache.dir() / f"offer-{name}.json"
    try:
        kept = json.loads(path.read_text())
        offer = _parse(kept)
    except (OSError, ValueError, KeyError, TypeError):
        kept = offer = None
    if offer and os.environ.get("RMMU_MIRROR") in (None, "", offer.mirror) \
            and -86400 <= time.time() - kept["time"] <= OFFER_DAYS * 86400:
        return offer
    try:
        new = ask()
    except (ui.Error, OSError, subprocess.SubprocessError) as error:
        if not offer:
            raise
        ui.note(f"using what {offer.suite} offered earlier, because: {str(error).splitlines()[0]}")
        return offer
    _save(path, new, time.time())
    return new


def save(offer, hours=OFFER_DAYS * 24):
    """Keeps an offer; apt is asked again after that time."""
    _save(_offer_path(), offer, time.time() - (OFFER_DAYS * 24 - hours) * 3600)


def save_complete(offer):
    """Keeps the offer that a complete set-up was made from."""
    kept = _load(_complete_path(), (), None, any_mirror=True)
    if kept != offer:
        _save(_complete_path(), offer, time.time())


def _save(path, offer, asked):
    text = json.dumps({"time": asked, **asdict(offer)}, indent=1)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def discard():
    """Forgets the offers, so that the next run asks apt."""
    for path in (_offer_path(), *cache.dir().glob("offer-*.json")):
        path.unlink(missing_ok=True)


def download_source(offer, package, version, directory, step):
    """Fetches the source package of that version into a directory; returns the version.

    Mirrors list source packages that they do not hold (any more, or yet). Then the nearest older or newer version that
    the archive has takes its place: what is listed for SOURCE_SUITES is tried, newest first.
    """
    apt = _Apt(offer.mirror, offer.valid_until, SOURCE_SUITES)
    apt.prepare()
    directory.mkdir()
    if step.run(["apt-get", *apt.options(), "update"], check=False) != 0:
        step.note("apt-get update failed; trying again")
        if step.run(["apt-get", *apt.options(), "update"], check=False) != 0:
            # One suite may have gone, and the others have what is wanted.
            step.note("it failed again; going on with the lists that there are")
    listed = apt.query("apt-cache", "showsrc", "--only-source", package)
    versions = []
    for found in re.findall(r"^Version: *(\S+)$", listed, re.M):
        place = 0
        while place < len(versions) and is_newer(versions[place], found):
            place += 1
        if found not in (version, *versions):
            versions.insert(place, found)
    for candidate in (version, *versions):
        if step.run(["apt-get", *apt.options(), "source", "--download-only", f"{package}={candidate}"], cwd=directory,
                    check=False) == 0 or _download_tars(apt, listed, candidate, directory, step):
            return candidate
        for left in directory.iterdir():
            left.unlink()
    raise ui.Error(f"the archive has no source package of {package} to fetch; asked for "
                   f"{', '.join([version, *versions])}. The mirror may be incomplete: set RMMU_MIRROR to another one "
                   f"and retry. (log: {step.log})")


def _download_tars(apt, listed, version, directory, step):
    """Fetches what a source package is unpacked from, without its description, which some mirrors lack.

    The archive's signed list of sources has the checksums, which apt's own helper verifies.
    """
    stanza = next((text for text in listed.split("\n\n") if f"\nVersion: {version}\n" in f"\n{text}\n"), "")
    pool = re.search(r"^Directory: *(\S+)$", stanza, re.M)
    sums = re.search(r"^Checksums-Sha256:.*\n((?: .*\n?)+)", stanza, re.M)
    if not pool or not sums:
        return False
    tars = [(name, digest) for digest, _, name in (row.split() for row in sums[1].splitlines()) if ".tar." in name]
    step.note(f"the mirror has no description of version {version}; fetching its archives by the list of sources")
    return bool(tars) and all(
        step.run(["/usr/lib/apt/apt-helper", "-o", "Acquire::Retries=3", "download-file",
                  f"{apt.mirror.rstrip('/')}/{pool[1]}/{quote(name)}", name, f"SHA256:{digest}"],
                 cwd=directory, check=False) == 0
        for name, digest in tars)


def download(offer, packages, directory, step):
    """Fetches packages, {name: version}, into a directory; apt verifies them against the signed lists."""
    apt = _Apt(offer.mirror, offer.valid_until, suite=offer.suite)
    wanted = [f"{name}={version}" for name, version in packages.items()]
    command = ["apt-get", *apt.options(), "download", *wanted]
    if step.run(command, cwd=directory, check=False) == 0:
        return
    step.note("the download failed; updating the lists and trying again")
    apt.prepare()
    step.run(["apt-get", *apt.options(), "update"], check=False)
    step.run(command, cwd=directory)

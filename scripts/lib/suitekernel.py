# SPDX-License-Identifier: GPL-2.0
"""Kernels of Debian other than the one that the set-up takes: other suites, and the flavours for clouds and real time.

scripts/supported-kernels says which there may be, and apt which there are. Each gets a build tree as the stock kernel
does: the source, configuration and exported symbols of its very version, prepared with the compilers of its own suite.
Where these have the versions that the build root has, the build root serves; else there is a root of that suite, with
what a build needs and nothing else. Image and modules are fetched only for a kernel that is to boot.
"""

from dataclasses import dataclass

import archive
import buildroot
import cache
import kernel
import ui

TOOLS = "Building kernel modules"
GIGABYTES = 2
# A file of an entry that says which packages it was made from.
PACKAGES = "packages"


@dataclass(frozen=True)
class Found:
    """A kernel that a suite has, and the line of scripts/supported-kernels that it is there by."""
    row: archive.Supported
    offer: archive.Offer
    kernel: archive.KernelOffer

    @property
    def flavour(self):
        """amd64, cloud-amd64 or rt-amd64."""
        words = self.kernel.release.split("-")
        return "-".join(words[-2:] if words[-2] in ("cloud", "rt") else words[-1:])

    @property
    def packages(self):
        """Those of its packages that a build takes, {name: version}."""
        return {name: version for name, version in self.kernel.packages.items()
                if name.startswith(("linux-headers-", "linux-source-"))}


def find(series=None):
    """All that the archive has of scripts/supported-kernels, in its order, and newest first within a suite.

    A kernel that is in two suites is named once. With `series`, only suites that have that series are asked.
    """
    found = []
    for row in archive.supported():
        if series not in (None, row.series):
            continue
        offer = archive.suite_offer(f"kernels-{row.suite}", lambda: archive.ask_suite(row.suite, with_kernels=True))
        known = {earlier.kernel.release for earlier in found}
        found += [Found(row, offer, one) for one in offer.kernels if one.series == row.series and one.release not in known]
    return found


def find_release(release):
    """The kernel of that release, or None."""
    series = archive.series_of(release)
    return next((found for found in find(series) if found.kernel.release == release), None)


def newest(series):
    """The newest kernel of a series that has the flavour of the stock kernel, or None."""
    best = None
    for found in find(series):
        if found.row.series == series and found.flavour == archive.ARCHITECTURE and (
                best is None or archive.is_newer(found.kernel.version, best.kernel.version)):
            best = found
    return best


def root_of(found):
    """A root with the compilers of the suite that a kernel belongs to."""
    names = {*buildroot.package_names(TOOLS), found.kernel.compiler}
    usual = buildroot.offer()
    if found.row.tools == usual.suite:
        return buildroot.ensure()
    offer = archive.suite_offer(f"tools-{found.row.tools}-{found.kernel.compiler}",
                                lambda: archive.ask_suite(found.row.tools, names))
    missing = sorted(names - offer.versions.keys())
    if missing:
        raise ui.Error(f"Debian {found.row.tools} has no package {', '.join(missing)}, and so {found.kernel.release} cannot be "
                       "built for.")
    if all(usual.versions.get(name) == version for name, version in offer.versions.items()):
        return buildroot.ensure()
    return buildroot.make_of_suite(offer, offer.versions)


def _tree_parts(found, root):
    return root.key, found.packages, cache.file_key(kernel.UNPACK_SOURCE, kernel.PREPARE_TREE)


def ensure(found, boots=False):
    """(root, kernel) to build the module with, made if need be; with `boots`, image and modules, too."""
    root = root_of(found)
    release = found.kernel.release
    parts = _tree_parts(found, root)
    if not cache.is_complete("kernel-tree", *parts):
        cache.require_space(GIGABYTES, f"the build tree of {release}")
    tree = cache.keyed("kernel-tree", *parts, keep_others=True,
                       build=lambda directory: _make_tree(directory, root, found)) / "tree"
    modules = None
    if boots:
        image = cache.keyed("kernel-image", found.kernel.packages, keep_others=True,
                            build=lambda directory: _make_image(directory, found))
        modules = image / "image" / "usr" / "lib" / "modules" / release
    return root, kernel.Kernel(release, found.kernel.series, tree, kernel.toolchain_of(kernel.read_config(tree / ".config")),
                               cache.hash_key(*parts), modules and modules / "vmlinuz", modules, ours=True)


def _fetch(directory, found, packages):
    debs = directory / "debs"
    debs.mkdir()
    (directory / PACKAGES).write_text(str(packages if packages == found.packages else found.kernel.packages))
    (directory / "image" / "usr" / "lib").mkdir(parents=True)
    (directory / "image" / "lib").symlink_to("usr/lib")
    with ui.step(f"kernel: fetching Linux {found.kernel.version} of {found.row.suite} ({found.kernel.release})",
                 log=cache.log_path("kernel-fetch")) as step:
        archive.download(found.offer, packages, debs, step)
    return debs


def _make_tree(directory, root, found):
    debs = _fetch(directory, found, found.packages)
    headers = kernel.unpack(root, debs, directory / "image", found.kernel.release, boots=False)
    kernel.prepare(root, debs, headers, directory / "tree", found.kernel.release)


def _make_image(directory, found):
    packages = {name: version for name, version in found.kernel.packages.items() if name not in found.packages}
    debs = _fetch(directory, found, packages)
    kernel.unpack(buildroot.ensure(), debs, directory / "image", found.kernel.release)


def prune():
    """Deletes what the cache holds for kernels that no suite has any more, and nobody uses."""
    found = find()
    trees = {str(one.packages) for one in found}
    images = {str(one.kernel.packages) for one in found}
    for family, offered in (("kernel-tree", trees), ("kernel-image", images)):
        directory = cache.dir() / family
        for mark in directory.glob(f"*/{PACKAGES}"):
            if mark.read_text() not in offered:
                for gone in cache.prune(directory, only=mark.parent.name):
                    ui.note(f"deleted {gone}: no suite has that kernel any more")

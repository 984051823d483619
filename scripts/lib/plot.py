# SPDX-License-Identifier: GPL-2.0
"""A plot of the benchmark's ratios, as SVG and as PNG, by matplotlib.

matplotlib is the host's own if there is one; else pip puts it into the cache, where nothing else sees it.
"""

import importlib
import subprocess
import sys

import cache
import ui

BETTER, WORSE, LINE = "#2a7f62", "#b5482f", "#444444"


def _import_matplotlib():
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        pass
    key = ("matplotlib", sys.implementation.cache_tag)
    directory = cache.keyed("plot", *key, build=_install)
    sys.path.insert(0, str(directory))
    return importlib.import_module("matplotlib")


def _install(directory):
    with ui.step("plot: installing matplotlib into the cache", log=cache.log_path("plot")) as step:
        command = [sys.executable, "-m", "pip", "install", "--no-input", "--no-cache-dir", "--target", directory, "matplotlib"]
        if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0:
            raise ui.Error("the plot needs matplotlib: 'apt-get install python3-matplotlib', then run this again "
                           "(out/bench.json is there)")
        step.run(command)


def draw(results, title, path):
    """Writes path.svg and path.png."""
    matplotlib = _import_matplotlib()
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "rmmu", "font.size": 8, "svg.fonttype": "none"})
    from matplotlib import pyplot

    rows = results[::-1]
    ratios = [item["ratio"] for item in rows]
    figure, axes = pyplot.subplots(figsize=(8.5, 0.9 + 0.19 * len(rows)))
    axes.barh(range(len(rows)), ratios, color=[BETTER if ratio <= 1 else WORSE for ratio in ratios], height=0.7)
    axes.axvline(1.0, color=LINE, linewidth=0.8)
    for place, ratio in enumerate(ratios):
        axes.text(ratio + 0.01, place, f"{ratio:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [item["row"] for item in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, max(1.15, max(ratios) + 0.1))
    axes.set_xlabel(title)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 140})):
        figure.savefig(path.with_suffix(suffix), **options)
    pyplot.close(figure)

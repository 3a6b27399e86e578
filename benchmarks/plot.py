"""Draws the report: for each shape, how many times as fast as each rival fastbn is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .measure import Row
from .shapes import BN_ADD_RELU, BN_RELU
from .summary import SpeedUp, speed_ups

STYLES = {
    "eager": {"color": "tab:green", "marker": "o"},
    "compile": {"color": "tab:purple", "marker": "D"},
    "cooperative": {"color": "tab:red", "marker": "s"},
}
METHODS = {"graph": "CUDA graph, no launch gaps", "calls": "ordinary calls, launch gaps included"}


def draw(title: str, rows: Iterable[Row], path: Path) -> None:
    """Draws forward and backward of BN+ReLU and BN+add+ReLU, against all rivals, to a PNG.

    It shows times without the gaps between launches, if these were measured.
    """
    found = [one for one in speed_ups(rows) if one.direction == "forward+backward"]
    method = "graph" if any(one.method == "graph" for one in found) else "calls"
    found = [one for one in found if one.method == method]
    panels = [[one for one in found if one.epilogue == e.name] for e in (BN_RELU, BN_ADD_RELU)]
    heights = [max(1, len({one.shape_key for one in panel})) for panel in panels]
    figure = Figure(figsize=(9, 2.5 + 0.22 * sum(heights)), layout="constrained")
    figure.suptitle(f"{title}\nforward + backward, {METHODS[method]}")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    for axis, panel, epilogue in zip(axes, panels, (BN_RELU, BN_ADD_RELU), strict=True):
        _panel(axis, panel, epilogue.name)
    axes[1].set_xlabel("times as fast as the rival (left of the line: slower)")
    # The legend is outside of the panels, where its marks can't be taken for figures.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def _panel(axis, panel: list[SpeedUp], name: str) -> None:
    shapes = list(dict.fromkeys(one.shape_key for one in panel))
    for rival, style in STYLES.items():
        points = [one for one in panel if one.against == rival]
        heights = [shapes.index(one.shape_key) for one in points]
        axis.plot(
            [one.factor for one in points], heights, linestyle="", label=f"against {rival}", **style
        )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_title(name, loc="left")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_yticks(range(len(shapes)), [" ".join(key) for key in shapes], fontsize=8)
    axis.set_ylim(max(1, len(shapes)) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)

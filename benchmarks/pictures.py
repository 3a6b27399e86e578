"""Draws the README's pictures: the traffic of a training step, and the timeline of tickets.

    python -m benchmarks.pictures

The numbers are the planner's, the order of tickets is the kernels' own, and nothing in
them was measured.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastbn.kernels.device import H100
from fastbn.kernels.schedules import ticketed, two_pass
from fastbn.kernels.tickets import work_of

from .plans import problem_of
from .shapes import BN_ADD_RELU, BN_RELU, Case, Epilogue

IMAGES = Path(__file__).parent / "images"

# The numbers of tensors that PyTorch's own kernels read and write, forward and backward, with a
# kernel for each operation. Batch norm's forward reads the input twice, and its backward reads the
# input and the output's gradient twice. The gradient of an addition is that of its output, for
# which no kernel runs.
EAGER = {"batch norm": (3, 5), "add": (3, 0), "ReLU": (2, 3)}

BLUE, ORANGE, GRAY = "#2a6fbb", "#e08a1e", "#8a8a8a"


def traffic(epilogue: Epilogue) -> dict[str, tuple[float, float]]:
    """Returns the units of traffic, forward and backward, of a training step of one layer.

    A unit is one tensor read or written once. Packed sign bits of 16-bit tensors count as
    the fraction of a tensor that they are.
    """
    problem = problem_of(Case("", (256, 256, 56, 56), "channels-first", "bfloat16", epilogue))
    operations = ["batch norm", *["add"] * epilogue.residual, *["ReLU"] * epilogue.relu]
    eager = [EAGER[operation] for operation in operations]
    return {
        "eager PyTorch": (sum(f for f, _ in eager), sum(b for _, b in eager)),
        "fastbn, two passes": _units(two_pass, problem),
        "fastbn, one pass": _units(ticketed, problem),
    }


def _units(strategy, problem) -> tuple[float, float]:
    forward, backward = (strategy(problem, H100, backward).units for backward in (False, True))
    return forward, backward


def draw_traffic(path: Path) -> None:
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, epilogue in zip(axes, (BN_RELU, BN_ADD_RELU)):
        for place, (forward, backward) in enumerate(traffic(epilogue).values()):
            for left, units, color in ((0, forward, BLUE), (forward, backward, ORANGE)):
                bar = axis.barh(place, units, left=left, color=color, height=0.65)
                axis.bar_label(bar, [f"{units:.3g}"], label_type="center", color="white")
        axis.set_title(epilogue.name, loc="left")
        axis.set_yticks(range(3), traffic(epilogue))
        axis.set_xticks(range(0, 17, 4))
        axis.set_xlabel("tensors read or written in a training step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles = [Patch(color=BLUE, label="forward"), Patch(color=ORANGE, label="backward")]
    axes[1].legend(handles=handles, loc="lower right", frameon=False)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Work:
    """What one program does between two draws of tickets.

    The unit of time is what a ticket to reduce takes.
    """

    program: int
    applies: bool
    slice: int
    drawn: float
    start: float
    end: float


# The launch is so small that all of it is seen.
PROGRAMS, SLICES, SLICE_GROUPS, SPLITS = 8, 4, 2, 6

# A ticket to apply reads from the cache and writes to memory.
APPLY_SECONDS = 0.8


def timeline() -> list[Work]:
    """Returns the work of all programs, which draw tickets in turn and wait for flags to apply."""
    free = [0.03 * program for program in range(PROGRAMS)]
    reduced: dict[int, float] = {}
    found = []
    for ticket in range(2 * SLICES * SLICE_GROUPS * SPLITS):
        applies, group, _, _ = work_of.fn(ticket, SLICES, SLICE_GROUPS, 1, SPLITS)
        program = min(range(PROGRAMS), key=free.__getitem__)
        drawn = free[program]
        start = max(drawn, reduced[group]) if applies else drawn
        # Memory doesn't serve all programs at the same speed, so that times differ a little.
        end = start + (APPLY_SECONDS if applies else 1.0) * (1 + 0.02 * (ticket * 7 % 5))
        if not applies:
            reduced[group] = max(end, reduced.get(group, 0.0))
        free[program] = end
        found.append(Work(program, bool(applies), int(group) // SLICE_GROUPS, drawn, start, end))
    return found


def draw_timeline(path: Path) -> None:
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axis = figure.subplots()
    colors = ["#2a6fbb", "#e08a1e", "#3a9a5b", "#a2509c"]
    for work in timeline():
        color = colors[work.slice % len(colors)]
        axis.barh(
            work.program, work.end - work.start, left=work.start, height=0.8, edgecolor="white",
            color=color, alpha=0.45 if work.applies else 1.0,
            hatch="//" if work.applies else None,
        )  # fmt: skip
    axis.invert_yaxis()
    axis.set_yticks(range(PROGRAMS), [f"program {program}" for program in range(PROGRAMS)])
    axis.set_xlabel("time")
    axis.set_xticks([])
    axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=color, label=f"slice {slice}") for slice, color in enumerate(colors)]
    handles += [
        Patch(facecolor=GRAY, label="reduce: read from memory"),
        Patch(
            facecolor=GRAY, alpha=0.45, hatch="//", edgecolor="white",
            label="apply: read from the cache, write",
        ),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder (%(default)s)")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    draw_traffic(out / "traffic.png")
    draw_timeline(out / "tickets.png")
    print(f"wrote {out / 'traffic.png'} and {out / 'tickets.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

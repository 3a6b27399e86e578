"""Checks one rival on one case, then times it in every direction and by every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .check import worst_error
from .command_line import in_one_line
from .inputs import Inputs
from .plans import floor_units
from .rivals import DIRECTIONS, RIVALS, forward_backward
from .shapes import Case
from .timing import Timing, captured, clock_of, peak_memory, time_rounds

METHODS = ("calls", "graph")


@dataclass(frozen=True)
class Row:
    """One figure, and what was measured.

    Attributes:
        network, shape, layout, dtype, epilogue: the case.
        direction: "forward" (of a training step) or "forward+backward".
        method: "calls", which includes the gaps between launches, or "graph", the replay of
            a CUDA graph, which has no gaps.
        rival: the implementation that computes.
        median_us: microseconds per call, median of many rounds.
        spread: interquartile range of the rounds as a fraction of the median.
        gb_per_s: `Case.floor_bytes` per second, in 1e9 bytes.
        fraction_of_copy: `gb_per_s` as a fraction of the copy bandwidth measured on this
            machine; None if that could not be measured.
        fraction_of_one_pass, fraction_of_two_pass: the same fraction, but for the bytes that
            fastbn's kernels move in one pass, or in two.
        peak_memory: bytes that forward and backward need on top of the inputs; None in rows
            of other directions and without a GPU.
        correct: whether the results are within tolerance of float64.
    """

    network: str
    shape: str
    layout: str
    dtype: str
    epilogue: str
    direction: str
    method: str
    rival: str
    median_us: float
    spread: float
    gb_per_s: float
    fraction_of_copy: float | None
    fraction_of_one_pass: float | None
    fraction_of_two_pass: float | None
    peak_memory: int | None
    correct: bool


@dataclass(frozen=True)
class Machine:
    """The device to measure on, and its copy bandwidth in bytes per second if that is known."""

    device: torch.device
    copy_bandwidth: float | None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def fraction(self, bytes: float, timing: Timing) -> float | None:
        """Returns the time of bytes at the copy bandwidth, as a fraction of the time measured."""
        return self.copy_bandwidth and bytes / self.copy_bandwidth / timing.median


def measure(
    case: Case, name: str, sets: list[Inputs], machine: Machine, note: Callable[[str], None],
    methods: Sequence[str] = METHODS, directions: Sequence[str] = tuple(DIRECTIONS),
) -> Iterator[Row]:  # fmt: skip
    """Checks and times one rival, and yields its rows.

    Args:
        case: the case to measure.
        name: the rival's name in `RIVALS`.
        sets: the inputs, which calls take in turn.
        machine: the machine to measure on.
        note: called with a text if a direction can't be captured in a graph.
        methods: the methods of timing; "graph" is left out without a GPU.
        directions: the directions to time.

    Raises:
        ArithmeticError: the rival is wrong. Its rows come first, with `correct` False.
    """
    rival = RIVALS[name](case, machine.device)
    error = worst_error(case, rival, sets[0])
    memory = peak_memory(partial(forward_backward, rival, sets[0])) if machine.gpu else None
    for direction in directions:
        play = partial(DIRECTIONS[direction], rival, sets)
        plays = {"calls": play}
        if machine.gpu and "graph" in methods:
            try:
                plays["graph"] = captured(play)
            except Exception as problem:
                note(f"{case}, {name}, {direction}: no CUDA graph: {in_one_line(problem)}")
        one_pass, two_pass = (u * case.tensor_bytes for u in floor_units(case, direction))
        bytes = case.floor_bytes(direction)
        for method in [method for method in methods if method in plays]:
            timing = time_rounds(plays[method], len(sets), clock_of(machine.device))
            yield Row(
                **case.labels,
                direction=direction,
                method=method,
                rival=name,
                median_us=timing.median * 1e6,
                spread=timing.spread,
                gb_per_s=bytes / timing.median / 1e9,
                fraction_of_copy=machine.fraction(bytes, timing),
                fraction_of_one_pass=machine.fraction(one_pass, timing),
                fraction_of_two_pass=machine.fraction(two_pass, timing),
                peak_memory=memory if direction == "forward+backward" else None,
                correct=error <= 1,
            )
    if error > 1:
        raise ArithmeticError(f"error is {error:.3g} times what is allowed")

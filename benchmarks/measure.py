"""One rival on one case: checked, then timed in every direction and by every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from .check import worst_error
from .inputs import Inputs
from .rivals import DIRECTIONS, RIVALS, forward_backward, in_one_line
from .shapes import Case
from .timing import captured, clock_of, one_round, peak_memory, time_rounds


@dataclass(frozen=True)
class Row:
    """One figure, and all that it is a figure of.

    Attributes:
        network, shape, layout, dtype, epilogue: of the case.
        direction: "forward" (of a training step) or "forward+backward".
        method: "calls", as a program makes them, launch gaps included; or
            "graph", replayed from a CUDA graph, without.
        rival: who computes.
        median_us: microseconds per call, median of many rounds.
        spread: interquartile range of the rounds as a fraction of the median.
        gb_per_s: 1e9 bytes per second, of `Case.floor_bytes`.
        fraction_of_copy: of the copy bandwidth measured on this machine; None
            if that could not be measured.
        peak_memory: bytes of forward and backward on top of the inputs; None
            in other rows and without a GPU.
        correct: within tolerance of float64.
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
    peak_memory: int | None
    correct: bool


@dataclass(frozen=True)
class Machine:
    """Where to measure; copy_bandwidth in bytes per second, None if unknown."""

    device: torch.device
    copy_bandwidth: float | None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


def measure(
    case: Case, name: str, sets: list[Inputs], machine: Machine, note: Callable[[str], None]
) -> Iterator[Row]:
    """Checks and times one rival; `note` is told of what can't be captured.

    Raises:
        ArithmeticError: the rival is wrong. Its rows, marked, come first.
    """
    rival = RIVALS[name](case, machine.device)
    error = worst_error(case, rival, sets[0])
    memory = peak_memory(partial(forward_backward, rival, sets[0])) if machine.gpu else None
    for direction, step in DIRECTIONS.items():
        play = one_round(partial(step, rival), sets)
        plays = {"calls": play}
        if machine.gpu:
            try:
                plays["graph"] = captured(play)
            except Exception as problem:
                note(f"{case}, {name}, {direction}: no CUDA graph: {in_one_line(problem)}")
        for method, play in plays.items():
            timing = time_rounds(play, len(sets), clock_of(machine.device))
            rate = case.floor_bytes(direction) / timing.median
            yield Row(
                network=case.network,
                shape=case.shape,
                layout=case.layout,
                dtype=case.dtype,
                epilogue=case.epilogue.name,
                direction=direction,
                method=method,
                rival=name,
                median_us=timing.median * 1e6,
                spread=timing.spread,
                gb_per_s=rate / 1e9,
                fraction_of_copy=machine.copy_bandwidth and rate / machine.copy_bandwidth,
                peak_memory=memory if direction == "forward+backward" else None,
                correct=error <= 1,
            )
    if error > 1:
        raise ArithmeticError(f"error is {error:.3g} times what is allowed")

"""What the planner should know of this GPU, measured: the line for `kernels/device.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from fastbn.kernels.tiling import PROGRAMS_PER_SM

from . import probes
from .timing import CudaClock, captured, time_rounds

WIDTHS = (32, 64, 128, 256)

# Slices of columns are a quarter of the cache, as those of the ticketed kernels
# are that have two in half of it: what neighbours share is found there again.
SLICE_SHARE = 1 / 4

# Of the cache: slices that are copied, and what surely stays in it.
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1, 5 / 4, 3 / 2)
SURE_SHARE = 1 / 8

# What is copied, slice by slice, and how often what stays is read.
COPY_BYTES = 2**30
VISITS = 256

# A slice counts as kept that is read again at this multiple of memory's speed.
KEPT_SPEED = 1.5

LAUNCHES = 256


@dataclass(frozen=True)
class Copy:
    """Seconds to copy memory in slices that are read once, or twice, and their share of the cache.

    Attributes:
        speed: of reading again, as a multiple of memory's: copying is two
            units of traffic, so half of `once` is what one takes.
    """

    share: float
    once: float
    twice: float

    @property
    def speed(self) -> float:
        again = self.twice - self.once
        return self.once / 2 / again if again > 0 else math.inf


def device_facts(
    device: torch.device, environment: dict, bandwidth: float | None,
    attempt: Callable[[str, Callable[[], None]], None],
) -> dict:  # fmt: skip
    """Measures all that can be; what fails is left out, for `Device` has its assumptions.

    Returns:
        "line", to paste; the facts, by their names in `Device`; "copies", from
        which `l2_share` was found.
    """
    l2_bytes, sm_count = environment["l2_bytes"], environment["multiprocessors"]
    found = {"sm_count": sm_count, "l2_bytes": l2_bytes, "bandwidth": bandwidth}
    copies: list[Copy] = []

    def kept() -> None:
        copies.extend(copies_in_slices(device, l2_bytes))
        found["l2_share"] = share_kept(copies)

    attempt("device facts, l2_share", kept)
    attempt("device facts, l2_speed", lambda: found.update(l2_speed=l2_speed(device, l2_bytes)))
    attempt("device facts, row_rates", lambda: found.update(row_rates=row_rates(device, l2_bytes)))
    attempt("device facts, launch", lambda: found.update(launch=launch(device, sm_count)))
    found = {name: value for name, value in found.items() if value is not None}
    line = as_line(environment["gpu"], found)
    return {"line": line, **found, "copies": [asdict(copy) for copy in copies]}


def as_line(name: str, facts: dict) -> str:
    """The `Device` of these facts, as Python."""
    known = "".join(f", {fact}={_literal(value)}" for fact, value in facts.items())
    return f'Device("{name}"{known})'


def _literal(value: float | Sequence) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def row_rates(device: torch.device, l2_bytes: int) -> tuple[tuple[int, float], ...]:
    """Speed of reading slices of a matrix, as a fraction of that of whole rows.

    All read as many bytes: a matrix that is half as high is read twice.
    """
    slice_bytes = _whole_tiles(l2_bytes * SLICE_SHARE)
    tallest = slice_bytes // min(WIDTHS)
    matrix = _numbers(tallest * probes.ROW_BYTES, device).view(tallest, -1)

    def took(rows: int, width: int) -> float:
        return seconds(lambda: probes.read_slices(matrix[:rows], width, tallest // rows))

    whole = took(tallest, probes.ROW_BYTES)
    return tuple((width, min(1.0, whole / took(slice_bytes // width, width))) for width in WIDTHS)


def copies_in_slices(device: torch.device, l2_bytes: int) -> list[Copy]:
    """Copies in slices of many sizes, the smallest first."""

    def copy(share: float) -> Copy:
        slice_bytes = _whole_tiles(l2_bytes * share)
        source = _numbers(max(1, COPY_BYTES // slice_bytes) * slice_bytes, device)
        target = torch.empty_like(source)
        plays = (
            partial(probes.copy_slices, source, target, slice_bytes, reads) for reads in (1, 2)
        )
        return Copy(share, *map(seconds, plays))

    return [copy(share) for share in sorted(SHARES)]


def share_kept(copies: Sequence[Copy]) -> float:
    """Share of the cache that can be counted on: of copies in ever larger slices, all up to it."""
    share = 0.0
    for copy in copies:
        if copy.speed < KEPT_SPEED:
            break
        share = copy.share
    return min(1.0, share)


def l2_speed(device: torch.device, l2_bytes: int) -> float:
    """Speed of reading what is in the cache, as a multiple of reading from memory."""

    def bytes_per_second(bytes: int, visits: int) -> float:
        matrix = _numbers(bytes, device).view(-1, probes.TILE)
        took = seconds(lambda: probes.read_slices(matrix, probes.TILE_BYTES, visits))
        return visits * bytes / took

    memory = bytes_per_second(COPY_BYTES, 1)
    return bytes_per_second(_whole_tiles(l2_bytes * SURE_SHARE), VISITS) / memory


def launch(device: torch.device, sm_count: int) -> float:
    """Seconds from one launch to the next of a kernel that does next to nothing."""
    flags = torch.empty(PROGRAMS_PER_SM * sm_count, dtype=torch.int32, device=device)

    def play() -> None:
        for _ in range(LAUNCHES):
            probes.touch(flags)

    return seconds(play) / LAUNCHES


def seconds(play: Callable[[], object]) -> float:
    """Median, without gaps between launches."""
    return time_rounds(captured(play), 1, CudaClock).median


def _whole_tiles(bytes: float) -> int:
    return int(bytes) // probes.TILE_BYTES * probes.TILE_BYTES


def _numbers(bytes: int, device: torch.device) -> Tensor:
    """Random ones, as clocks depend on the data."""
    count = bytes // probes.ITEMSIZE
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=device)

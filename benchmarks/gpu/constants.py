"""Measures what the planner assumes of this GPU, and writes the line for `kernels/device.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from fastbn.kernels.tiling import MERGE_ELEMENTS, PROGRAMS_PER_SM, power_of_2

from ..timing import captured, clock_of, time_rounds
from . import probes
from .step import Context

WIDTHS = (32, 64, 128, 256)

# Slices of columns are a quarter of the cache, as in the ticketed kernels, which have two slices in
# half of it. A program then finds in the cache what it shares with its neighbours.
SLICE_SHARE = 1 / 4

# Slices are copied whose sizes are these shares of the cache; data of SURE_SHARE surely stay in it.
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1, 5 / 4, 3 / 2)
SURE_SHARE = 1 / 8

# A slice counts as kept in the cache if it is read again at this multiple of memory's speed.
KEPT_SPEED = 1.5

# So many partial results, of so many channels, are merged.
SPLITS = (16, 64, 256, 1024)
MERGED_CHANNELS = (1, 64)


@dataclass(frozen=True)
class Effort:
    """How much work is done to measure a constant.

    Attributes:
        copy_bytes: bytes that are copied slice by slice.
        visits: how often data that stay in the cache are read.
        launches: launches of a kernel that does next to nothing.
        tickets: tickets that programs draw.
        flags: flags that programs raise one after the other.
        places: places of the linked list that is followed through memory.
        steps: steps along the list.
    """

    copy_bytes: int = 2**30
    visits: int = 256
    launches: int = 256
    tickets: int = 2**16
    flags: int = 4096
    places: int = 2**26
    steps: int = 1024


TINY = Effort(2**16, 2, 4, 8, 8, 2**10, 16)
TINY_L2 = 2**15


@dataclass(frozen=True)
class Copy:
    """The times of copying memory in slices of one size.

    Attributes:
        share: size of a slice as a fraction of the cache.
        once, twice: seconds if each slice is read once, or twice.
        speed: speed of the second reading, as a multiple of memory's. A copy is two units of
            traffic, so that half of `once` is the time of one unit from memory.
    """

    share: float
    once: float
    twice: float

    @property
    def speed(self) -> float:
        again = self.twice - self.once
        return self.once / 2 / again if again > 0 else math.inf


def run(context: Context) -> None:
    environment = context.known.get("environment", {})
    if context.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        name, sm_count, l2_bytes = gpu.name, gpu.multi_processor_count, gpu.L2_cache_size
        effort = Effort()
    else:
        name, sm_count, l2_bytes, effort = environment.get("platform", "CPU"), 1, TINY_L2, TINY
    constants = Constants(context.device, sm_count, l2_bytes, effort)
    found = {
        "sm_count": sm_count, "l2_bytes": l2_bytes, "bandwidth": context.known.get("bandwidth"),
    }  # fmt: skip

    def of_device(constant: str) -> None:
        found[constant] = getattr(constants, constant)()
        context.record("constant", name=constant, value=found[constant])

    def other(constant: str) -> None:
        context.record("constant", name=constant, value=getattr(constants, constant)())

    of_devices = (
        "launch", "latency", "cache_latency", "ticket", "row_rates", "l2_speed", "l2_share",
    )  # fmt: skip
    for constant in of_devices:
        context.attempt(constant, partial(of_device, constant))
    for constant in ("program", "hand_over", "merge_seconds", "l2_share_without_hints"):
        context.attempt(constant, partial(other, constant))
    for hints, copies in constants.copies.items():
        context.record("copies", hints=hints, copies=[asdict(copy) for copy in copies])
    known = {fact: value for fact, value in found.items() if value is not None}
    context.record("device", line=as_line(name, known))


def as_line(name: str, facts: dict) -> str:
    """Returns the Python code of a `Device` with these facts."""
    known = "".join(f", {fact}={_literal(value)}" for fact, value in facts.items())
    return f'Device("{name}"{known})'


def _literal(value: float | Sequence) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_literal, value))})"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


class Constants:
    """Measures each constant of a device, in the units that `Device` has."""

    def __init__(self, device: torch.device, sm_count: int, l2_bytes: int, effort: Effort) -> None:
        self.device, self.sm_count, self.l2_bytes = device, sm_count, l2_bytes
        self.effort = effort
        self.copies: dict[bool, list[Copy]] = {}

    def launch(self) -> float:
        """Returns the time from one launch to the next of a kernel that does next to nothing."""
        flags = self._zeros(PROGRAMS_PER_SM * self.sm_count, torch.int32)

        def play() -> None:
            for _ in range(self.effort.launches):
                probes.touch(flags)

        return self.seconds(play) / self.effort.launches

    def latency(self) -> float:
        """Returns the time of a load that depends on the one before, from memory."""
        return self._step(self.effort.places)

    def cache_latency(self) -> float:
        """Returns the time of a load that depends on the one before, from the cache."""
        itemsize = torch.int32.itemsize
        return self._step(min(self.effort.places, power_of_2(self.l2_bytes // itemsize // 4)))

    def _step(self, places: int) -> float:
        steps = self.effort.steps
        # An odd stride visits all 2^n places before it returns to the first one. It is so long that
        # each place is in another cache line than the one before.
        stride = int(places * 0.382) | 1
        order = (torch.arange(places, device=self.device) + stride) % places
        next, end = order.to(torch.int32), self._zeros(1, torch.int32)
        few = self.seconds(lambda: probes.chase(next, end, steps))
        many = self.seconds(lambda: probes.chase(next, end, 2 * steps))
        return max(0.0, many - few) / steps

    def ticket(self) -> float:
        """Returns the time for each of many programs that draw a ticket and do nothing else."""
        return self._draws(atomic=True)

    def program(self) -> float:
        """Returns the time for each of many programs that do next to nothing, without a ticket."""
        return self._draws(atomic=False)

    def _draws(self, atomic: bool) -> float:
        tickets = self._zeros(1, torch.int64)
        drawn = self._zeros(self.effort.tickets, torch.int32)
        seconds = self.seconds(lambda: probes.draw(tickets, drawn, atomic))
        return seconds / self.effort.tickets

    def hand_over(self) -> float:
        """Returns the time from raising a flag until a program that waits for it raises another."""
        tickets = self._zeros(1, torch.int64)
        flags = self._zeros(self.effort.flags, torch.int64)
        return self.seconds(lambda: probes.relay(tickets, flags)) / self.effort.flags

    def merge_seconds(self) -> list[tuple[int, int, float]]:
        """Returns (channels, splits, seconds) of launches that merge so many partial results."""
        found = []
        for channels in MERGED_CHANNELS:
            for splits in SPLITS:
                means = torch.randn(splits, channels, device=self.device)
                at_once = MERGE_ELEMENTS // channels
                play = partial(probes.merge, means, means.square(), 64, at_once)
                found.append((channels, splits, self.seconds(play)))
        return found

    def row_rates(self) -> tuple[tuple[int, float], ...]:
        """Returns the speed of reading slices of a matrix, as a fraction of that of whole rows.

        All widths read the same number of bytes: a matrix with half as many rows is read twice.
        """
        slice_bytes = _whole_tiles(self.l2_bytes * SLICE_SHARE)
        tallest = slice_bytes // min(WIDTHS)
        matrix = self._numbers(tallest * probes.ROW_BYTES).view(tallest, -1)

        def took(rows: int, width: int) -> float:
            return self.seconds(lambda: probes.read_slices(matrix[:rows], width, tallest // rows))

        whole = took(tallest, probes.ROW_BYTES)
        return tuple(
            (width, min(1.0, whole / took(slice_bytes // width, width))) for width in WIDTHS
        )

    def l2_speed(self) -> float:
        """Returns the speed of reading from the cache, as a multiple of reading from memory."""

        def bytes_per_second(bytes: int, visits: int) -> float:
            matrix = self._numbers(bytes).view(-1, probes.TILE)
            took = self.seconds(lambda: probes.read_slices(matrix, probes.TILE_BYTES, visits))
            return visits * bytes / took

        memory = bytes_per_second(self.effort.copy_bytes, 1)
        cached = bytes_per_second(_whole_tiles(self.l2_bytes * SURE_SHARE), self.effort.visits)
        return cached / memory

    def l2_share(self) -> float:
        """Returns the share of the cache that holds data until they are read again."""
        return share_kept(self.copies_in_slices(hints=True))

    def l2_share_without_hints(self) -> float:
        """Returns this share if the cache isn't told what is read again."""
        return share_kept(self.copies_in_slices(hints=False))

    def copies_in_slices(self, hints: bool) -> list[Copy]:
        """Times copies in slices of many sizes, the smallest first."""

        def copy(share: float) -> Copy:
            slice_bytes = _whole_tiles(self.l2_bytes * share)
            source = self._numbers(max(1, self.effort.copy_bytes // slice_bytes) * slice_bytes)
            target = torch.empty_like(source)
            plays = (
                partial(probes.copy_slices, source, target, slice_bytes, reads, hints)
                for reads in (1, 2)
            )
            return Copy(share, *map(self.seconds, plays))

        self.copies[hints] = [copy(share) for share in sorted(SHARES)]
        return self.copies[hints]

    def seconds(self, play) -> float:
        """Returns the median time, on a GPU of a graph, which has no gaps between launches."""
        play = captured(play) if self.device.type == "cuda" else play
        return time_rounds(play, 1, clock_of(self.device)).median

    def _zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=self.device)

    def _numbers(self, bytes: int) -> Tensor:
        """Returns random numbers, since clocks depend on the data; sums of a tile fit 32 bits."""
        count, most = bytes // probes.ITEMSIZE, 2**31 // probes.TILE
        return torch.randint(-most, most, (count,), dtype=torch.int32, device=self.device)


def share_kept(copies: Sequence[Copy]) -> float:
    """Returns the share of the cache up to which slices of all sizes were kept."""
    share = 0.0
    for copy in copies:
        if copy.speed < KEPT_SPEED:
            break
        share = copy.share
    return min(1.0, share)


def _whole_tiles(bytes: float) -> int:
    return max(1, int(bytes) // probes.TILE_BYTES) * probes.TILE_BYTES

"""The planner makes every launch decision before a launch, from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from .device import Device
from .tiling import (
    MASK_BITS,
    PROGRAMS_PER_SM,
    Problem,
    Tile,
    apply_tile,
    power_of_2,
    reduce_tile,
    resident_fits,
    resident_tile,
)

# The last program to arrive merges one partial result of each split, alone, so splits are
# limited. They are limited further where 31 bits could not count all partial results.
MAX_SPLITS = 1024
MAX_PARTIALS = 2**31 - 1
MERGE_ELEMENTS = 2048

# Partial results are written and read once more, so their bytes may be at most this fraction
# of the bytes that they sum up.
PARTIALS_SHARE = 1 / 32
PARTIAL_BYTES = 8

# Two slices are in the cache at once. A slice needs this many tickets for each running
# program, or the programs that apply a slice would wait for the ones that reduce it.
SLICES_IN_CACHE = 2
TICKETS_PER_PROGRAM = 2

# With channels last, a slice is at least this wide: short pieces of rows are read slowly.
# The first width is preferred, and slices grow to WIDE_BYTES where the cache has room.
SLICE_BYTES = (128, 64)
WIDE_BYTES = 256

# This bandwidth stands in for an unknown one, only to choose between strategies.
UNKNOWN_BANDWIDTH = 1e12


@dataclass(frozen=True)
class Pass:
    """One pass over the data that reduces it to values of channels.

    Attributes:
        tile: the tile that a program handles at once.
        splits: number of programs that share a channel block.
        merge: number of partial results of a channel block that are merged at a time.
    """

    tile: Tile
    splits: int
    merge: int

    def programs(self, problem: Problem) -> int:
        """Returns how many programs the pass has: so many splits of each channel block."""
        return self.splits * self.tile.grid(problem)[1]


@dataclass(frozen=True)
class Schedule:
    """How one direction of a problem runs.

    Attributes:
        strategy: "two-pass" (statistics, then normalisation), "ticketed" (the
            same in one launch, slice by slice through the cache), "resident"
            (one program keeps a channel block in registers in between) or
            "fixed-stats" (one pass, because the statistics are given).
        reduce: the pass that reduces to channels: the first of two passes, the only
            pass of a backward with fixed statistics, or both phases of a ticketed
            launch. Resident kernels and a forward with fixed statistics don't use it.
        apply: the tile of the elementwise pass. It is also the tile of a resident
            kernel and of a forward with fixed statistics.
        slice_blocks: number of channel blocks in a slice of a ticketed launch.
        launches: number of kernels launched.
        units: number of tensors read or written; a packed mask counts as the fraction
            of a tensor that it is. Of a ticketed launch, these units cross memory.
        cached_units: further units that a ticketed launch reads from the cache.
        seconds: the predicted time.
    """

    strategy: str
    reduce: Pass
    apply: Tile
    slice_blocks: int
    launches: int
    units: float
    cached_units: float
    seconds: float

    @property
    def tile(self) -> Tile:
        """Returns the tile of the first pass; a second pass has accesses of the same width."""
        return self.apply if self.strategy == "resident" else self.reduce.tile

    def tickets(self, problem: Problem) -> int:
        """Returns the programs of a ticketed launch, which has two phases for each slice."""
        slices = -(-self.reduce.tile.grid(problem)[1] // self.slice_blocks)
        return 2 * slices * self.slice_blocks * self.reduce.splits


@dataclass(frozen=True)
class Plan:
    """The schedules of a forward and its backward."""

    problem: Problem
    forward: Schedule
    backward: Schedule


def make_plan(problem: Problem, device: Device, strategy: str = "auto") -> Plan:
    """Plans both directions of a problem on a device."""
    return Plan(
        problem,
        make_schedule(problem, device, False, strategy),
        make_schedule(problem, device, True, strategy),
    )


@lru_cache(maxsize=4096)
def make_schedule(
    problem: Problem, device: Device, backward: bool, strategy: str = "auto"
) -> Schedule:
    """Plans one direction of a problem on a device.

    A strategy other than "auto" is taken where it can serve, and two passes elsewhere.
    """
    found = schedules(problem, device, backward)
    if strategy == "auto" or not problem.training:
        return choose(found)
    return found.get(strategy, found["two-pass"])


def choose(found: dict[str, Schedule]) -> Schedule:
    """Returns the schedule that is predicted to be fastest; of two equal ones, the first."""
    return min(found.values(), key=lambda schedule: schedule.seconds)


def schedules(problem: Problem, device: Device, backward: bool) -> dict[str, Schedule]:
    """Returns schedules of all strategies that can serve a direction, the simplest first."""
    if not problem.training:
        return {"fixed-stats": fixed_stats(problem, device, backward)}
    found = {"two-pass": two_pass(problem, device, backward)}
    if resident_fits(problem):
        found["resident"] = resident(problem, device, backward)
    tickets = ticketed(problem, device, backward)
    if _blocks_in_cache(problem, device, backward, tickets.reduce.tile):
        found["ticketed"] = tickets
    return found


def fixed_stats(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules one pass over the data with given statistics."""
    units = _once(problem, backward)
    seconds = device.launch + units * problem.tensor_bytes / _bandwidth(device)
    return _schedule("fixed-stats", problem, device, backward, units, seconds)


def two_pass(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules two passes.

    The second pass reads the data in reverse order, so that it finds in the cache what
    the cache kept of the first. However small the problem is, the passes take six round
    trips to memory: to load, to arrive and to merge; then to load statistics, to load
    and to store.
    """
    unit, again = problem.tensor_bytes, _reads(problem, backward)
    units = _once(problem, backward) + again
    kept = min(again * unit, device.l2_share * device.l2_bytes)
    moved = units * unit - kept + kept / device.l2_speed
    seconds = 2 * device.launch + max(moved / _bandwidth(device), 6 * device.latency)
    return _schedule("two-pass", problem, device, backward, units, seconds)


def resident(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules programs that hold a channel block in registers.

    They run in waves, and each wave takes at least a load, a reduction and a store. Few
    programs leave multiprocessors idle, and a busy one can't use the whole bandwidth.
    """
    tile, units = resident_tile(problem), _once(problem, backward)
    programs = tile.grid(problem)[1]
    # 16 warps that hold 8192 values and as many results take all registers.
    at_once = device.sm_count * (16 // tile.warps)
    busy = min(1.0, device.sm_speed * min(programs, device.sm_count) / device.sm_count)
    row = tile.c * problem.itemsize if problem.s == 1 else problem.s * problem.itemsize
    rate = _bandwidth(device) * busy * device.row_rate(row)
    waves = -(-programs // at_once)
    seconds = device.launch + max(units * problem.tensor_bytes / rate, 3 * waves * device.latency)
    return _schedule("resident", problem, device, backward, units, seconds, apply=tile)


def ticketed(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules one launch that reads each slice from memory once and from the cache once.

    Cache and memory work at the same time. The last programs to apply wait for the last
    to reduce; if slices have few tickets, the programs of every slice wait.
    """
    unit, again = problem.tensor_bytes, _reads(problem, backward)
    units, reads = _once(problem, backward), 2 if backward else 1
    for row_bytes in SLICE_BYTES:
        tile = reduce_tile(problem, device, reads, row_bytes)
        in_cache = _blocks_in_cache(problem, device, backward, tile)
        if in_cache:
            break
    n_tiles, blocks, s_tiles = tile.grid(problem)
    tiles = n_tiles * s_tiles
    summed = tile.elements * problem.itemsize * reads
    share = max(
        ceil(PARTIAL_BYTES * tile.c / (summed * PARTIALS_SHARE)),
        ceil(tiles / _max_splits(problem)),
    )
    splits = ceil(tiles / share)

    at_once = PROGRAMS_PER_SM * device.sm_count
    wanted = -(-TICKETS_PER_PROGRAM * at_once // splits)
    if problem.s == 1:
        wanted = max(wanted, WIDE_BYTES // (tile.c * problem.itemsize))
    slices = -(-blocks // max(1, min(wanted, in_cache)))
    slice_blocks = -(-blocks // slices)

    row = slice_blocks * tile.c * problem.s * problem.itemsize
    memory = units * unit / (_bandwidth(device) * device.row_rate(row))
    cache = (units + again) * unit / (_bandwidth(device) * device.l2_speed)
    counters = 2 * slices * slice_blocks * splits * device.ticket
    waits = slices if slice_blocks * splits < at_once else 1
    seconds = device.launch + max(memory, cache, counters) + 4 * waits * device.latency
    return _schedule(
        "ticketed", problem, device, backward, units, seconds,
        reduce=_pass(problem, tile, splits), slice_blocks=slice_blocks, cached_units=again,
    )  # fmt: skip


def _blocks_in_cache(problem: Problem, device: Device, backward: bool, tile: Tile) -> int:
    """Returns how many channel blocks a slice may have for the cache to hold two slices."""
    channels = min(tile.c, problem.c)
    block_bytes = channels * problem.n * problem.s * problem.itemsize * _reads(problem, backward)
    return int(device.l2_share * device.l2_bytes / (SLICES_IN_CACHE * block_bytes))


def _schedule(
    strategy: str, problem: Problem, device: Device, backward: bool, units: float, seconds: float,
    reduce: Pass | None = None, apply: Tile | None = None, slice_blocks: int = 0,
    cached_units: float = 0,
) -> Schedule:  # fmt: skip
    reads = 2 if backward else 1
    return Schedule(
        strategy=strategy,
        reduce=reduce or _filling_pass(problem, device, reads),
        apply=apply or apply_tile(problem, device, reads),
        slice_blocks=slice_blocks,
        launches=2 if strategy == "two-pass" else 1,
        units=units,
        cached_units=cached_units,
        seconds=seconds,
    )


def _filling_pass(problem: Problem, device: Device, reads: int) -> Pass:
    """Returns a pass that splits channel blocks over enough programs to fill the device."""
    tile = reduce_tile(problem, device, reads)
    n_tiles, blocks, s_tiles = tile.grid(problem)
    tiles = n_tiles * s_tiles
    wanted = -(-PROGRAMS_PER_SM * device.sm_count // blocks)
    splits = min(tiles, wanted, _max_splits(problem))
    # Make shares even: of 600 tiles, 300 programs with two each need no more time than
    # 528 programs of which some have two.
    return _pass(problem, tile, -(-tiles // -(-tiles // splits)))


def _max_splits(problem: Problem) -> int:
    return max(1, min(MAX_SPLITS, MAX_PARTIALS // problem.c))


def _pass(problem: Problem, tile: Tile, splits: int) -> Pass:
    # Sums of float64 take twice as many registers.
    rows = MERGE_ELEMENTS * 4 // (max(4, problem.itemsize) * tile.c)
    return Pass(tile, splits, merge=min(power_of_2(splits), max(1, rows)))


def _bandwidth(device: Device) -> float:
    return device.bandwidth or UNKNOWN_BANDWIDTH


def _mask(problem: Problem) -> float:
    """Returns the size of a packed mask in units, 0 if there is none."""
    return 1 / (MASK_BITS * problem.itemsize) if problem.saves == "mask" else 0


def _reads(problem: Problem, backward: bool) -> float:
    """Returns the units that statistics or sums are computed from, which two passes read twice."""
    return 2 + (problem.saves == "residual") + _mask(problem) if backward else 1


def _once(problem: Problem, backward: bool) -> float:
    """Returns the units moved if each tensor is read or written once."""
    if backward:
        return _reads(problem, backward) + 1 + (problem.saves is not None)
    return 2 + problem.residual + _mask(problem)

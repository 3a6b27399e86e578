"""The planner makes every launch decision before a launch, from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from .device import Device
from .instructions import instructions_per_element
from .passes import Pass, filling_pass, least_length, make_pass
from .tiling import (
    ACCESS_BYTES,
    MASK_BITS,
    MAX_WIDTH,
    PROGRAMS_PER_SM,
    Problem,
    Tile,
    choose_tile,
    group_width,
    resident_tile,
    warps_of,
)

# Two slices are in the cache at once. A slice needs this many tickets for each running
# program, or the programs that apply a slice would wait for the ones that reduce it. Runs have
# as many tiles as that leaves, up to a limit.
SLICES_IN_CACHE = 2
TICKETS_PER_PROGRAM = 1
MAX_RUN = 8

# With channels last, a slice is at least this wide: short pieces of rows are read slowly.
# The first width is preferred, and slices grow to WIDE_BYTES where the cache has room.
SLICE_BYTES = (128, 64)
WIDE_BYTES = 256

# The phases of a forward and of a backward, by which instructions are counted. What an access that
# is half as wide adds to them for each element is an assumption.
PHASES = (("moments", "output"), ("sums", "gradient"))
NARROW = 2.0

# One pass must be predicted to be faster than two by this fraction, for predictions err.
MARGIN = 0.05

# This bandwidth stands in for an unknown one, only to choose between strategies.
UNKNOWN_BANDWIDTH = 1e12


@dataclass(frozen=True)
class Schedule:
    """How one direction of a problem runs.

    Attributes:
        strategy: "two-pass" (statistics, then normalisation), "ticketed" (the
            same in one launch, slice by slice through the cache), "resident"
            (one program keeps a group of channels in registers in between) or
            "fixed-stats" (one pass, because the statistics are given).
        reduce: the pass that reduces to channels: the first of two passes, the only
            pass of a backward with fixed statistics, or both phases of a ticketed
            launch. Resident kernels and a forward with fixed statistics don't use it.
        apply: the elementwise pass. It is also the pass of a resident kernel and of a
            forward with fixed statistics.
        slice_groups: number of groups of channels in a slice of a ticketed launch.
        warps: number of warps of a program.
        launches: number of kernels launched.
        units: number of tensors read or written; a packed mask counts as the fraction
            of a tensor that it is. Of a ticketed launch, these units cross memory.
        cached_units: further units that a ticketed launch reads from the cache.
        seconds: the predicted time.
    """

    strategy: str
    reduce: Pass
    apply: Pass
    slice_groups: int
    warps: int
    launches: int
    units: float
    cached_units: float
    seconds: float

    @property
    def tile(self) -> Tile:
        """Returns the tile of the first pass; a second pass has accesses of the same width."""
        return (self.apply if self.strategy == "resident" else self.reduce).tile

    def tickets(self, problem: Problem) -> int:
        """Returns the tickets of a ticketed launch, which has two phases for each slice."""
        slices = -(-self.reduce.groups(problem) // self.slice_groups)
        return 2 * slices * self.slice_groups * self.reduce.tiles() * self.reduce.splits


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
    """Returns the fastest schedule, and two passes if no other one is predicted to gain enough."""
    fastest = min(found.values(), key=lambda schedule: schedule.seconds)
    safe = found.get("two-pass", fastest)
    return fastest if fastest.seconds < (1 - MARGIN) * safe.seconds else safe


def schedules(problem: Problem, device: Device, backward: bool) -> dict[str, Schedule]:
    """Returns schedules of all strategies that can serve a direction, the simplest first."""
    if not problem.training:
        return {"fixed-stats": fixed_stats(problem, device, backward)}
    found = {"two-pass": two_pass(problem, device, backward)}
    if resident_tile(problem):
        found["resident"] = resident(problem, device, backward)
    tickets = ticketed(problem, device, backward)
    columns = min(tickets.reduce.width, problem.c * problem.s)
    if columns <= _columns_in_cache(problem, device, backward):
        found["ticketed"] = tickets
    return found


def fixed_stats(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules one pass over the data with given statistics."""
    units = _once(problem, backward)
    found = _schedule("fixed-stats", problem, device, backward, units)
    phase, work = ("sums", found.reduce) if backward else ("output", found.apply)
    issue = _issue(problem, device, phase, work)
    memory = units * problem.tensor_bytes / _bandwidth(device)
    return replace(found, seconds=device.launch + max(memory, issue))


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
    found = _schedule("two-pass", problem, device, backward, units)
    first, second = PHASES[backward]
    issue = _issue(problem, device, first, found.reduce)
    issue += _issue(problem, device, second, found.apply)
    seconds = max(moved / _bandwidth(device), issue, 6 * device.latency)
    return replace(found, seconds=2 * device.launch + seconds)


def resident(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules programs that hold a group of channels in registers.

    They run in waves, and each wave takes at least a load, a reduction and a store. Few
    programs leave multiprocessors idle, and a busy one can't use the whole bandwidth.
    """
    tile, units = resident_tile(problem), _once(problem, backward)
    assert tile is not None
    only = Pass(tile, group_width(problem, tile), length=1, splits=1)
    programs = only.programs(problem)
    # 16 warps that hold 8192 values and as many results take all registers.
    at_once = device.sm_count * (16 // warps_of(tile, "resident"))
    busy = min(1.0, device.sm_speed * min(programs, device.sm_count) / device.sm_count)
    rate = _bandwidth(device) * busy * device.row_rate(only.width * problem.itemsize)
    waves = -(-programs // at_once)
    seconds = device.launch + max(units * problem.tensor_bytes / rate, 3 * waves * device.latency)
    found = _schedule("resident", problem, device, backward, units, apply=only)
    return replace(found, seconds=seconds)


def ticketed(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules one launch that reads each slice from memory once and from the cache once.

    Cache and memory work at the same time. The last programs to apply wait for the last
    to reduce; if slices have few tickets, the programs of every slice wait.
    """
    unit, again = problem.tensor_bytes, _reads(problem, backward)
    units = _once(problem, backward)
    columns = _columns_in_cache(problem, device, backward)
    for row_bytes in SLICE_BYTES:
        tile = choose_tile(problem, device, row_bytes)
        width = group_width(problem, tile, max(1, min(MAX_WIDTH, columns)))
        if min(width, problem.c * problem.s) <= columns:
            break
    groups, in_cache = -(-problem.c * problem.s // width), max(1, columns // width)

    # Runs as long as leave a slice with enough tickets, then slices no larger than that takes.
    at_once = ceil(TICKETS_PER_PROGRAM * PROGRAMS_PER_SM * device.sm_count)
    largest = ceil(groups / ceil(groups / in_cache))
    single = make_pass(problem, tile, width, 1)
    length = min(MAX_RUN, largest * single.tiles() * single.splits // at_once)
    reduce = make_pass(problem, tile, width, max(length, least_length(problem, tile, again)))
    wanted = ceil(at_once / (reduce.tiles() * reduce.splits))
    if problem.s == 1:
        wanted = max(wanted, WIDE_BYTES // (width * problem.itemsize))
    slices = max(ceil(groups / in_cache), groups // wanted)
    slice_groups = ceil(groups / slices)

    tickets = slice_groups * reduce.tiles() * reduce.splits
    row = slice_groups * width * problem.itemsize
    memory = units * unit / (_bandwidth(device) * device.row_rate(row))
    cache = (units + again) * unit / (_bandwidth(device) * device.l2_speed)
    counters = 2 * slices * tickets * device.ticket
    waits = slices if tickets < at_once else 1
    issue = sum(_issue(problem, device, phase, reduce) for phase in PHASES[backward])
    seconds = max(memory, cache, issue, counters) + 4 * waits * device.latency
    found = _schedule(
        "ticketed", problem, device, backward, units,
        reduce=reduce, slice_groups=slice_groups, cached_units=again,
    )  # fmt: skip
    return replace(found, seconds=device.launch + seconds)


def _issue(problem: Problem, device: Device, phase: str, work: Pass) -> float:
    """Returns the seconds that multiprocessors take to issue the instructions of a phase."""
    elements = work.programs(problem) * work.length * work.tile.elements
    each = instructions_per_element(phase, work.tile, work.length, problem.residual)
    # Narrow accesses take as many more.
    each += NARROW * (ACCESS_BYTES / work.tile.access_bytes(problem.itemsize) - 1)
    return elements * each / (device.sm_count * device.issues)


def _columns_in_cache(problem: Problem, device: Device, backward: bool) -> int:
    """Returns how many columns a slice may have for the cache to hold two slices."""
    column = problem.n * problem.itemsize * _reads(problem, backward)
    return int(device.l2_share * device.l2_bytes / (SLICES_IN_CACHE * column))


def _schedule(
    strategy: str, problem: Problem, device: Device, backward: bool, units: float,
    reduce: Pass | None = None, apply: Pass | None = None, slice_groups: int = 0,
    cached_units: float = 0,
) -> Schedule:  # fmt: skip
    reads = _reads(problem, backward)
    narrow = choose_tile(problem, device, SLICE_BYTES[0])
    reduce = reduce or filling_pass(problem, device, reads, narrow)
    apply = apply or filling_pass(problem, device, reads, choose_tile(problem, device))
    return Schedule(
        strategy=strategy,
        reduce=reduce,
        apply=apply,
        slice_groups=slice_groups,
        warps=warps_of(apply.tile, strategy),
        launches=2 if strategy == "two-pass" else 1,
        units=units,
        cached_units=cached_units,
        seconds=0.0,
    )


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

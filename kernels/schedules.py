"""How each strategy would run one direction of a problem, and how long that would take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from .device import Device
from .passes import Pass, filling_pass, least_length, make_pass
from .prediction import PHASES, Prediction, bandwidth_of, issue_seconds, run_seconds
from .tiling import (
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

# Tickets are drawn in the order reduce(1), apply(0), reduce(2), apply(1), and so on, where the
# number is that of the slice. So two slices are in the cache at once. A program that draws a ticket
# of apply(1) must wait until the last ticket of reduce(1) is done. It hardly ever has to wait if
# apply(0) and reduce(2), which come between, have one ticket for each running program, so that each
# phase has half as many: 264 on an H100, where 4 * 132 programs run. Runs have as many tiles as
# leave so many tickets, up to MAX_RUN. With slightly fewer tickets runs may divide the tiles more
# evenly, so both numbers are tried.
SLICES_IN_CACHE = 2
TICKETS_PER_PROGRAM = (0.5, 0.45)
MAX_RUN = 12

# With channels last, a row of a slice has at least so many bytes, since short pieces of rows are
# read slowly. The second width is used where the first one is too wide for the cache, and slices
# grow to WIDE_BYTES where the cache has room.
SLICE_BYTES = (128, 64)
WIDE_BYTES = 256


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
            of a tensor that it is. A ticketed launch reads or writes these in memory.
        cached_units: further units that a ticketed launch reads from the cache.
        prediction: how long this takes.
    """

    strategy: str
    reduce: Pass
    apply: Pass
    slice_groups: int
    warps: int
    launches: int
    units: float
    cached_units: float
    prediction: Prediction

    @property
    def seconds(self) -> float:
        """Returns the predicted time."""
        return self.prediction.seconds

    @property
    def tile(self) -> Tile:
        """Returns the tile of the first pass; a second pass has accesses of the same width."""
        return (self.apply if self.strategy == "resident" else self.reduce).tile

    def tickets(self, problem: Problem) -> int:
        """Returns the tickets of a ticketed launch, which has two phases for each slice."""
        slices = -(-self.reduce.groups(problem) // self.slice_groups)
        return 2 * slices * self.slice_groups * self.reduce.tiles() * self.reduce.splits


def fixed_stats(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules one pass over the data with given statistics."""
    units = _once(problem, backward)
    found = _schedule("fixed-stats", problem, device, backward, units)
    phase, work = ("sums", found.reduce) if backward else ("output", found.apply)
    prediction = Prediction(
        memory=units * problem.tensor_bytes / bandwidth_of(device),
        issue=issue_seconds(problem, device, phase, work),
        chain=device.launch + 2 * device.latency,
    )
    return replace(found, prediction=prediction)


def two_pass(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules two passes.

    The second pass reads the data in reverse order, so that it finds in the cache what
    the cache kept of the first. Apart from the data, each of the two takes two round trips to
    memory, and the last program to arrive in the first one merges all partial results.
    """
    unit, again = problem.tensor_bytes, reads_of(problem, backward)
    units = _once(problem, backward) + again
    kept = min(again * unit, device.l2_share * device.l2_bytes)
    moved = units * unit - kept + kept / device.l2_speed
    found = _schedule("two-pass", problem, device, backward, units)
    first, second = PHASES[backward]
    issue = issue_seconds(problem, device, first, found.reduce)
    issue += issue_seconds(problem, device, second, found.apply)
    chain = (
        2 * device.launch
        + 4 * device.latency
        + found.reduce.merge_seconds(problem, device, backward)
    )
    waiting = sum(
        ceil(work.programs(problem) / (PROGRAMS_PER_SM * device.sm_count))
        * run_seconds(problem, device, phase, work)
        for phase, work in ((first, found.reduce), (second, found.apply))
    )
    prediction = Prediction(
        memory=moved / bandwidth_of(device), issue=issue, waiting=waiting, chain=chain
    )
    return replace(found, prediction=prediction)


def resident(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules programs that hold a group of channels in registers.

    They run in waves, and each wave takes at least a load, a reduction and a store. Few
    programs leave multiprocessors idle, and a busy one can't use the whole bandwidth.
    """
    tile, units = resident_tile(problem), _once(problem, backward)
    assert tile is not None
    only = Pass(tile, group_width(problem, tile), length=1, splits=1)
    programs = only.programs(problem)
    # A program of 16 warps takes all registers, for 8192 values and as many results.
    at_once = device.sm_count * (16 // warps_of(tile, "resident"))
    busy = min(1.0, device.sm_speed * min(programs, device.sm_count) / device.sm_count)
    rate = bandwidth_of(device) * busy * device.row_rate(only.width * problem.itemsize)
    waves = -(-programs // at_once)
    chain = device.launch + 3 * waves * device.latency
    found = _schedule("resident", problem, device, backward, units, apply=only)
    prediction = Prediction(memory=units * problem.tensor_bytes / rate, chain=chain)
    return replace(found, prediction=prediction)


def ticketed(problem: Problem, device: Device, backward: bool) -> Schedule:
    """Schedules one launch that reads each slice from memory once and from the cache once.

    Cache and memory work at the same time. Programs that apply a slice wait until its last run is
    reduced and merged, if that takes longer than the work on other slices in the meantime.
    """
    columns = columns_in_cache(problem, device, backward)
    for row_bytes in SLICE_BYTES:
        tile = choose_tile(problem, device, row_bytes)
        width = group_width(problem, tile, max(1, min(MAX_WIDTH, columns)))
        if min(width, problem.c * problem.s) <= columns:
            break
    # Wide groups waste less of their tiles, but narrow ones may waste less of the cache.
    widths = {width}
    if width <= columns:
        widths |= {group_width(problem, tile, min(MAX_WIDTH, columns // n)) for n in (2, 3)}
    found = [
        _in_groups(problem, device, backward, tile, width, tickets)
        for width in sorted(widths)
        for tickets in TICKETS_PER_PROGRAM
    ]
    return min(found, key=lambda schedule: schedule.seconds)


def _in_groups(
    problem: Problem, device: Device, backward: bool, tile: Tile, width: int,
    tickets_per_program: float,
) -> Schedule:  # fmt: skip
    """Schedules a ticketed launch with groups of `width` columns.

    A phase has `tickets_per_program` tickets for each running program, if there are enough tiles.
    """
    unit, again = problem.tensor_bytes, reads_of(problem, backward)
    units = _once(problem, backward)
    columns = columns_in_cache(problem, device, backward)
    groups, in_cache = -(-problem.c * problem.s // width), max(1, columns // width)

    # Runs are as long as leave a slice enough tickets. Slices are then no larger than these need.
    at_once = PROGRAMS_PER_SM * device.sm_count
    enough = ceil(tickets_per_program * at_once)
    largest = ceil(groups / ceil(groups / in_cache))
    single = make_pass(problem, tile, width, 1)
    length = min(MAX_RUN, largest * single.tiles() * single.splits // enough)
    reduce = make_pass(problem, tile, width, max(length, least_length(problem, tile, again)))
    wanted = ceil(enough / (reduce.tiles() * reduce.splits))
    if problem.s == 1:
        wanted = max(wanted, WIDE_BYTES // (width * problem.itemsize))
    slices = max(ceil(groups / in_cache), groups // wanted)
    slice_groups = ceil(groups / slices)

    tickets = slice_groups * reduce.tiles() * reduce.splits
    row = slice_groups * width * problem.itemsize
    first, second = PHASES[backward]
    turn = run_seconds(problem, device, first, reduce) + 2 * device.cache_latency
    turn += run_seconds(problem, device, second, reduce, cached=True) + 2 * device.cache_latency
    turns = slices * tickets / at_once
    if turns < 2:  # a turn with few programs takes as long as one with all of them
        turns = ceil(turns)
    work = Prediction(
        memory=units * unit / (bandwidth_of(device) * device.row_rate(row)),
        cache=(units + again) * unit / (bandwidth_of(device) * device.l2_speed),
        issue=sum(issue_seconds(problem, device, phase, reduce) for phase in PHASES[backward]),
        counters=2 * slices * tickets * device.ticket,
        waiting=turns * turn,
    )
    # Between the last ticket that reduces a slice and the first that applies it are the tickets of
    # two phases. While the last run is reduced, the running programs hold one of these each. The
    # others take a part of the time of a slice, during which the results are merged.
    handover = reduce.merge_seconds(problem, device, backward) + 3 * device.cache_latency
    meanwhile = max(0.0, 1 - at_once / (2 * tickets)) * work.seconds / slices
    wait = handover if slices == 1 else max(0.0, handover - meanwhile)
    waiting = work.waiting + (turns * wait if slices > 1 else 0.0)
    work = replace(work, waiting=waiting, chain=device.launch + wait)
    found = _schedule(
        "ticketed", problem, device, backward, units,
        reduce=reduce, slice_groups=slice_groups, cached_units=again,
    )  # fmt: skip
    return replace(found, prediction=work)


def columns_in_cache(problem: Problem, device: Device, backward: bool) -> int:
    """Returns how many columns a slice may have, so that the cache holds two slices."""
    column = problem.n * problem.itemsize * reads_of(problem, backward)
    return int(device.l2_share * device.l2_bytes / (SLICES_IN_CACHE * column))


def _schedule(
    strategy: str, problem: Problem, device: Device, backward: bool, units: float,
    reduce: Pass | None = None, apply: Pass | None = None, slice_groups: int = 0,
    cached_units: float = 0,
) -> Schedule:  # fmt: skip
    narrow = choose_tile(problem, device, SLICE_BYTES[0])
    least = least_length(problem, narrow, reads_of(problem, backward))
    reduce = reduce or filling_pass(problem, device, narrow, least)
    apply = apply or filling_pass(problem, device, choose_tile(problem, device))
    return Schedule(
        strategy=strategy,
        reduce=reduce,
        apply=apply,
        slice_groups=slice_groups,
        warps=warps_of(apply.tile, strategy),
        launches=2 if strategy == "two-pass" else 1,
        units=units,
        cached_units=cached_units,
        prediction=Prediction(0.0),
    )


def _mask(problem: Problem) -> float:
    """Returns the size of a packed mask in units, 0 if there is none."""
    return 1 / (MASK_BITS * problem.itemsize) if problem.saves == "mask" else 0


def reads_of(problem: Problem, backward: bool) -> float:
    """Returns the units that statistics or sums are computed from, which two passes read twice."""
    return 2 + (problem.saves == "residual") + _mask(problem) if backward else 1


def _once(problem: Problem, backward: bool) -> float:
    """Returns the units moved if each tensor is read or written once."""
    if backward:
        return reads_of(problem, backward) + 1 + (problem.saves is not None)
    return 2 + problem.residual + _mask(problem)

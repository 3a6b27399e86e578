"""Simulates one multiprocessor, to compare the planner's predictions with the simulated times.

    python -m benchmarks.simulation [--device NAME]

The command simulates the launches that the planner chose, run by run, with the same facts of the
device. The planner combines formulas for the time that memory, cache, instructions and waiting
take. In the simulation programs queue for memory, cache and instructions, wait for what they load,
and wait for each other. It measures nothing, and shows whether waiting adds up.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

from fastbn.kernels.device import H100, Device
from fastbn.kernels.instructions import fixed_instructions, loop_instructions
from fastbn.kernels.passes import Pass
from fastbn.kernels.plan import make_plan, schedules
from fastbn.kernels.prediction import PHASES, bandwidth_of
from fastbn.kernels.schedules import Schedule, reads_of
from fastbn.kernels.tiling import PROGRAMS_PER_SM, WARPS, Problem, warps_of

from .plans import device_named, problem_of
from .shapes import cases

# A store waits only if more bytes than these are on their way to memory.
STORE_BUFFER = 32768

# A program yields the time at which it goes on.
Program = Iterator[float]


@dataclass
class Server:
    """Serves requests one after the other at a rate."""

    rate: float
    free: float = 0.0

    def serve(self, now: float, amount: float) -> float:
        """Returns when a request of this amount, which is made now, is served."""
        self.free = max(now, self.free) + amount / self.rate
        return self.free


@dataclass
class Multiprocessor:
    """One multiprocessor with its share of a device's memory and cache."""

    device: Device
    row_bytes: int | None = None
    memory: Server = field(init=False)
    cache: Server = field(init=False)
    issue: Server = field(init=False)
    now: float = 0.0

    def __post_init__(self) -> None:
        share = bandwidth_of(self.device) / self.device.sm_count
        # Memory is read more slowly in short pieces of rows.
        rows = self.row_bytes
        self.memory = Server(share * (1 if rows is None else self.device.row_rate(rows)))
        self.cache = Server(share * self.device.l2_speed)
        self.issue = Server(self.device.issues)

    def load(self, bytes: float, from_cache: float) -> float:
        """Returns when a load arrives; `from_cache` is the fraction that is in the cache."""
        arrived = self.cache.serve(self.now, bytes) + self.device.cache_latency
        if from_cache < 1:
            served = self.memory.serve(self.now, bytes * (1 - from_cache))
            arrived = max(arrived, served + self.device.latency)
        return arrived

    def store(self, bytes: float) -> float:
        """Returns when a program that stores so many bytes goes on."""
        self.cache.serve(self.now, bytes)
        return max(self.now, self.memory.serve(self.now, bytes) - STORE_BUFFER / self.memory.rate)

    def compute(self, instructions: float) -> float:
        """Returns when a program has issued so many instructions of threads."""
        alone = instructions / (self.device.issues * WARPS / 4)
        return max(self.issue.serve(self.now, instructions), self.now + alone)

    def play(self, waiting: Iterator[Program], slots: int) -> float:
        """Runs programs, so many at once, and returns when the last one ends."""
        running: list[tuple[float, int, Program]] = []
        started = 0
        while True:
            while len(running) < slots and (program := next(waiting, None)) is not None:
                heapq.heappush(running, (self.now, started, program))
                started += 1
            if not running:
                return max(self.now, self.memory.free)
            self.now, number, program = heapq.heappop(running)
            if (later := next(program, None)) is not None:
                heapq.heappush(running, (max(later, self.now), number, program))


@dataclass(frozen=True)
class Phase:
    """What a phase does with each tile of a run.

    Attributes:
        loads, stores: bytes loaded and stored.
        residual: bytes loaded of a tensor that no earlier phase has read.
        loop, fixed: instructions of all threads for a tile, and those for a run besides.
        ahead: whether the next tile is loaded while one is computed.
    """

    loads: float
    residual: float
    stores: float
    loop: float
    fixed: float
    ahead: bool


def phase_of(problem: Problem, work: Pass, backward: bool, second: bool) -> Phase:
    """Returns what a phase does, by the planner's table of instructions."""
    name = PHASES[backward][second]
    tile = work.tile
    loop = loop_instructions(name, problem, tile)
    reads = reads_of(problem, backward)
    mask = reads_of(problem, True) - 2 if problem.saves == "mask" else 0.0
    writes = residual = 0.0
    if second:
        writes = 1 + (problem.saves is not None if backward else mask)
        residual = float(problem.residual and not backward)
    # Of a tile that is not full, only the elements inside of the array are moved.
    full = (
        problem.n * problem.c * problem.s / (work.programs(problem) * work.length * tile.elements)
    )
    bytes = tile.elements * problem.itemsize * full
    fixed = fixed_instructions(name, tile)
    moved = (reads * bytes, residual * bytes, writes * bytes)
    return Phase(*moved, loop * tile.elements, fixed, not backward)


def run(sm: Multiprocessor, phase: Phase, tiles: int, from_cache: float) -> Program:
    """Simulates a run of tiles."""
    arrives = deque([sm.load(phase.loads, from_cache)])
    yield sm.compute(phase.fixed / 2)
    for tile in range(tiles):
        if phase.ahead and tile + 1 < tiles:
            arrives.append(sm.load(phase.loads, from_cache))
        if not arrives:
            arrives.append(sm.load(phase.loads, from_cache))
        if phase.residual:
            arrives[0] = max(arrives[0], sm.load(phase.residual, 0.0))
        yield arrives.popleft()
        yield sm.compute(phase.loop)
        if phase.stores:
            yield sm.store(phase.stores)
    yield sm.compute(phase.fixed / 2)


def two_pass(problem: Problem, device: Device, schedule: Schedule, backward: bool) -> float:
    """Simulates two launches, of which the second finds a part of what it reads in the cache."""
    seconds = 0.0
    again = reads_of(problem, backward) * problem.tensor_bytes
    kept = min(again, device.l2_share * device.l2_bytes) / again
    for second, work in enumerate((schedule.reduce, schedule.apply)):
        sm = Multiprocessor(device)
        phase = phase_of(problem, work, backward, bool(second))
        programs = ceil(work.programs(problem) / device.sm_count)
        cached = [second and i < kept * programs for i in range(programs)]
        play = (run(sm, phase, work.length, float(inside)) for inside in cached)
        seconds += device.launch + sm.play(play, PROGRAMS_PER_SM)
        # The first launch stores partial results, arrives and merges; the second loads statistics.
        seconds += 2 * device.latency
        if not second:
            seconds += work.merge_seconds(problem, device, backward)
    return seconds


def ticketed(problem: Problem, device: Device, schedule: Schedule, backward: bool) -> float:
    """Simulates a persistent launch, whose programs draw tickets in order and wait for flags.

    The other multiprocessors do the same at the same time. Therefore the last ticket of this one
    that reduces a slice ends when the last one of all multiprocessors does.
    """
    work = schedule.reduce
    sm = Multiprocessor(device, schedule.slice_groups * work.width * problem.itemsize)
    groups = work.groups(problem)
    slices = ceil(groups / schedule.slice_groups)
    reduce, apply = (phase_of(problem, work, backward, second) for second in (False, True))
    merge = work.merge_seconds(problem, device, backward) + 2 * device.cache_latency

    def tickets_of(slice: int) -> int:
        here = min(schedule.slice_groups, groups - slice * schedule.slice_groups)
        return here * work.tiles() * work.splits

    # The queue has the tickets that fall to this multiprocessor, in the order of the phases.
    order = [(0, False)]
    for slice in range(1, slices):
        order += [(slice, False), (slice - 1, True)]
    order.append((slices - 1, True))
    drawn, queue = 0.0, deque()
    for slice, applies in order:
        before, drawn = drawn, drawn + tickets_of(slice) / device.sm_count
        queue += [(slice, applies)] * max(1, int(drawn) - int(before))
    left = [sum(ticket == (slice, False) for ticket in queue) for slice in range(slices)]
    flags: list[float | None] = [None] * slices

    def program() -> Program:
        while queue:
            slice, applies = queue.popleft()
            # Drawing the ticket takes this long.
            yield sm.now + device.cache_latency
            if applies:
                while (flag := flags[slice]) is None:
                    yield sm.now + device.cache_latency / 4
                yield flag
                # Loading the statistics takes this long.
                yield sm.now + device.cache_latency
                yield from run(sm, apply, work.length, 1.0)
            else:
                yield from run(sm, reduce, work.length, 0.0)
                left[slice] -= 1
                if not left[slice]:
                    flags[slice] = sm.now + merge
                # Arriving takes this long.
                yield sm.now + device.cache_latency

    programs = (program() for _ in range(PROGRAMS_PER_SM))
    return device.launch + sm.play(programs, PROGRAMS_PER_SM)


def resident(problem: Problem, device: Device, schedule: Schedule, backward: bool) -> float:
    """Simulates programs that load, reduce and store a channel, or the channels of a sector."""
    work = schedule.apply
    sm = Multiprocessor(device, work.width * problem.itemsize)
    programs = ceil(work.programs(problem) / device.sm_count)
    elements = problem.n * problem.c * problem.s / work.programs(problem)
    reads = reads_of(problem, backward) + (0 if backward else problem.residual)
    mask = reads_of(problem, True) - 2 if problem.saves == "mask" else 0.0
    writes = 1 + (problem.saves is not None if backward else mask)

    def program() -> Program:
        yield sm.load(reads * elements * problem.itemsize, 0.0)
        yield sm.now + device.latency
        yield sm.store(writes * elements * problem.itemsize) + device.latency

    slots = 16 // warps_of(work.tile, "resident")
    return device.launch + sm.play((program() for _ in range(programs)), slots)


def simulate(problem: Problem, device: Device, schedule: Schedule, backward: bool) -> float:
    """Returns the seconds that a schedule takes in the model."""
    play = {"two-pass": two_pass, "ticketed": ticketed, "resident": resident}
    return play[schedule.strategy](problem, device, schedule, backward)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument(
        "--device", type=device_named, default=H100, help="a part of its name, as L4 or H200"
    )
    parser.add_argument("--all", action="store_true", help="all strategies, not only chosen ones")
    options = parser.parse_args()
    device = options.device
    print(f"Simulated, not measured, for {device.name}: us, and as predicted by the planner")
    for case in cases(gpu=True, quick=False):
        problem = problem_of(case)
        plan = make_plan(problem, device)
        print(f"{case.shape} {case.layout} {case.dtype} {case.epilogue}")
        for backward, chosen in ((False, plan.forward), (True, plan.backward)):
            found = schedules(problem, device, backward).values() if options.all else (chosen,)
            for schedule in found:
                seconds = simulate(problem, device, schedule, backward)
                mark = "*" if schedule == chosen else " "
                print(
                    f"    {'backward' if backward else 'forward':9} {schedule.strategy:9}{mark}"
                    f"{seconds * 1e6:8.1f} {schedule.seconds * 1e6:8.1f}"
                    f" {seconds / schedule.seconds - 1:+5.0%}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())

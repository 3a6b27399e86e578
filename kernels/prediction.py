"""Predicts how long passes take, from a device's facts and from counted instructions."""

from __future__ import annotations

from dataclasses import dataclass

from .device import Device
from .instructions import fixed_instructions, loop_instructions
from .passes import Pass
from .tiling import WARPS, Problem

# The phases of a forward and of a backward, by which instructions are counted.
PHASES = (("moments", "output"), ("sums", "gradient"))

# The limits of a launch are combined by a norm with this exponent. The higher it is, the less do
# shorter limits add to the longest one. With this value predictions agree best with
# `benchmarks/simulation.py`; it has not been compared with a GPU.
SHARPNESS = 5

# This bandwidth stands in for an unknown one, only to choose between strategies.
UNKNOWN_BANDWIDTH = 1e12


@dataclass(frozen=True)
class Prediction:
    """How long a launch takes by each of its limits, and as a whole.

    Attributes:
        memory, cache, issue, counters: seconds that memory, the cache, instructions and counters
            take for all that there is to do. They work at the same time.
        waiting: seconds that a program takes for its share of the work. For most of that time it
            waits for what it loads.
        chain: seconds of the work that no program can begin before others have finished.
    """

    memory: float
    cache: float = 0.0
    issue: float = 0.0
    counters: float = 0.0
    waiting: float = 0.0
    chain: float = 0.0

    @property
    def seconds(self) -> float:
        """Returns the whole time, to which shorter limits add because they cause waiting."""
        limits = (self.memory, self.cache, self.issue, self.counters, self.waiting)
        return sum(limit**SHARPNESS for limit in limits) ** (1 / SHARPNESS) + self.chain


def bandwidth_of(device: Device) -> float:
    """Returns the bandwidth of a device's memory, or what stands in for it."""
    return device.bandwidth or UNKNOWN_BANDWIDTH


def issue_seconds(problem: Problem, device: Device, phase: str, work: Pass) -> float:
    """Returns the seconds that multiprocessors take to issue the instructions of a phase."""
    run = work.length * work.tile.elements * loop_instructions(phase, problem, work.tile)
    run += fixed_instructions(phase, work.tile)
    return work.programs(problem) * run / (device.sm_count * device.issues)


def run_seconds(
    problem: Problem, device: Device, phase: str, work: Pass, cached: bool = False
) -> float:
    """Returns how long a program takes for a run from memory, or from the cache, if it runs alone.

    A forward loads the next tile of the input before it waits for the current one. It does not do
    so for the residual, which always comes from memory.
    """
    adds = phase == "output" and problem.residual
    latency = device.cache_latency if cached and not adds else device.latency
    # Each warp has one of the multiprocessor's four schedulers.
    rate = device.issues * WARPS / 4
    loop = work.tile.elements * loop_instructions(phase, problem, work.tile) / rate
    fixed = fixed_instructions(phase, work.tile) / rate
    if phase in PHASES[0] and not adds:
        return latency + fixed + loop + (work.length - 1) * max(loop, (latency + loop) / 2)
    return fixed + work.length * (latency + loop)

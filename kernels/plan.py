"""The planner makes every launch decision before a launch, from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .device import Device
from .schedules import Schedule, columns_in_cache, fixed_stats, resident, ticketed, two_pass
from .tiling import Problem, resident_tile

# One pass must be predicted to be faster than two by this fraction, for predictions err.
MARGIN = 0.05


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
    if columns <= columns_in_cache(problem, device, backward):
        found["ticketed"] = tickets
    return found

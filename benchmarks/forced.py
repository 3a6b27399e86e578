"""One strategy wherever it can serve, in place of the planner's choice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastbn.kernels import plan
from fastbn.kernels.device import Device
from fastbn.kernels.plan import Schedule
from fastbn.kernels.tiling import Problem
from fastbn.runtime import plan_cache

STRATEGIES = ("two-pass", "resident", "ticketed")


@contextlib.contextmanager
def forced(strategy: str) -> Iterator[None]:
    """Within the block, calls run by this strategy wherever it can serve them.

    The choice holds for all threads, and cached plans are dropped before and after.
    """
    schedules = plan.schedules

    def narrowed(problem: Problem, device: Device, backward: bool) -> dict[str, Schedule]:
        found = schedules(problem, device, backward)
        return {strategy: found[strategy]} if strategy in found else found

    plan.schedules = narrowed
    plan_cache.clear()
    try:
        yield
    finally:
        plan.schedules = schedules
        plan_cache.clear()

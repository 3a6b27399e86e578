"""One strategy wherever it can serve, in place of the planner's choice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastbn import recall
from fastbn.kernels import plan
from fastbn.kernels.device import Device
from fastbn.kernels.plan import Schedule
from fastbn.kernels.tiling import Problem

STRATEGIES = ("two-pass", "resident", "ticketed")


@contextlib.contextmanager
def forced(strategy: str) -> Iterator[None]:
    """Each direction of every call is done so if it can be, or else as it always is.

    All threads see it, and what they called before is planned anew.
    """
    schedules = plan.schedules

    def narrowed(problem: Problem, device: Device, backward: bool) -> dict[str, Schedule]:
        found = schedules(problem, device, backward)
        return {strategy: found[strategy]} if strategy in found else found

    plan.schedules = narrowed
    recall.forget()
    try:
        yield
    finally:
        plan.schedules = schedules
        recall.forget()

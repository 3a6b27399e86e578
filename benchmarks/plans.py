"""What the planner decides for a case, and the time that it predicts."""

from __future__ import annotations

import math
from dataclasses import asdict

from fastbn.kernels.device import H100
from fastbn.kernels.plan import Plan, Problem, make_plan

from .shapes import Case


def h100_plan(case: Case) -> dict:
    """Of an H100, with the bandwidth in its data sheet; needs no GPU."""
    n, c, s = case.size[0], case.size[1], math.prod(case.size[2:])
    if case.layout != "channels-first":
        n, s = n * s, 1
    epilogue = case.epilogue
    saves = "mask" if epilogue.residual and epilogue.relu else None
    itemsize = case.tensor_bytes // math.prod(case.size)
    problem = Problem(n, c, s, itemsize, residual=epilogue.residual, saves=saves)
    return plan_entry(case, make_plan(problem, H100), H100.name, H100.bandwidth)


def plan_entry(case: Case, plan: Plan, device: str, bandwidth: float | None) -> dict:
    """A plan as it goes into the report.

    Args:
        bandwidth: of the device's memory, in bytes per second; None if unknown.
    """

    def predicted_us(units: float) -> float | None:
        return bandwidth and units * plan.problem.tensor_bytes / bandwidth * 1e6

    return {
        "network": case.network,
        "shape": case.shape,
        "layout": case.layout,
        "dtype": case.dtype,
        "epilogue": case.epilogue.name,
        "device": device,
        "predicted_us": {
            "forward": predicted_us(plan.forward_units),
            "forward+backward": predicted_us(plan.forward_units + plan.backward_units),
        },
        **asdict(plan),
    }

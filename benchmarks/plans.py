"""Tells what the planner decides for a case, and which time it predicts.

`python -m benchmarks.plans` prints the planner's decisions for an H100, or for another device by
name. It needs no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict

import torch

from fastbn.kernels.device import DEVICES, H100, Device
from fastbn.kernels.plan import Plan, make_plan
from fastbn.kernels.schedules import Schedule, ticketed, two_pass
from fastbn.kernels.tiling import Problem
from fastbn.runtime.layout import kernel_shape

from .shapes import Case, cases


def problem_of(case: Case) -> Problem:
    """Returns the problem that a case is for the planner."""
    channels_first = case.layout == "channels-first"
    n, c, s = kernel_shape(
        case.size, torch.contiguous_format if channels_first else torch.channels_last
    )
    epilogue = case.epilogue
    saves = "mask" if epilogue.residual and epilogue.relu else None
    itemsize = case.tensor_bytes // math.prod(case.size)
    return Problem(n, c, s, itemsize, residual=epilogue.residual, saves=saves)


def floor_units(case: Case, direction: str) -> tuple[float, float]:
    """Returns the units that one pass and that two passes move, packed masks included.

    One pass is a ticketed one, of which the units from memory count. They are the same for every
    device.
    """
    problem = problem_of(case)
    backwards = (False, True) if direction == "forward+backward" else (False,)
    one, two = (
        sum(strategy(problem, H100, backward).units for backward in backwards)
        for strategy in (ticketed, two_pass)
    )
    return one, two


def plan_entry(case: Case, plan: Plan, device: str) -> dict:
    """Returns a plan as it goes into the report."""
    entry = {**case.labels, "device": device, **asdict(plan)}
    for direction in ("forward", "backward"):
        entry[direction]["seconds"] = getattr(plan, direction).seconds
    return entry


def device_plan(case: Case, device: Device) -> dict:
    """Returns the plan for a device by its facts alone; this machine needn't have it."""
    return plan_entry(case, make_plan(problem_of(case), device), device.name)


def in_brief(schedule: Schedule, problem: Problem) -> str:
    """Describes one direction of a plan in a line: strategy, tile, runs, slices, units, times."""
    work = schedule.apply if schedule.strategy == "resident" else schedule.reduce
    tile = work.tile
    what = f"{schedule.strategy:8} {tile.n}x{tile.q} {tile.layout}"
    if schedule.strategy != "resident":
        what += f" *{work.length} /{work.splits}"
    if schedule.strategy == "ticketed":
        slices = -(-work.groups(problem) // schedule.slice_groups)
        what += f" {slices} slice{'s' * (slices > 1)}"
    limits = asdict(schedule.prediction).items()
    return (
        f"{what:44} {tile.access_bytes(problem.itemsize):2} B {schedule.units:5.3g} units"
        f" {schedule.seconds * 1e6:7.1f} us:"
        + ",".join(f" {name} {seconds * 1e6:.1f}" for name, seconds in limits if seconds)
    )


def device_named(text: str) -> Device:
    """Returns the device that has this text in its name."""
    found = [device for device in DEVICES if text.lower() in device.name.lower()]
    if len(found) != 1:
        names = ", ".join(device.name for device in DEVICES)
        raise argparse.ArgumentTypeError(f"expected part of one name among {names}, not {text!r}")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument(
        "--device", type=device_named, default=H100, help="a part of its name, as L4 or H200"
    )
    device = parser.parse_args().device
    print(
        f"Predicted, not measured, for {device.name}, from left to right:\n"
        "  strategy\n"
        "  NxQ        tile, of an input seen as N rows and Q columns, and how tiles lie\n"
        "  *n         tiles of a run\n"
        "  /n         runs that share a column of tiles\n"
        "  n slices   that a ticketed launch goes through, one after the other\n"
        "  n B        bytes of one memory access\n"
        "  n units    of traffic: a tensor read or written once\n"
        "  n us       time, and what memory, the cache, instructions, counters and waiting for\n"
        "             what was loaded would take alone, and what must come one after the other\n"
    )
    for case in cases(gpu=True, quick=False):
        problem = problem_of(case)
        plan = make_plan(problem, device)
        print(f"{case.shape} {case.layout} {case.dtype} {case.epilogue}")
        print(f"    forward   {in_brief(plan.forward, problem)}")
        print(f"    backward  {in_brief(plan.backward, problem)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

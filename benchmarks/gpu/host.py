"""Times a call on the host. On a GPU that includes its launches, which the GPU keeps up with."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch

from ..host import DIRECTIONS, LAYERS, call_of, no_launches, one_thread
from .step import Context

ROUNDS = 60
WARM_UP = 300
CALLS = 100


def run(context: Context) -> None:
    launches = no_launches() if context.rehearse else contextlib.nullcontext()
    with one_thread(), launches:
        for direction in DIRECTIONS:
            calls = {name: call_of(name, direction, context.device) for name in LAYERS}
            for name, seconds in _host_seconds(calls, context.device).items():
                context.record("host", layer=name, direction=direction, us=seconds * 1e6)


def _host_seconds(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Returns the median time of each call, measured in turn, so that all see the same machine."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            before = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[name].append((time.perf_counter() - before) / CALLS)
    return {name: statistics.median(times) for name, times in found.items()}

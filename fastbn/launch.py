"""What a launch needs of the machine: device facts, the right device, counters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import torch

from .kernels.device import H100, INTERPRETER, Device

_KNOWN = {device.name: device for device in (H100,)}

# Counters of arrivals, zero between launches, for each (device, stream):
# launches on one stream take turns, on two they must not share.
_counters: dict[tuple[torch.device, int], torch.Tensor] = {}
_COUNTERS = 4096


@lru_cache
def device_facts(device: torch.device) -> Device:
    """The planner's view of a torch device; CPU means Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Device(xpu.name, xpu.gpu_subslice_count, getattr(xpu, "last_level_cache_size", 0))
    cuda = torch.cuda.get_device_properties(device)
    if cuda.name in _KNOWN:
        return _KNOWN[cuda.name]
    return Device(cuda.name, cuda.multi_processor_count, cuda.L2_cache_size)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes a device the current one: Triton launches there.

    A launch that fails may leave counters behind that are not zero: they go.
    """
    guard = contextlib.nullcontext()
    if device.type in ("cuda", "xpu"):
        guard = getattr(torch, device.type).device(device)
    try:
        with guard:
            yield
    except BaseException:
        _counters.clear()
        raise


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros, which kernels leave at zero again."""
    stream, capturing = 0, False
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    elif device.type == "xpu":
        stream = torch.xpu.current_stream(device).sycl_queue
    counters = _counters.get((device, stream))
    if counters is None or counters.numel() < count:
        counters = torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=device)
        # Under capture the zeros are written by each replay, not now, and live
        # as long as the graph: nobody else may use them.
        if not capturing:
            _counters[device, stream] = counters
    return counters

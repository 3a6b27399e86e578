"""What a launch needs of the machine: the device's facts, and the device made current."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from functools import lru_cache

import torch

from .kernels.device import H100, INTERPRETER, Device

_KNOWN = {device.name: device for device in (H100,)}

# Triton's interpreter keeps global state.
_interpreter = threading.RLock()


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


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one: Triton launches there. One thread at a time interprets."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).device(device)
    return _interpreter

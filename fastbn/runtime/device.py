"""Torch devices as the planner and Triton see them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch._C._dynamo.guards import (  # type: ignore[attr-defined]  # PyTorch's stub lacks both
    _empty_strided_cpu,
    _empty_strided_cuda,
)

from ..kernels.device import DEVICES, INTERPRETER, Device

_KNOWN = {device.name: device for device in DEVICES}

# Triton's interpreter keeps global state, so only one thread at a time may interpret a kernel.
_interpreter = threading.RLock()


@lru_cache
def device_facts(device: torch.device) -> Device:
    """Returns the planner's facts about a torch device; the CPU stands for Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Device(xpu.name, xpu.gpu_subslice_count, getattr(xpu, "last_level_cache_size", 0))
    cuda = torch.cuda.get_device_properties(device)
    if cuda.name in _KNOWN:
        return _KNOWN[cuda.name]
    # Memory moves two words of the bus's width in each clock cycle; the clock is given in kHz.
    clock, bits = getattr(cuda, "memory_clock_rate", 0), getattr(cuda, "memory_bus_width", 0)
    bandwidth = 2 * clock * 1e3 * bits / 8
    return Device(cuda.name, cuda.multi_processor_count, cuda.L2_cache_size, bandwidth or None)


def limits_registers(device: torch.device) -> bool:
    """Says whether Triton accepts a limit of registers (`maxnreg`): it does so only for NVIDIA."""
    return device.type == "cuda" and torch.version.hip is None


def allocator(device: torch.device) -> Callable[..., Tensor]:
    """Returns a function of sizes, strides and dtype that allocates a tensor on a device.

    The graphs of `torch.compile` allocate by these functions of PyTorch's, which take half the
    time of `torch.empty_strided`.
    """
    if device.type == "cpu":
        return _empty_strided_cpu
    if device.type != "cuda":
        return partial(_empty_strided, device)

    def allocate(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if torch.cuda.current_device() != device.index:
            return _empty_strided(device, sizes, strides, dtype)
        return _empty_strided_cuda(sizes, strides, dtype)

    return allocate


def _empty_strided(
    device: torch.device, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one, on which Triton launches, or locks Triton's interpreter."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).device(device)
    return _interpreter

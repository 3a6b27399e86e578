"""Launching kernels on a device, at little more cost than Triton's own launcher."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from . import counters
from .kernels.device import DEVICES, INTERPRETER, Device

_KNOWN = {device.name: device for device in DEVICES}

# Bytes: where all pointers are multiples of it, Triton compiles for wider accesses.
_ALIGNMENT = 16

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
    # Two transfers a clock (in kHz), of so many bits.
    clock, bits = getattr(cuda, "memory_clock_rate", 0), getattr(cuda, "memory_bus_width", 0)
    bandwidth = 2 * clock * 1e3 * bits / 8
    return Device(cuda.name, cuda.multi_processor_count, cuda.L2_cache_size, bandwidth or None)


def limits_registers(device: torch.device) -> bool:
    """Whether Triton takes a limit of registers (`maxnreg`) there: for NVIDIA's alone."""
    return device.type == "cuda" and torch.version.hip is None


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one: Triton launches there. One thread at a time interprets."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).device(device)
    return _interpreter


class Launcher:
    """A kernel with all that its launches have in common, called with what differs.

    Triton's own dispatch takes ten microseconds to find what it has compiled.
    It compiles anew by device, by the values of integers and constants, by the
    dtypes of tensors and which of them are left out, and by whether their
    memory is aligned to 16 bytes. All launches of a launcher are alike in that
    (`calls.py` sees to it) but for the alignment: what was compiled for aligned
    tensors is kept here, others are left to Triton. Triton's own settings
    (`triton.knobs`) count when a kernel is compiled.

    Args:
        kernel: its parameters are tensors, then integers, floats, constants.
        device: where to launch.
        programs: how many to launch.
        integers: their values.
        constants: their values by name, and Triton's options.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        programs: int,
        integers: Sequence[int],
        constants: dict[str, Any],
    ) -> None:
        self.kernel, self.device, self.grid = kernel, device, (programs, 1, 1)
        self.integers, self.constants = tuple(integers), constants
        # A compiled kernel takes them by place.
        self._places = [constants[name] for name in kernel.arg_names if name in constants]
        self._start: Callable[..., None] | None = None
        self._absent: int | None = None  # how many tensors all launches leave out
        # The interpreter compiles nothing, and how other drivers take pointers is not known.
        self._keeps = isinstance(kernel, JITFunction) and device.type != "xpu"
        self._index = device.index if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor | None], *floats: float) -> None:
        """Launches; a tensor that is left out is None."""
        pointers = self._pointers(tensors)
        aligned = gcd(_ALIGNMENT, *pointers) == _ALIGNMENT
        try:
            if self._start is None or not aligned:
                self._dispatch(tensors, floats, aligned)
            elif self._index is None or torch.cuda.current_device() == self._index:
                self._start(*pointers, *self.integers, *floats, *self._places)
            else:
                with on_device(self.device):
                    self._start(*pointers, *self.integers, *floats, *self._places)
        except BaseException:
            counters.discard()
            raise

    def check(self, tensors: Sequence[Tensor | None]) -> None:
        """Raises a RuntimeError if one of the tensors has no memory, as a launch does."""
        self._pointers(tensors)

    def _pointers(self, tensors: Sequence[Tensor | None]) -> list[int]:
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        if pointers.count(0) != self._absent:
            self._absent = sum(t is None for t in tensors)
            if pointers.count(0) != self._absent:
                raise RuntimeError("a tensor has no memory: its storage was freed")
        return pointers

    def _dispatch(
        self, tensors: Sequence[Tensor | None], floats: tuple[float, ...], aligned: bool
    ) -> None:
        with on_device(self.device):
            compiled = self.kernel[self.grid](*tensors, *self.integers, *floats, **self.constants)
            if aligned and self._keeps:
                self._start = compiled[self.grid]

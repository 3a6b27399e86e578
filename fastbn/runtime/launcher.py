"""A launcher holds one kernel and all that its launches have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from . import workspace
from .device import on_device

# Triton compiles wider accesses where all pointers are multiples of this many bytes.
_ALIGNMENT = 16


class Launcher:
    """Launches a kernel at little more cost than Triton's compiled launcher.

    Triton's own dispatch takes ten microseconds to find the compiled kernel. It
    compiles a kernel for each device, width of integers, set of constants, dtypes of
    tensors, choice of tensors that are None, and whether all memory is aligned to 16
    bytes. `execution_plan` makes a launcher for each combination of all but the last,
    so a launcher keeps the kernel compiled for aligned tensors and leaves other
    tensors to Triton. Settings of Triton (`triton.knobs`) take effect when a
    kernel is compiled and not later.

    Args:
        kernel: the Triton kernel; its parameters are tensors, then integers,
            floats and constants.
        device: where to launch.
        programs: how many programs a launch has.
        integers: the values of the integer parameters.
        constants: the values of the constants by name, and Triton's options.
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
        # A compiled kernel takes constants by position.
        self._positional = [constants[name] for name in kernel.arg_names if name in constants]
        self._start: Callable[..., None] | None = None
        # The number of tensors that are None, which is the same in all launches.
        self._absent: int | None = None
        # The interpreter compiles nothing, and XPU's driver takes pointers in a way of its own.
        self._keeps_compiled = isinstance(kernel, JITFunction) and device.type != "xpu"
        self._index = device.index if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor | None], *floats: float) -> None:
        """Launches the kernel with these tensors, some of which may be None, and floats."""
        pointers = self._pointers(tensors)
        aligned = gcd(_ALIGNMENT, *pointers) == _ALIGNMENT
        try:
            if self._start is None or not aligned:
                self._dispatch(tensors, floats, aligned)
            elif self._index is None or torch.cuda.current_device() == self._index:
                self._start(*pointers, *self.integers, *floats, *self._positional)
            else:
                with on_device(self.device):
                    self._start(*pointers, *self.integers, *floats, *self._positional)
        except BaseException:
            # A failed launch may leave its counters at any value.
            workspace.discard()
            raise

    def check(self, tensors: Sequence[Tensor | None]) -> None:
        """Raises a RuntimeError, as a launch does, if the storage of a tensor was freed."""
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
            if aligned and self._keeps_compiled:
                self._start = compiled[self.grid]

"""Which backend serves a call, and why."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = False
if HAS_TRITON:
    from triton import knobs

    INTERPRETING = knobs.runtime.interpret

_DEVICES = ("cuda", "xpu", "cpu") if INTERPRETING else ("cuda", "xpu")
_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_DIFFERENT_DEVICES = "tensors are on different devices"
_SUBCLASS = "an argument is a tensor subclass"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but got {name!r}")
    return name


_backend = _checked(os.environ.get("FASTBN_BACKEND", "auto"), "FASTBN_BACKEND")


def get_backend() -> str:
    """The backend in force: "auto", "triton" or "torch"."""
    return _backend


def set_backend(name: str) -> None:
    """Chooses the backend of all calls from here on.

    Args:
        name: "auto" (GPU tensors go to the Triton kernels, CPU tensors to
            PyTorch), "triton" (what the kernels can't serve is an error) or
            "torch" (PyTorch's own batch norm throughout). `torch.func`,
            forward-mode AD and second derivatives run on PyTorch's
            differentiable operations whatever the backend.

    Raises:
        ValueError: for any other name; the backend stays as it was.
    """
    global _backend
    _backend = _checked(name, "backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a `with` block, in all threads."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def unserved(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
) -> str | None:
    """Why the kernels can't serve a call that PyTorch can; None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if input.device.type not in _DEVICES:
        hint = ", which takes TRITON_INTERPRET=1" if input.device.type == "cpu" else ""
        return f"the input is on the device type {input.device.type!r}{hint}"
    if input.layout != torch.strided:
        return f"the input's layout is {input.layout}"
    if input.dtype not in _DTYPES:
        return f"the input's dtype is {input.dtype}"
    if input.numel() == 0:
        return "the input is empty"
    # Straight on, without comprehensions: this runs in every call.
    dtype, device = input.dtype, input.device
    found = None
    for t in (weight, bias, running_mean, running_var):
        if t is None:
            continue
        if t.dtype is not found:
            if found is not None:
                return f"parameters and statistics are of {found} and {t.dtype}"
            found = t.dtype
            if found != dtype and (found != torch.float32 or dtype not in _HALVES):
                return f"parameters or statistics of {found} don't go with an input of {dtype}"
        if t.dim() != 1:
            return "a parameter or running statistic is not one-dimensional"
        if t.device != device:
            return _DIFFERENT_DEVICES
        if type(t) not in _PLAIN:
            return _SUBCLASS
    if running_mean is not None and not running_mean.is_contiguous():
        return "the running statistics are not contiguous"
    if running_var is not None and not running_var.is_contiguous():
        return "the running statistics are not contiguous"
    counter = num_batches_tracked
    if counter is not None:
        if counter.dtype != torch.int64 or counter.numel() != 1:
            return "num_batches_tracked is not a single int64"
        if counter.device != device:
            return _DIFFERENT_DEVICES
    if residual is not None:
        if residual.dtype != dtype:
            return f"the residual's dtype is {residual.dtype}, the input's {dtype}"
        if residual.device != device:
            return _DIFFERENT_DEVICES
        if type(residual) not in _PLAIN:
            return _SUBCLASS
    if type(input) not in _PLAIN or (counter is not None and type(counter) not in _PLAIN):
        return _SUBCLASS
    return None


def transformed() -> bool:
    """Whether `torch.func` transforms or forward-mode AD are at work."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


_warned: set[str] = set()


def warn_fallback(reason: str) -> None:
    """Says once a reason that a GPU call went to PyTorch."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"fastbn falls back to PyTorch's batch norm because {reason}", RuntimeWarning, 3
        )

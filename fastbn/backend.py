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
    statistics = (running_mean, running_var)
    parameters = [t for t in (weight, bias, *statistics) if t is not None]
    dtypes = {t.dtype for t in parameters}
    allowed = {input.dtype, torch.float32} if input.dtype in _HALVES else {input.dtype}
    if len(dtypes) > 1 or not dtypes <= allowed:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return f"parameters and statistics of {names} don't go with an input of {input.dtype}"
    if any(t.dim() != 1 for t in parameters):
        return "a parameter or running statistic is not one-dimensional"
    if any(t is not None and not t.is_contiguous() for t in statistics):
        return "the running statistics are not contiguous"
    counter = num_batches_tracked
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1):
        return "num_batches_tracked is not a single int64"
    if residual is not None and residual.dtype != input.dtype:
        return f"the residual's dtype is {residual.dtype}, the input's {input.dtype}"
    tensors = [input, *parameters]
    tensors += [t for t in (num_batches_tracked, residual) if t is not None]
    if any(t.device != input.device for t in tensors):
        return "tensors are on different devices"
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return "an argument is a tensor subclass"
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

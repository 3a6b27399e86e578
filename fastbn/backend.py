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

PYTORCH_REFUSES = "PyTorch refuses it"

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_DIFFERENT_DEVICES = "tensors are on different devices"
_SUBCLASS = "an argument is a tensor subclass"
_NEGATIVE = "an argument is negated lazily"


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


def set_aside() -> str | None:
    """Why no call goes to the kernels now, or None."""
    if _backend == "torch":
        return "the backend is set to 'torch'"
    if torch._C._are_functorch_transforms_active() or (
        torch.autograd.forward_ad._current_level >= 0 and not torch.compiler.is_compiling()
    ):
        return "torch.func or forward-mode AD is at work"
    return None


def unserved(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
) -> str | None:
    """Why the kernels can't serve a call, or None if they can.

    It is PYTORCH_REFUSES if PyTorch would not accept the sizes and numbers either.
    """
    if input.dim() < 2 or (running_mean is None) != (running_var is None):
        return PYTORCH_REFUSES
    device, dtype, channels = input.device, input.dtype, input.shape[1]
    counter = num_batches_tracked
    if training:
        known_momentum = momentum is not None or counter is not None
        if not (eps > 0 and known_momentum and input.numel() != channels):
            return PYTORCH_REFUSES
    elif eps < 0 or running_mean is None:
        return PYTORCH_REFUSES

    # This runs in every call: straight on, without comprehensions and helpers.
    reason = found = None
    eager = not torch.compiler.is_compiling()  # Dynamo can't ask for a tensor's sign
    for t in (weight, bias, running_mean, running_var):
        if t is None:
            continue
        if t.numel() != channels:
            return PYTORCH_REFUSES
        if t.dtype is not found:
            if found is not None:
                reason = f"parameters and statistics are of {found} and {t.dtype}"
            found = t.dtype
            if found is not dtype and (found is not torch.float32 or dtype not in _HALVES):
                reason = f"parameters or statistics of {found} don't go with an input of {dtype}"
        if t.dim() != 1:
            reason = "a parameter or running statistic is not one-dimensional"
        if t.device != device:
            reason = _DIFFERENT_DEVICES
        if type(t) not in _PLAIN:
            reason = _SUBCLASS
        if eager and t.is_neg():
            reason = _NEGATIVE
    if running_mean is not None:
        if running_mean.requires_grad or running_var.requires_grad:
            return PYTORCH_REFUSES
        if not (running_mean.is_contiguous() and running_var.is_contiguous()):
            reason = "the running statistics are not contiguous"
    if counter is not None:
        if counter.dtype is not torch.int64 or counter.numel() != 1:
            reason = "num_batches_tracked is not a single int64"
        if counter.device != device:
            reason = _DIFFERENT_DEVICES
        if type(counter) not in _PLAIN:
            reason = _SUBCLASS
    if residual is not None:
        if residual.dtype is not dtype:
            reason = f"the residual's dtype is {residual.dtype}, the input's {dtype}"
        if residual.device != device:
            reason = _DIFFERENT_DEVICES
        if type(residual) not in _PLAIN:
            reason = _SUBCLASS
        if eager and residual.is_neg():
            reason = _NEGATIVE

    if not HAS_TRITON:
        return "Triton is not installed"
    if not (input.is_cuda or input.is_xpu or (INTERPRETING and input.is_cpu)):
        hint = ", for which TRITON_INTERPRET=1 must be set at the start" if input.is_cpu else ""
        return f"the input is on the device type {device.type!r}{hint}"
    if input.layout is not torch.strided:
        return f"the input's layout is {input.layout}"
    if dtype not in _DTYPES:
        return f"the input's dtype is {dtype}"
    if input.numel() == 0:
        return "the input is empty"
    if type(input) not in _PLAIN:
        return _SUBCLASS
    if eager and input.is_neg():
        return _NEGATIVE
    return reason


_warned: set[str] = set()


def warn_fallback(reason: str) -> None:
    """Says once a reason that a GPU call went to PyTorch."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"fastbn falls back to PyTorch's batch norm because {reason}",
            RuntimeWarning,
            stacklevel=5,  # the caller of `batch_norm`
        )

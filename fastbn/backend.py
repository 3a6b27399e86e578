"""Which backend serves a call, and why."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "torch")

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = False
if HAS_TRITON:
    from triton import knobs

    INTERPRETING = knobs.runtime.interpret

PYTORCH_REFUSES = "PyTorch refuses it"

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32, torch.float64)
PLAIN = (Tensor, torch.nn.Parameter)


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
    # `is_exporting()` is what counts, but in PyTorch 2.11 `torch.compile` takes it for True.
    if torch.compiler._is_exporting_flag:
        return "torch.export is at work"
    if transformed():
        return "torch.func or forward-mode AD is at work"
    return None


def transformed() -> bool:
    """Whether `torch.func` or forward-mode AD is at work, which the kernels don't know."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


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
    if not (isinstance(eps, (float, int)) and isinstance(momentum, (float, int, type(None)))):
        return "momentum or eps is not a number"
    parameters = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    if not all(isinstance(t, Tensor) for t in (input, *parameters)):
        return PYTORCH_REFUSES
    if input.dim() < 2 or (running_mean is None) != (running_var is None):
        return PYTORCH_REFUSES
    if momentum is None and num_batches_tracked is None:
        return PYTORCH_REFUSES
    channels = input.shape[1]
    if any(t.numel() != channels for t in parameters):
        return PYTORCH_REFUSES
    if training and not (eps > 0 and input.numel() != channels):
        return PYTORCH_REFUSES
    if not training and (eps < 0 or running_mean is None):
        return PYTORCH_REFUSES

    if not HAS_TRITON:
        return "Triton is not installed"
    if not (input.is_cuda or input.is_xpu or (INTERPRETING and input.is_cpu)):
        hint = " (TRITON_INTERPRET=1, set at the start, interprets kernels)" if input.is_cpu else ""
        return f"the input is on the device type {input.device.type!r}{hint}"
    if input.dtype not in _DTYPES:
        return f"the input's dtype is {input.dtype}"
    if input.numel() == 0:
        return "the input is empty"
    if eps == 0:
        return "eps is 0"
    for t in (input, *parameters, num_batches_tracked, residual):
        reason = None if t is None else oddity(t, input.device)
        if reason is not None:
            return reason
    for t in parameters:
        if t.dim() != 1:
            return "a parameter or running statistic is not one-dimensional"
        if t.dtype is not parameters[0].dtype:
            return f"parameters and statistics are of {parameters[0].dtype} and {t.dtype}"
        if t.dtype is not input.dtype and (
            t.dtype is not torch.float32 or input.dtype not in _HALVES
        ):
            return f"parameters or statistics of {t.dtype} don't go with an input of {input.dtype}"
    for t in (running_mean, running_var):
        if t is not None and t.requires_grad:
            return "a running statistic requires a gradient"
        if t is not None and not t.is_contiguous():
            return "the running statistics are not contiguous"
    counter = num_batches_tracked
    if counter is not None and (counter.dtype is not torch.int64 or counter.numel() != 1):
        return "num_batches_tracked is not a single int64"
    if residual is not None and residual.dtype is not input.dtype:
        return f"the residual's dtype is {residual.dtype}, the input's {input.dtype}"
    return None


def oddity(t: Tensor, device: torch.device) -> str | None:
    """Why a tensor is not just what memory of this device holds, or None if it is."""
    if t.layout is not torch.strided:
        return f"an argument's layout is {t.layout}"
    if t.device != device:
        return "tensors are on different devices"
    if type(t) not in PLAIN:
        return "an argument is a tensor subclass"
    if torch.compiler.is_compiling():
        return None  # Dynamo can't ask for what follows, and has no such tensors
    if t.is_neg() or t._is_zerotensor():
        return "an argument is lazily negated, or lazily zero"
    if torch._is_functional_tensor(t):
        return "an argument is being functionalised"
    if is_legacy_batchedtensor(t):
        return "an argument is batched"  # by `is_grads_batched`
    return None


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

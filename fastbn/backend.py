"""Which backend serves a call, and why."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
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
            `torch.export`, forward-mode AD and second derivatives take
            PyTorch's operations whatever the backend.

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
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> str | None:
    """Why the kernels can't serve a call, or None if they can.

    It is PYTORCH_REFUSES if PyTorch would not accept the sizes and numbers either.
    """
    if not (isinstance(eps, (float, int)) and isinstance(momentum, (float, int, type(None)))):
        return "momentum or eps is not a number"
    names = ("weight", "bias", "running_mean", "running_var")
    parameters = zip(names, (weight, bias, running_mean, running_var))
    parameters = {name: t for name, t in parameters if t is not None}
    if not all(isinstance(t, Tensor) for t in (input, *parameters.values())):
        return PYTORCH_REFUSES
    if input.dim() < 2 or (running_mean is None) != (running_var is None):
        return PYTORCH_REFUSES
    if momentum is None and num_batches_tracked is None:
        return PYTORCH_REFUSES
    channels = input.shape[1]
    if any(t.numel() != channels for t in parameters.values()):
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
    tensors = {"input": input, "residual": residual, "num_batches_tracked": num_batches_tracked}
    tensors = {name: t for name, t in tensors.items() if t is not None} | parameters
    for name, t in tensors.items():
        odd = oddity(t, input.device)
        if odd is not None:
            return f"{name} {odd}"
    first = next(iter(parameters), None)
    for name, t in parameters.items():
        if t.dim() != 1:
            return f"{name} is not one-dimensional"
        if t.dtype is not parameters[first].dtype:
            return f"{first} is of {parameters[first].dtype} and {name} of {t.dtype}"
        if t.dtype is not input.dtype and (
            t.dtype is not torch.float32 or input.dtype not in _HALVES
        ):
            return f"{name} of {t.dtype} does not go with an input of {input.dtype}"
        if name.startswith("running"):
            if t.requires_grad:
                return f"{name} requires a gradient"
            if not t.is_contiguous():
                return f"{name} is not contiguous"
    counter = num_batches_tracked
    if counter is not None and (counter.dtype is not torch.int64 or counter.numel() != 1):
        return "num_batches_tracked is not a single int64"
    if residual is not None and residual.dtype is not input.dtype:
        return f"the residual's dtype is {residual.dtype}, the input's {input.dtype}"
    if torch.compiler.is_compiling():
        return None
    saved = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    for name, t in tensors.items():
        written = training and (name.startswith("running") or name == "num_batches_tracked")
        if (saved or written) and of_inference(t):
            return f"{name} is an inference tensor, outside inference mode"
    return None


def oddity(t: Tensor, device: torch.device) -> str | None:
    """What makes a tensor more than what memory of this device holds, or None."""
    if t.layout is not torch.strided:
        return f"is of layout {t.layout}"
    if t.device != device:
        return f"is on {t.device} and not, as the input, on {device}"
    if type(t) not in PLAIN:
        return f"is a tensor subclass, {type(t).__name__}"
    if torch.compiler.is_compiling():
        return None  # Dynamo can't ask for what follows, and has no such tensors
    if t.is_neg() or t._is_zerotensor():
        return "is lazily negated, or lazily zero"
    if torch._is_functional_tensor(t):
        return "is being functionalised"
    if is_legacy_batchedtensor(t):
        return "is batched"  # by `is_grads_batched`
    return None


def of_inference(t: Tensor) -> bool:
    """Whether a tensor may be neither written nor saved for a backward."""
    return t.is_inference() and not torch.is_inference_mode_enabled()


_warned: set[str] = set()


def warn_fallback(reason: str) -> None:
    """Says once a reason that a GPU call went to PyTorch, and where: in whose code."""
    if reason in _warned:
        return
    _warned.add(reason)
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fastbn.", "torch.")):
        frame, level = frame.f_back, level + 1
    message = f"fastbn falls back to PyTorch's batch norm because {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=level)

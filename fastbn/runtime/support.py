"""This module says why the kernels can't take a call. A reason is a phrase after "because"."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from ..backend import get_backend

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = False
if HAS_TRITON:
    from triton import knobs

    INTERPRETING = knobs.runtime.interpret

PYTORCH_REFUSES = "PyTorch refuses it"

PLAIN_TYPES = (Tensor, torch.nn.Parameter)

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32, torch.float64)


def bypass_reason() -> str | None:
    """Returns why no call at all goes to the kernels at the moment, or None."""
    if get_backend() == "torch":
        return "the backend is set to 'torch'"
    # The public `is_exporting()` would do, but in PyTorch 2.11 `torch.compile` takes it for True.
    if torch.compiler._is_exporting_flag:
        return "torch.export is at work"
    # The exporter that works by `torch.jit.trace` knows only PyTorch's operators.
    if _get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export is at work"
    if transforms_active():
        return "torch.func or forward-mode AD is at work"
    return None


def transforms_active() -> bool:
    """Says whether `torch.func` or forward-mode AD is at work, which the kernels don't support."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def backward_is_differentiated() -> bool:
    """Says whether a backward that runs now may be differentiated in turn."""
    # Compilers trace a backward with gradients enabled, and don't differentiate it.
    differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return differentiable or transforms_active()


def unsupported_reason(
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
    """Returns why the kernels can't serve this call, or None if they can.

    The reason is PYTORCH_REFUSES where PyTorch would not accept the sizes and
    numbers either: the caller then lets PyTorch raise its own error.
    """
    if not (isinstance(eps, (float, int)) and isinstance(momentum, (float, int, type(None)))):
        return "momentum or eps is not a number"
    names = ("weight", "bias", "running_mean", "running_var")
    given = zip(names, (weight, bias, running_mean, running_var))
    parameters = {name: t for name, t in given if t is not None}
    if _pytorch_refuses(input, parameters, num_batches_tracked, training, momentum, eps):
        return PYTORCH_REFUSES
    others = {"input": input, "residual": residual, "num_batches_tracked": num_batches_tracked}
    tensors = {name: t for name, t in others.items() if t is not None} | parameters
    return (
        _unsupported_input(input, eps)
        or _unsupported_kind(tensors)
        or _unsupported_parameter(parameters, input)
        or _unsupported_companion(residual, num_batches_tracked, input)
        or _unsupported_inference_tensor(tensors, training)
    )


def _pytorch_refuses(
    input: Tensor,
    parameters: dict[str, Tensor],
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> bool:
    """Says whether PyTorch's own batch norm would raise an error for these sizes and numbers."""
    if not all(isinstance(t, Tensor) for t in (input, *parameters.values())):
        return True
    if input.dim() < 2 or ("running_mean" in parameters) != ("running_var" in parameters):
        return True
    if momentum is None and num_batches_tracked is None:
        return True
    channels = input.shape[1]
    if any(t.numel() != channels for t in parameters.values()):
        return True
    if training:
        return not (eps > 0 and input.numel() != channels)
    return eps < 0 or "running_mean" not in parameters


def _unsupported_input(input: Tensor, eps: float) -> str | None:
    """Checks device and dtype of the input, which must not be empty either."""
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
    return None


def _unsupported_kind(tensors: dict[str, Tensor]) -> str | None:
    """Checks the kind of all tensors: the kernels read and write plain memory of one device."""
    for name, t in tensors.items():
        reason = not_plain_reason(t, tensors["input"].device)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _unsupported_parameter(parameters: dict[str, Tensor], input: Tensor) -> str | None:
    """Checks shape and dtype of parameters and running statistics, which share one dtype."""
    first = next(iter(parameters), "")
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
            # The kernels update running statistics in place, so no copy can stand in for them.
            if not t.is_contiguous():
                return f"{name} is not contiguous"
    return None


def _unsupported_companion(
    residual: Tensor | None, num_batches_tracked: Tensor | None, input: Tensor
) -> str | None:
    """Checks the dtypes of num_batches_tracked and of the residual."""
    if num_batches_tracked is not None and (
        num_batches_tracked.dtype is not torch.int64 or num_batches_tracked.numel() != 1
    ):
        return "num_batches_tracked is not a single int64"
    if residual is not None and residual.dtype is not input.dtype:
        return f"the residual's dtype is {residual.dtype}, the input's {input.dtype}"
    return None


def _unsupported_inference_tensor(tensors: dict[str, Tensor], training: bool) -> str | None:
    """Checks that no inference tensor would be saved or updated outside of inference mode."""
    if torch.compiler.is_compiling():
        return None
    saved = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    for name, t in tensors.items():
        written = training and (name.startswith("running") or name == "num_batches_tracked")
        if (saved or written) and unusable_inference_tensor(t):
            return f"{name} is an inference tensor, outside inference mode"
    return None


def not_plain_reason(t: Tensor, device: torch.device) -> str | None:
    """Returns why a tensor is not plain values in memory of this device, or None if it is."""
    if t.layout is not torch.strided:
        return f"is of layout {t.layout}"
    if t.device != device:
        return f"is on {t.device} and not, as the input, on {device}"
    # AOTAutograd traces with functional tensors, and records the operators in its graph.
    if type(t) is FunctionalTensor:
        return None
    if type(t) not in PLAIN_TYPES:
        return f"is a tensor subclass, {type(t).__name__}"
    # Dynamo can't trace the checks below, and never sees such tensors.
    if torch.compiler.is_compiling():
        return None
    if t.is_neg() or t._is_zerotensor():
        return "is lazily negated, or lazily zero"
    if torch._is_functional_tensor(t):
        return "is being functionalised"
    # `torch.autograd.grad(..., is_grads_batched=True)` makes such tensors.
    if is_legacy_batchedtensor(t):
        return "is batched"
    return None


def unusable_inference_tensor(t: Tensor) -> bool:
    """Says whether a tensor was made in inference mode and this code runs outside of it."""
    return t.is_inference() and not torch.is_inference_mode_enabled()

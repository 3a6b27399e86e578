"""`batch_norm`: `torch.nn.functional.batch_norm` with activation and residual."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .backend import get_backend
from .runtime import support
from .runtime.support import HAS_TRITON

if HAS_TRITON:
    from . import autograd

# What momentum may be without a closer look.
_MOMENTUM_TYPES = (float, int, type(None))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation((input - mean) / sqrt(var + eps) * weight + bias + residual).

    As `torch.nn.functional.batch_norm` (Ioffe and Szegedy, 2015), with
    activation and residual in the same kernels.

    Args:
        input: shape (N, C) or (N, C, ...), of dtype float16, bfloat16, float32
            or float64.
        running_mean, running_var: shape (C,). In training they are updated in
            place, the variance with the unbiased one of the batch; otherwise
            they are the statistics used. None: not tracked.
        weight, bias: shape (C,); None is 1 and 0. Parameters and statistics
            are of the input's dtype, or float32 with a half-precision input.
        training: use the batch's own mean and (biased) variance.
        momentum: running <- (1 - momentum) * running + momentum * batch.
        eps: added to the variance.
        activation: None or "none", or one of "relu", "leaky_relu", "silu",
            "gelu", "gelu_tanh", "hardswish", "relu6", "elu", "sigmoid", "tanh".
        activation_param: negative slope of "leaky_relu" (default 0.01), alpha
            of "elu" (default 1.0); the others take none.
        residual: added before the activation; the input's shape.

    Returns:
        A tensor of the input's shape and memory format, and of its dtype unless a
        residual of a wider one promotes it.

    Raises:
        TypeError: a residual that is no tensor, an activation's parameter that is
            no number.
        ValueError: an unknown activation, a parameter for one that takes none,
            a residual of another shape or device, one value per channel in training.
        RuntimeError: sizes or dtypes that PyTorch's batch norm refuses; under the
            backend "triton", whatever the kernels can't serve.
    """
    return tracked_batch_norm(
        input, running_mean, running_var, None, weight, bias, training, momentum, eps,
        activation, activation_param, residual,
    )  # fmt: skip


def tracked_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None = None,
    activation_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`batch_norm` that also counts batches: what the modules call.

    Args:
        num_batches_tracked: int64 scalar, incremented in training, or None.
        momentum: None for the cumulative average over the batches counted.
    """
    activation, param = _checked_activation(activation, activation_param)
    if residual is not None:
        check_residual(input, residual)
    # Neither `torch.compile` nor the plan cache knows one tensor in two places.
    if residual is input:
        residual = input.view_as(input)
    if bias is weight and isinstance(bias, Tensor):
        bias = bias.view_as(bias)
    tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
    options = (training, momentum, eps, activation, param)
    if support.bypass_reason() is None:
        # A cached plan skips the checks and serves any numbers, so check those here.
        sound = type(eps) is float and eps > 0 and type(momentum) in _MOMENTUM_TYPES
        plan = autograd.cached_plan(tensors, options) if HAS_TRITON and sound else None
        if plan is not None or _goes_to_kernels(*tensors, training, momentum, eps):
            return autograd.batch_norm(tensors, options, plan)

    num_batches_tracked = num_batches_tracked if training else None
    # First, for where a change is refused; a call that is refused is not counted.
    if num_batches_tracked is not None:
        if momentum is None:
            momentum = 1.0 / (float(num_batches_tracked) + 1.0)
        num_batches_tracked.add_(1)
    try:
        output = F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    except BaseException:
        if num_batches_tracked is not None:
            num_batches_tracked.sub_(1)
        raise
    if residual is not None:
        output = output + residual
    return ACTIVATIONS[activation].function(output, param)


def check_residual(input: Tensor, residual: Tensor) -> None:
    """Raises an error if the residual is no tensor of the input's shape and device."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a tensor or None, but got a {type(residual).__name__}")
    if residual.shape != input.shape:
        raise ValueError(
            f"residual must have the input's shape {tuple(input.shape)},"
            f" but got {tuple(residual.shape)}"
        )
    if residual.device != input.device:
        raise ValueError(
            f"residual must be on the input's device {input.device}, but got {residual.device}"
        )


def _checked_activation(name: str | None, param: float | None) -> tuple[str, float]:
    """Name and parameter, "none" and 0.0 where there is none."""
    if name is not None and not (isinstance(name, str) and name in ACTIVATIONS):
        known = ", ".join(known for known in ACTIVATIONS if known != "none")
        raise ValueError(f"activation must be None or one of {known}, but got {name!r}")
    activation = ACTIVATIONS[name or "none"]
    if param is None:
        return activation.name, activation.default
    if activation.parameter is None:
        raise ValueError(
            f"activation_param must be None for activation {name!r}, but got {param!r}"
        )
    # A tensor that requires a gradient would get none.
    number = isinstance(param, (float, int)) or (
        hasattr(param, "__float__") and not getattr(param, "requires_grad", False)
    )
    if not number:
        raise TypeError(f"activation_param must be a number or None, but got {param!r}")
    return activation.name, float(param)


def _goes_to_kernels(input: Tensor, *arguments) -> bool:
    """Whether the kernels take a call; PyTorch gets the others, to serve or to refuse."""
    reason = support.unsupported_reason(input, *arguments)
    if reason is None:
        return True
    if reason == support.PYTORCH_REFUSES:
        return False
    if get_backend() == "triton":
        raise RuntimeError(f"backend 'triton' can't serve this call because {reason}")
    if input.device.type in ("cuda", "xpu") and input.numel() and not torch.compiler.is_compiling():
        warn_fallback(reason)
    return False


_warned: set[str] = set()


def warn_fallback(reason: str) -> None:
    """Warns, once for each reason, that a GPU call goes to PyTorch; points to the caller's code."""
    if reason in _warned:
        return
    _warned.add(reason)
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fastbn.", "torch.")):
        frame, level = frame.f_back, level + 1
    message = f"fastbn falls back to PyTorch's batch norm because {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=level)

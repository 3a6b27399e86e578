"""`batch_norm`, which is `torch.nn.functional.batch_norm` with activation and residual."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import native
from .activations import ACTIVATIONS, reads_bias, saved_for
from .backend import get_backend
from .runtime import support
from .runtime.support import HAS_TRITON
from .strategy import get_strategy
from .tracking import track

if HAS_TRITON:
    from .autograd import BatchNorm
    from .runtime import execution, plan_cache, torch_ops
    from .runtime.execution_plan import plan_forward

# Values of these types need no further check before they reach a kernel.
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
    biased_running_var: bool = False,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Returns activation((input - mean) / sqrt(var + eps) * weight + bias + residual).

    This is `torch.nn.functional.batch_norm` (Ioffe and Szegedy, 2015), with
    activation and residual in the same kernels.

    Args:
        input: shape (N, C) or (N, C, ...), of dtype float16, bfloat16, float32
            or float64.
        running_mean, running_var: shape (C,). In training they are updated in
            place, the variance by the batch's unbiased variance; otherwise the
            input is normalised by them. None if they are not tracked.
        weight, bias: shape (C,); None stands for 1 and 0. Parameters and statistics
            have the input's dtype, or float32 with a half-precision input.
        training: whether the input is normalised by the batch's own mean and
            (biased) variance.
        momentum: running <- (1 - momentum) * running + momentum * batch. It may be a number of
            Python's or NumPy's, or a tensor without axes. If that is on a GPU, the host waits
            for it.
        eps: added to the variance; a number of the same types as `momentum`.
        activation: None or "none", or one of "relu", "leaky_relu", "silu",
            "gelu", "gelu_tanh", "hardswish", "relu6", "elu", "sigmoid", "tanh".
        activation_param: negative slope of "leaky_relu" (default 0.01), alpha
            of "elu" (default 1.0); the other activations take none.
        residual: tensor of the input's shape, added before the activation.
        biased_running_var: whether the running variance is updated by the batch's biased
            variance, as Keras does.
        skip_nonfinite: whether a batch of which any channel's mean or variance is NaN or
            infinite, in the running statistics' dtype, leaves the running statistics of all
            channels as they are, and in the modules is not counted. The device decides, and
            the host does not wait for it. Output and gradients don't depend on this.

    Returns:
        A tensor of the input's shape and memory format, and of its dtype unless a
        residual of a wider one promotes it.

    Raises:
        TypeError: the residual is no tensor, or the activation's parameter no number.
        ValueError: the activation is unknown or takes no parameter, the residual has
            another shape or device than the input, or the input has one value per
            channel in training.
        RuntimeError: PyTorch's batch norm refuses the sizes or dtypes, or, under the
            backend "triton", the kernels can't serve the call.
    """
    return tracked_batch_norm(
        input, running_mean, running_var, None, weight, bias, training, momentum, eps,
        activation, activation_param, residual, biased_running_var, skip_nonfinite,
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
    biased_running_var: bool = False,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Does what `batch_norm` does and counts batches; the modules call this function.

    Args:
        num_batches_tracked: int64 scalar, incremented in training, or None.
        momentum: as for `batch_norm`; None makes the running statistics averages over
            all batches counted.
    """
    counter = num_batches_tracked if training else None
    # If both running statistics are None there is nothing to protect; if one is, PyTorch refuses.
    skip = (
        bool(skip_nonfinite and training)
        and isinstance(running_mean, Tensor)
        and isinstance(running_var, Tensor)
    )
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        given = (input, running_mean, running_var, weight, bias, residual)
        # An override doesn't say whether it skips the batch, so decide here where batches count.
        decides = skip and counter is not None
        return track(
            lambda mean, var, momentum: handle_torch_function(
                batch_norm, given, input, mean, var, weight, bias, training, momentum, eps,
                activation=activation, activation_param=activation_param, residual=residual,
                biased_running_var=biased_running_var,
                skip_nonfinite=skip_nonfinite and not decides,
            ),
            running_mean, running_var, counter, momentum, decides,
        )  # fmt: skip
    activation, param = checked_activation(activation, activation_param)
    if residual is not None:
        check_residual(input, residual)
    numbers = type(eps) is float and type(momentum) in _MOMENTUM_TYPES
    if not numbers:
        momentum, eps = as_float(momentum), as_float(eps)
        numbers = type(eps) is float and type(momentum) in _MOMENTUM_TYPES
    correction = 0.0 if biased_running_var else 1.0
    # Neither `torch.compile` nor the plan cache can tell two uses of one tensor apart, so
    # the second use gets a view.
    if residual is input:
        residual = input.view_as(input)
    if bias is weight and isinstance(bias, Tensor):
        bias = bias.view_as(bias)
    tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
    if support.bypass_reason() is None:
        needs_grad, saved = _needs_grad(tensors), saved_for(activation, residual is not None)
        key = plan = None
        if HAS_TRITON and not plan_cache.must_use_dispatcher():
            key = _cache_key(tensors, training, momentum, activation, saved, skip, needs_grad)
            # A cached plan skips the checks and serves any numbers, so check these first.
            if numbers and eps > 0:
                plan = plan_cache.lookup(key, tensors)
        if plan is not None or goes_to_kernels(*tensors, training, momentum, eps):
            if plan is None and key is not None:
                plan = plan_cache.insert(key, tensors, plan_forward, *key[:5])
            options = (training, momentum, correction, eps, activation, param, skip)
            if needs_grad:
                kept = with_fixed_history(bias) if reads_bias(activation, saved) else bias
                if kept is not bias:
                    tensors = (*tensors[:3], kept, *tensors[4:])
                return BatchNorm.apply(*tensors, options, saved, plan)
            if plan is not None:
                return execution.run_forward(plan, tensors, *options[1:4], param)[0]
            return torch_ops.forward(tensors, *options, save_mask=False)[0]

    output = track(
        lambda mean, var, momentum: native.batch_norm(
            input, mean, var, weight, bias, training, momentum, eps, correction
        ),
        running_mean, running_var, counter, momentum,
        skip and numbers,
    )  # fmt: skip
    if residual is not None:
        output = output + residual
    return ACTIVATIONS[activation].function(output, param)


def with_fixed_history(bias: Tensor | None) -> Tensor | None:
    """Returns a bias whose gradient nothing changes that is done to it in place afterwards.

    The backward keeps the bias. A parameter has no history, and compilers copy what is changed.
    """
    if bias is None or torch.compiler.is_compiling() or bias.grad_fn is None:
        return bias
    return bias.clone()


def as_float(value: Any) -> Any:
    """Returns a number of any type as a float, and anything else unchanged."""
    if isinstance(value, Tensor):
        number = value.dim() == 0 and not (value.requires_grad or value.is_complex())
    else:
        number = isinstance(value, Real)
    return float(value) if number else value


def _needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Says whether autograd may ask for a gradient of one of the tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            # Arguments that are no tensors are refused later.
            if getattr(t, "requires_grad", False):
                return True
    return False


def _cache_key(
    tensors: Sequence[Tensor | None],
    training: bool,
    momentum: float | None,
    activation: str,
    saved: str | None,
    skip: bool,
    needs_grad: bool,
) -> tuple:
    """Returns a forward's key in the plan cache, which begins with the options of its plan."""
    save_mask = needs_grad and saved == "mask"
    # Guards don't compare inference mode. Outside of it, a forward must neither save nor update a
    # tensor made in it, so the key holds it. A backward does neither.
    inference = torch.is_inference_mode_enabled()
    # Guards compare shapes too, but a network has many, and a dictionary finds one faster.
    shape = getattr(tensors[0], "shape", None)
    options = (bool(training), momentum is None, activation, save_mask, skip)
    return *options, get_strategy(), inference, shape, *map(type, tensors)


def check_residual(input: Tensor, residual: Tensor) -> None:
    """Raises an error unless the residual is a tensor of the input's shape and device."""
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


def checked_activation(name: str | None, param: float | None) -> tuple[str, float]:
    """Returns the activation's name, "none" for None, and its parameter or the default."""
    if name is not None and not (isinstance(name, str) and name in ACTIVATIONS):
        known = ", ".join(known for known in ACTIVATIONS if known != "none")
        raise ValueError(f"activation must be None or one of {known}, but got {name!r}")
    activation = ACTIVATIONS[name or "none"]
    if param is None:
        # Return a literal where possible: with `dynamic=True` the compiler makes a variable of
        # any other number, and PyTorch 2.14 can't pass that to a second call.
        return activation.name, 0.0 if activation.parameter is None else activation.default
    if activation.parameter is None:
        raise ValueError(
            f"activation_param must be None for activation {name!r}, but got {param!r}"
        )
    # The kernels compute no gradient of the parameter, so don't take a tensor that requires one.
    number = isinstance(param, (float, int)) or (
        hasattr(param, "__float__") and not getattr(param, "requires_grad", False)
    )
    if not number:
        raise TypeError(f"activation_param must be a number or None, but got {param!r}")
    return activation.name, float(param)


def goes_to_kernels(input: Tensor, *arguments: Any) -> bool:
    """Says whether the kernels serve a call; PyTorch serves, or refuses, all others."""
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

"""The operators `torch.ops.fastbn.*`: forward and backward for PyTorch's dispatcher.

Compilers, dispatch modes and the profiler see calls as these operators, which do what
`execution` does. The operators have no gradients; `autograd` adds them. All tensors of
a call are on one device. Strides may be any, except those of tensors that the call
updates. An operator can't return None, so a result that was not asked for is an empty
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import execution
from .execution_plan import ExecutionPlan, ForwardTensors, plan_backward, plan_forward
from .layout import dense, mask_sizes, memory_format, statistics_dtype

_library = torch.library.Library("fastbn", "DEF")


def _or_empty(tensor: Tensor | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(0, dtype=dtype) if tensor is None else tensor


def _check_devices(*tensors: Tensor | None) -> None:
    """Raises an error for tensors on two devices, which a launcher would not notice."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"expected all tensors on one device, but got {names}")


def _check_statistics(statistics: Tensor) -> None:
    """Raises an error for a batch's statistics without the bias beside them."""
    if statistics.dim() != 2 or len(statistics) != 3:
        raise RuntimeError(
            f"expected statistics of shape (3, C), but got {tuple(statistics.shape)}"
        )


def _dense(plan: ExecutionPlan, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple([None if t is None else dense(t, plan.format) for t in tensors])


def _forward_train(
    x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, correction,
    eps, activation, param, save_mask, skip=False,
):  # fmt: skip
    given, written = (x, residual, weight, bias), (running_mean, running_var, num_batches_tracked)
    _check_devices(*given, *written)
    if not all(t is None or t.is_contiguous() for t in (running_mean, running_var)):
        raise RuntimeError("expected running statistics that are contiguous")
    plan = plan_forward((*given, *written), True, momentum is None, activation, save_mask, skip)
    tensors = (*_dense(plan, given), *written)
    y, statistics, mask = execution.run_forward(plan, tensors, momentum, correction, eps, param)
    return y, statistics, _or_empty(mask, x, torch.uint8)


def _forward_eval(x, residual, weight, bias, mean, var, eps, activation, param, save_mask):
    tensors = (x, residual, weight, bias, mean, var, None)
    _check_devices(*tensors)
    plan = plan_forward(tensors, False, False, activation, save_mask, False)
    y, _, mask = execution.run_forward(plan, _dense(plan, tensors), 0.0, 1.0, eps, param)
    return y, _or_empty(mask, x, torch.uint8)


def _backward(
    dy, x, residual, mask, weight, bias, statistics, var, eps, activation, param, wanted, format
):
    tensors = (dy, x, residual, mask, weight, bias, statistics, var)
    _check_devices(*tensors)
    if var is None:
        _check_statistics(statistics)
    plan = plan_backward(tensors, activation, tuple(wanted), format)
    dx, dr, dw, db = execution.run_backward(plan, _dense(plan, tensors), eps, param, wanted)
    dtype = execution.parameter_dtype(weight, bias, statistics)
    dw, db = _or_empty(dw, x, dtype), _or_empty(db, x, dtype)
    return _or_empty(dx, x), _or_empty(dr, x), dw, db


def _empty_like(x: Tensor, wanted: bool = True) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    return torch.empty_like(x, memory_format=memory_format(x))


def _empty_mask(x: Tensor, wanted: bool) -> Tensor:
    size = math.prod(mask_sizes(x)) if wanted else 0
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _fake_forward_train(
    x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, correction,
    eps, activation, param, save_mask, skip=False,
):  # fmt: skip
    statistics = x.new_empty((3, x.shape[1]), dtype=statistics_dtype(x.dtype))
    return _empty_like(x), statistics, _empty_mask(x, save_mask)


def _fake_forward_eval(x, residual, weight, bias, mean, var, eps, activation, param, save_mask):
    return _empty_like(x), _empty_mask(x, save_mask)


def _fake_backward(
    dy, x, residual, mask, weight, bias, statistics, var, eps, activation, param, wanted, format
):
    want_dx, want_dr, want_dw, want_db = wanted
    dtype = execution.parameter_dtype(weight, bias, statistics)
    dw = x.new_empty(x.shape[1] if want_dw else 0, dtype=dtype)
    db = x.new_empty(x.shape[1] if want_db else 0, dtype=dtype)
    if format is not None:
        x = x.contiguous(memory_format=format)
    return _empty_like(x, want_dx), _empty_like(x, want_dr), dw, db


def _register(name: str, signature: str, implementation: Callable, fake: Callable) -> Callable:
    _library.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"fastbn::{name}", fake, lib=_library)
    return getattr(torch.ops.fastbn, name).default


forward_train = _register(
    "forward_train",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float correction,"
    " float eps, str activation, float activation_param, bool save_mask, bool skip_nonfinite=False)"
    " -> (Tensor output, Tensor statistics, Tensor mask)",
    _forward_train,
    _fake_forward_train,
)
forward_eval = _register(
    "forward_eval",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
    " float eps, str activation, float activation_param, bool save_mask)"
    " -> (Tensor output, Tensor mask)",
    _forward_eval,
    _fake_forward_eval,
)
backward = _register(
    "backward",
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor? mask, Tensor? weight,"
    " Tensor? bias, Tensor statistics, Tensor? var, float eps, str activation,"
    " float activation_param, bool[4] wanted, MemoryFormat? format)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def forward(
    tensors: ForwardTensors, training: bool, momentum: float | None, correction: float,
    eps: float, activation: str, param: float, skip: bool, save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Calls the forward operator for training or for fixed statistics.

    Args and results are as for `plan_forward` and `execution.run_forward`, but the mask is an
    empty tensor unless it is saved.
    """
    if training:
        numbers = (momentum, correction, eps)
        return forward_train(*tensors, *numbers, activation, param, save_mask, skip)
    output, mask = forward_eval(*tensors[:6], eps, activation, param, save_mask)
    mean = tensors[4]
    assert mean is not None
    return output, mean, mask

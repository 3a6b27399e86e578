"""The operators `torch.ops.fastbn.*`: allocate, plan, launch. Nothing else launches a kernel.

They know nothing of gradients: `autograd.py` wraps them. What an operator does
not return (no mask asked for, a gradient not wanted) is an empty tensor, since
operator schemas have no optional results.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calls import Call, backward_call, forward_call
from .counters import counters
from .layout import mask_sizes, memory_format

_library = torch.library.Library("fastbn", "DEF")


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _in(format: torch.memory_format, tensor: Tensor | None) -> Tensor | None:
    """A tensor in a memory format, by a copy if need be."""
    return None if tensor is None else tensor.contiguous(memory_format=format)


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _empty_like(x: Tensor, wanted: bool = True) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    return torch.empty_like(x, memory_format=memory_format(x))


def _empty_mask(x: Tensor, wanted: bool) -> Tensor:
    size = math.prod(mask_sizes(x)) if wanted else 0
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _empty_parameter(parameter: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    """For the gradient of a weight or bias."""
    return (x if parameter is None else parameter).new_empty(x.shape[1] if wanted else 0)


def _partials(call: Call, x: Tensor) -> Tensor | None:
    """Memory for the partial results of a call that has any."""
    if call.schedule.strategy == "resident":
        return None
    return torch.empty(call.partials, dtype=call.statistics, device=x.device)


def _given(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _written(*tensors: Tensor | None) -> None:
    """Tells autograd, which checks saved tensors for changes, of a kernel's writes."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _forward_train(
    x, residual, weight, bias, running_mean, running_var, batches_tracked, momentum, eps,
    activation, param, save_mask,
):  # fmt: skip
    cumulative = momentum is None and batches_tracked is not None
    call = forward_call(
        x.shape, x.stride(), x.dtype, x.device, residual is not None, save_mask, True, activation,
        cumulative,
    )  # fmt: skip
    # All memory is there before anything is written: what runs out leaves no trace.
    x, residual = _in(call.format, x), _in(call.format, residual)
    weight, bias = _dense(weight), _dense(bias)
    y = torch.empty_like(x, memory_format=call.format)
    mask = torch.empty(call.mask_bytes if save_mask else 0, dtype=torch.uint8, device=x.device)
    mean = torch.empty(x.shape[1], dtype=call.statistics, device=x.device)
    rstd = torch.empty_like(mean)
    partials = _partials(call, x)
    arrivals, tickets = counters(x.device, call.blocks)
    signs = mask if save_mask else None
    momentum = 0.0 if momentum is None else momentum
    statistics = (mean, rstd, running_mean, running_var, batches_tracked)
    if call.whole is None:
        call.reduce((x, *statistics, partials, arrivals), momentum, eps)
        call.apply((x, residual, y, signs, weight, bias, mean, rstd), eps, param)
    else:
        shared = (arrivals,) if partials is None else (partials, arrivals, tickets)
        tensors = (x, residual, y, signs, weight, bias, *statistics, *shared)
        call.whole(tensors, momentum, eps, param)
    _written(running_mean, running_var, batches_tracked)
    return y, mean, rstd, mask


def _forward_eval(x, residual, weight, bias, mean, var, eps, activation, param, save_mask):
    call = forward_call(
        x.shape, x.stride(), x.dtype, x.device, residual is not None, save_mask, False, activation,
        False,
    )  # fmt: skip
    x, residual = _in(call.format, x), _in(call.format, residual)
    y = torch.empty_like(x, memory_format=call.format)
    mask = torch.empty(call.mask_bytes if save_mask else 0, dtype=torch.uint8, device=x.device)
    tensors = (
        x, residual, y, mask if save_mask else None, _dense(weight), _dense(bias), _dense(mean),
        _dense(var),
    )  # fmt: skip
    call.apply(tensors, eps, param)
    return y, mask


def _backward(
    dy, x, residual, mask, weight, bias, mean, rstd, eps, activation, param, frozen, wanted
):
    saves = "mask" if mask.numel() else None if residual is None else "residual"
    call = backward_call(x.shape, x.stride(), x.dtype, x.device, saves, not frozen, activation)
    want_dx, want_dw, want_db, want_dr = wanted
    dy, x, residual = _in(call.format, dy), _in(call.format, x), _in(call.format, residual)
    weight, bias, mean, rstd = _dense(weight), _dense(bias), _dense(mean), _dense(rstd)
    dx, dr = _empty_like(x, want_dx), _empty_like(x, want_dr)
    dw, db = _empty_parameter(weight, x, want_dw), _empty_parameter(bias, x, want_db)
    if not any(wanted):
        return dx, dw, db, dr
    inputs = (dy, x, residual, _given(mask), weight, bias, mean, rstd)
    parameters, gradients = (_given(dw), _given(db)), (_given(dx), _given(dr))
    if call.schedule.strategy == "resident":
        call.whole((*inputs, *parameters, *gradients), param)
        return dx, dw, db, dr
    need_sums = want_dw or want_db or (want_dx and not frozen)
    sums = partials = arrivals = None
    if need_sums:
        sums = torch.empty(2 * x.shape[1], dtype=call.statistics, device=x.device)
        partials = _partials(call, x)
        arrivals, tickets = counters(x.device, call.blocks)
    if frozen:
        call.reduce((*inputs, *parameters, sums, *gradients, partials, arrivals), eps, param)
    elif call.whole is not None and want_dx:
        call.whole((*inputs, *parameters, sums, *gradients, partials, arrivals, tickets), param)
    else:
        if need_sums:
            call.reduce((*inputs, *parameters, sums, None, None, partials, arrivals), eps, param)
        if want_dx or want_dr:
            call.apply((*inputs, sums, *gradients), param)
    return dx, dw, db, dr


def _fake_forward_train(
    x, residual, weight, bias, running_mean, running_var, batches_tracked, momentum, eps,
    activation, param, save_mask,
):  # fmt: skip
    mean = torch.empty(x.shape[1], dtype=_statistics_dtype(x), device=x.device)
    return _empty_like(x), mean, torch.empty_like(mean), _empty_mask(x, save_mask)


def _fake_forward_eval(x, residual, weight, bias, mean, var, eps, activation, param, save_mask):
    return _empty_like(x), _empty_mask(x, save_mask)


def _fake_backward(
    dy, x, residual, mask, weight, bias, mean, rstd, eps, activation, param, frozen, wanted
):
    want_dx, want_dw, want_db, want_dr = wanted
    dw, db = _empty_parameter(weight, x, want_dw), _empty_parameter(bias, x, want_db)
    return _empty_like(x, want_dx), dw, db, _empty_like(x, want_dr)


def _register(name: str, signature: str, implementation, fake):
    _library.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"fastbn::{name}", fake, lib=_library)
    return getattr(torch.ops.fastbn, name).default


forward_train = _register(
    "forward_train",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps,"
    " str activation, float activation_param, bool save_mask)"
    " -> (Tensor output, Tensor mean, Tensor rstd, Tensor mask)",
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
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor mask, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor rstd, float eps, str activation, float activation_param,"
    " bool frozen, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

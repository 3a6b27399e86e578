"""What the operators do: allocate, and launch what the call's plan says.

What a call does not ask for (no mask, a gradient not wanted) is None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Call, backward_call, forward_call
from .counters import counters


def _in(format: torch.memory_format, tensor: Tensor | None) -> Tensor | None:
    """A tensor in a memory format, by a copy if need be."""
    return None if tensor is None else tensor.contiguous(memory_format=format)


def _kind(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _empty_mask(call: Call, x: Tensor, wanted: bool) -> Tensor | None:
    return torch.empty(call.mask_bytes, dtype=torch.uint8, device=x.device) if wanted else None


def _empty_parameter(parameter: Tensor | None, x: Tensor, wanted: bool) -> Tensor | None:
    """For the gradient of a weight or bias."""
    if not wanted:
        return None
    return x.new_empty(x.shape[1]) if parameter is None else torch.empty_like(parameter)


def _written(*tensors: Tensor | None) -> None:
    """Tells autograd, which checks saved tensors for changes, of a kernel's writes."""
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def forward_train(
    x, residual, weight, bias, running_mean, running_var, batches_tracked, momentum, eps,
    activation, param, save_mask,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Output, (2, C) mean and rstd, and packed mask; running statistics and counter are updated."""
    cumulative = momentum is None and batches_tracked is not None
    call = forward_call(
        x.shape, x.stride(), x.dtype, x.device, residual is not None, save_mask, True, activation,
        cumulative, _kind(residual), _kind(weight), _kind(bias), _kind(running_mean),
        _kind(running_var), batches_tracked is None,
    )  # fmt: skip
    # All memory is there before anything is written: what runs out leaves no trace.
    x, residual = _in(call.format, x), _in(call.format, residual)
    weight, bias = _dense(weight), _dense(bias)
    y = torch.empty_like(x, memory_format=call.format)
    mask = _empty_mask(call, x, save_mask)
    statistics = torch.empty((2, x.shape[1]), dtype=call.statistics, device=x.device)
    momentum = 0.0 if momentum is None else momentum
    outputs = (x, residual, y, mask, weight, bias)
    written = (statistics, running_mean, running_var, batches_tracked)
    if call.schedule.strategy == "resident":
        arrivals = counters(x.device, 1).arrivals if cumulative else None
        call.whole((*outputs, *written, arrivals), momentum, eps, param)
    else:
        arrivals, tickets, _ = counters(x.device, call.blocks)
        partials = torch.empty(call.partials, dtype=call.statistics, device=x.device)
        if call.whole is not None:
            tensors = (*outputs, *written, partials, arrivals, tickets)
            call.whole(tensors, momentum, eps, param)
        else:
            call.reduce((x, *written, partials, arrivals), momentum, eps)
            call.apply((*outputs, statistics, None), eps, param)
    _written(running_mean, running_var, batches_tracked)
    return y, statistics, mask


def forward_eval(
    x, residual, weight, bias, mean, var, eps, activation, param, save_mask
) -> tuple[Tensor, Tensor | None]:
    """Output and packed mask, with given statistics."""
    call = forward_call(
        x.shape, x.stride(), x.dtype, x.device, residual is not None, save_mask, False, activation,
        False, _kind(residual), _kind(weight), _kind(bias), mean.dtype, var.dtype,
    )  # fmt: skip
    x, residual = _in(call.format, x), _in(call.format, residual)
    y, mask = torch.empty_like(x, memory_format=call.format), _empty_mask(call, x, save_mask)
    parameters = (_dense(weight), _dense(bias), _dense(mean), _dense(var))
    call.apply((x, residual, y, mask, *parameters), eps, param)
    return y, mask


def backward(
    dy, x, residual, mask, weight, bias, statistics, var, eps, activation, param, wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight, bias and residual, each where it is wanted.

    Args:
        statistics: a batch's (2, C) mean and rstd, or the frozen mean.
        var: the frozen variance, or None.
    """
    saves = "mask" if mask is not None else None if residual is None else "residual"
    call = backward_call(
        x.shape, x.stride(), x.dtype, x.device, saves, var is None, activation,
        dy.dtype, _kind(residual), _kind(weight), _kind(bias), statistics.dtype, _kind(var),
        *wanted,
    )  # fmt: skip
    want_dx, want_dw, want_db, want_dr = wanted
    dy, x, residual = _in(call.format, dy), _in(call.format, x), _in(call.format, residual)
    weight, bias, statistics, var = _dense(weight), _dense(bias), _dense(statistics), _dense(var)
    dx = torch.empty_like(x, memory_format=call.format) if want_dx else None
    dr = torch.empty_like(x, memory_format=call.format) if want_dr else None
    dw, db = _empty_parameter(weight, x, want_dw), _empty_parameter(bias, x, want_db)
    inputs = (dy, x, residual, mask, weight, bias, statistics)
    need_sums = want_dw or want_db or (want_dx and var is None)
    if not (need_sums or want_dx or want_dr):
        return dx, dw, db, dr
    if call.schedule.strategy == "resident":
        call.whole((*inputs, dw, db, dx, dr), param)
        return dx, dw, db, dr
    sums = partials = arrivals = None
    if need_sums:
        sums = torch.empty(2 * x.shape[1], dtype=call.statistics, device=x.device)
        partials = torch.empty(call.partials, dtype=call.statistics, device=x.device)
        arrivals, tickets, _ = counters(x.device, call.blocks)
    if var is not None:
        call.reduce((*inputs, var, dw, db, sums, dx, dr, partials, arrivals), eps, param)
    elif call.whole is not None and want_dx:
        call.whole((*inputs, dw, db, sums, dx, dr, partials, arrivals, tickets), param)
    else:
        if need_sums:
            call.reduce((*inputs, None, dw, db, sums, None, None, partials, arrivals), eps, param)
        if want_dx or want_dr:
            call.apply((*inputs, sums, dx, dr), param)
    return dx, dw, db, dr

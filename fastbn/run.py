"""What a planned call does: allocate, and launch what the plan says.

All tensors are of one device and lie in memory as the kernels take them
(`layout.dense`). What a call does not ask for (no mask, a gradient not wanted) is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .calls import Call
from .counters import counters


def parameter_like(weight: Tensor | None, bias: Tensor | None, statistics: Tensor) -> Tensor:
    """What the gradients of weight and bias are like; the backward may have kept neither."""
    if weight is None:
        weight = bias
    return statistics.flatten()[: statistics.shape[-1]] if weight is None else weight


def _empty(call: Call, x: Tensor, rows: int, columns: int) -> Tensor:
    """For statistics and their sums."""
    # With strides given PyTorch is faster.
    return x.new_empty_strided((rows, columns), (columns, 1), dtype=call.statistics)


def forward(
    call: Call,
    tensors: Sequence[Tensor | None],
    momentum: float | None,
    eps: float,
    param: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, (2, C) mean and rstd (or the frozen mean), and packed mask.

    In training, running statistics and counter are updated.

    Args:
        tensors: as for `calls.forward_call`.
    """
    x, residual, weight, bias, running_mean, running_var, batches_tracked = tensors
    # All memory is there before anything is written: what runs out leaves no trace.
    y, mask = torch.empty_like(x, memory_format=call.format), None
    if call.mask_bytes:
        mask = torch.empty(call.mask_bytes, dtype=torch.uint8, device=x.device)
    outputs = (x, residual, y, mask, weight, bias)
    if call.schedule.strategy == "frozen":
        call.apply((*outputs, running_mean, running_var), eps, param)
        return y, running_mean, mask

    statistics = _empty(call, x, 2, x.shape[1])
    cumulative = momentum is None
    momentum = 0.0 if cumulative else momentum
    written = (statistics, running_mean, running_var, batches_tracked)
    if call.schedule.strategy == "resident":
        arrivals = counters(x.device, 1).arrivals if cumulative else None
        call.whole((*outputs, *written, arrivals), momentum, eps, param)
    else:
        arrivals, tickets, _ = counters(x.device, call.blocks)
        partials = _empty(call, x, 1, call.partials)
        if call.whole is not None:
            whole = (*outputs, *written, partials, arrivals, tickets)
            call.whole(whole, momentum, eps, param)
        else:
            first, second = (x, *written, partials, arrivals), (*outputs, statistics, None)
            call.apply.check(second)  # before the first has written
            call.reduce(first, momentum, eps)
            call.apply(second, eps, param)
    # Autograd checks saved tensors for changes, and does not see a kernel's.
    increment_version([t for t in written[1:] if t is not None])
    return y, statistics, mask


def backward(
    call: Call,
    tensors: Sequence[Tensor | None],
    eps: float,
    param: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, residual, weight and bias, each where it is wanted.

    Args:
        tensors: as for `calls.backward_call`.
    """
    dy, x, residual, mask, weight, bias, statistics, var = tensors
    want_dx, want_dr, want_dw, want_db = wanted
    dx = torch.empty_like(x, memory_format=call.format) if want_dx else None
    dr = torch.empty_like(x, memory_format=call.format) if want_dr else None
    parameter = parameter_like(weight, bias, statistics)
    dw = torch.empty_like(parameter) if want_dw else None
    db = torch.empty_like(parameter) if want_db else None
    inputs = (dy, x, residual, mask, weight, bias, statistics)
    if not any(wanted):
        return dx, dr, dw, db
    if call.schedule.strategy == "resident":
        call.whole((*inputs, dw, db, dx, dr), param)
        return dx, dr, dw, db
    sums = partials = arrivals = None
    need_sums = want_dw or want_db or (want_dx and var is None)
    if need_sums:
        sums = _empty(call, x, 2, x.shape[1])
        partials = _empty(call, x, 1, call.partials)
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
    return dx, dr, dw, db

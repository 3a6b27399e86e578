"""Runs execution plans: allocates memory and launches kernels.

All tensors of a call are on one device and dense in the plan's memory format
(`layout.dense`). A result that the call does not ask for is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .execution_plan import BackwardTensors, ExecutionPlan, ForwardTensors
from .workspace import get_workspace


def run_forward(
    plan: ExecutionPlan,
    tensors: ForwardTensors,
    momentum: float | None,
    correction: float,
    eps: float,
    param: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs a forward, and in training updates running statistics and num_batches_tracked.

    Args:
        plan: made by `plan_forward`.
        tensors: as for `plan_forward`.
        momentum: the batch's share of the running statistics, None for averages over
            all batches.
        correction: 1 for unbiased running variances, 0 for biased ones.
        eps: added to the variance.
        param: the activation's parameter.

    Returns:
        The output; the (3, C) mean, rstd and bias, or the fixed mean; and the packed mask or
        None.
    """
    x, residual, weight, bias, running_mean, running_var, num_batches_tracked = tensors
    # Allocate before launching, so that running out of memory changes nothing.
    y, mask = plan.allocate(*plan.output), None
    if plan.mask_bytes:
        mask = plan.allocate((plan.mask_bytes,), (1,), torch.uint8)
    outputs = (x, residual, y, mask, weight, bias)
    if plan.schedule.strategy == "fixed-stats":
        assert plan.apply is not None
        assert running_mean is not None
        plan.apply((*outputs, running_mean, running_var), eps, param)
        return y, running_mean, mask

    channels = plan.channels
    statistics = plan.allocate((3, channels), (channels, 1), plan.statistics)
    cumulative = momentum is None
    rate = 0.0 if momentum is None else momentum
    variances = plan.allocate((channels,), (1,), plan.statistics) if plan.skip else None
    written = (statistics, running_mean, running_var, num_batches_tracked, variances)
    if plan.schedule.strategy == "resident":
        assert plan.single_launch is not None
        counter = get_workspace(x.device, 1).arrivals if cumulative or plan.skip else None
        plan.single_launch((*outputs, *written, counter), rate, correction, eps, param)
    else:
        workspace = get_workspace(x.device, plan.groups, plan.partial_bytes)
        arrivals, tickets = workspace.arrivals, workspace.tickets
        partials = workspace.partials[plan.statistics]
        if plan.single_launch is not None:
            arguments = (*outputs, *written, partials, arrivals, tickets)
            plan.single_launch(arguments, rate, correction, eps, param)
        else:
            assert plan.reduce is not None
            assert plan.apply is not None
            first = (x, bias, *written, partials, arrivals)
            # The statistics hold the bias.
            second = (x, residual, y, mask, weight, None, statistics, None)
            # Check the second launch's tensors before the first launch writes anything.
            plan.apply.check(second)
            plan.reduce(first, rate, correction, eps)
            plan.apply(second, eps, param)
    # Autograd notices changes of saved tensors by their version, which a kernel doesn't raise.
    increment_version([t for t in written[1:4] if t is not None])
    return y, statistics, mask


def run_backward(
    plan: ExecutionPlan,
    tensors: BackwardTensors,
    eps: float,
    param: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Runs a backward.

    Args:
        plan: made by `plan_backward`.
        tensors: as for `plan_backward`.
        eps: added to the variance.
        param: the activation's parameter.
        wanted: which gradients are wanted, of input, residual, weight and bias.

    Returns:
        The gradients of input, residual, weight and bias, None for each that is not
        wanted.
    """
    dy, x, residual, mask, weight, bias, statistics, var = tensors
    want_dx, want_dr, want_dw, want_db = wanted
    channels, dtype = plan.channels, parameter_dtype(weight, bias, statistics)
    dx = plan.allocate(*plan.output) if want_dx else None
    dr = plan.allocate(*plan.output) if want_dr else None
    dw = plan.allocate((channels,), (1,), dtype) if want_dw else None
    db = plan.allocate((channels,), (1,), dtype) if want_db else None
    inputs = (dy, x, residual, mask, weight, statistics)
    if not any(wanted):
        return dx, dr, dw, db
    if plan.schedule.strategy == "resident":
        assert plan.single_launch is not None
        plan.single_launch((*inputs, dw, db, dx, dr), param)
        return dx, dr, dw, db
    sums = partials = arrivals = None
    need_sums = want_dw or want_db or (want_dx and var is None)
    if need_sums:
        # The second of two launches reads the sums, so they can't be in the workspace.
        sums = plan.allocate((2, channels), (channels, 1), plan.statistics)
        workspace = get_workspace(x.device, plan.groups, plan.partial_bytes)
        arrivals, tickets = workspace.arrivals, workspace.tickets
        partials = workspace.partials[plan.statistics]
    if var is not None:
        assert plan.reduce is not None
        plan.reduce((*tensors, dw, db, sums, dx, dr, partials, arrivals), eps, param)
    elif plan.single_launch is not None and want_dx:
        plan.single_launch((*inputs, dw, db, sums, dx, dr, partials, arrivals, tickets), param)
    else:
        if need_sums:
            assert plan.reduce is not None
            plan.reduce((*tensors, dw, db, sums, None, None, partials, arrivals), eps, param)
        if want_dx or want_dr:
            assert plan.apply is not None
            plan.apply((*inputs, sums, None, dx, dr), param)
    return dx, dr, dw, db


def parameter_dtype(weight: Tensor | None, bias: Tensor | None, statistics: Tensor) -> torch.dtype:
    """Returns the dtype that the gradients of weight and bias have.

    If the backward has kept neither of the two, the dtype is that of the statistics, and autograd
    rounds the gradients.
    """
    for parameter in (weight, bias):
        if parameter is not None:
            return parameter.dtype
    return statistics.dtype

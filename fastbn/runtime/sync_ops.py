"""The operators of batch norm whose statistics several processes share.

The processes exchange the results of `moments` before `merge`, and those of `sums` before
`gradients`; `fastbn.sync` does that. As in `torch_ops`, an operator returns an empty tensor for
a result that was not asked for. An input may be empty: its process takes part all the same.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from .execution import parameter_dtype
from .execution_plan import plan_backward, plan_forward, plan_merge
from .layout import dense, statistics_dtype
from .torch_ops import (
    _check_devices,
    _check_statistics,
    _dense,
    _empty_like,
    _empty_mask,
    _or_empty,
    _register,
)
from .workspace import get_workspace


def _moments(x):
    if x.numel() == 0:
        return x.new_zeros(3 * x.shape[1] + 1, dtype=statistics_dtype(x.dtype))
    plan = plan_forward((x, *[None] * 6), True, False, "none", False, False, True)
    workspace = get_workspace(x.device, plan.groups, plan.partial_bytes)
    found = x.new_empty(3 * x.shape[1] + 1, dtype=plan.statistics)
    partials = workspace.partials[plan.statistics]
    assert plan.reduce is not None
    plan.reduce((dense(x, plan.format), found, partials, workspace.arrivals))
    return found


def _merge(
    gathered, bias, running_mean, running_var, num_batches_tracked, momentum, correction, eps, skip
):
    written = (running_mean, running_var, num_batches_tracked)
    _check_devices(gathered, bias, *written)
    bias = None if bias is None else bias.contiguous()
    if not all(t is None or t.is_contiguous() for t in (gathered, *written)):
        raise RuntimeError("expected moments and running statistics that are contiguous")
    statistics = gathered.new_empty(3, gathered.shape[1] // 3)
    count = gathered.new_empty(1)
    cumulative = momentum is None
    variances = torch.empty_like(statistics[1]) if skip else None
    counter = get_workspace(gathered.device, 1).arrivals if cumulative or skip else None
    launch = plan_merge(gathered, (bias, *written), cumulative, skip)
    rate = 0.0 if cumulative else momentum
    given = (gathered, bias, statistics, count, *written, variances, counter)
    launch(given, rate, correction, eps)
    # Autograd notices changes of saved tensors by their version, which a kernel doesn't raise.
    increment_version([t for t in written if t is not None])
    return statistics, count


def _normalise(x, residual, weight, statistics, activation, param, save_mask):
    tensors = (x, residual, weight)
    _check_devices(*tensors, statistics)
    _check_statistics(statistics)
    y, mask = _fake_normalise(x, residual, weight, statistics, activation, param, save_mask)
    if x.numel():
        absent = [None] * 4
        plan = plan_forward((*tensors, *absent), True, False, activation, save_mask, False, True)
        x, residual, weight = _dense(plan, tensors)
        assert plan.apply is not None
        packed = mask if save_mask else None
        plan.apply((x, residual, y, packed, weight, None, statistics, None), 0.0, param)
    return y, mask


def _sums(dy, x, residual, mask, weight, statistics, activation, param, wanted, format):
    tensors = (dy, x, residual, mask, weight, None, statistics, None)
    _check_devices(*tensors)
    _check_statistics(statistics)
    _, _, want_dw, want_db = wanted
    channels, dtype = x.shape[1], parameter_dtype(weight, None, statistics)
    # The sums of an empty input are 0.
    make = x.new_empty if x.numel() else x.new_zeros
    sums = make((2, channels), dtype=statistics.dtype)
    dw, db = (make(channels, dtype=dtype) if want else None for want in (want_dw, want_db))
    if x.numel():
        plan = plan_backward(tensors, activation, tuple(wanted), format, True)
        workspace = get_workspace(x.device, plan.groups, plan.partial_bytes)
        shared = workspace.partials[plan.statistics], workspace.arrivals
        assert plan.reduce is not None
        plan.reduce((*_dense(plan, tensors), dw, db, sums, None, None, *shared), 0.0, param)
    return sums, _or_empty(dw, x, dtype), _or_empty(db, x, dtype)


def _gradients(
    dy, x, residual, mask, weight, statistics, sums, count, activation, param, wanted, format
):
    tensors = (dy, x, residual, mask, weight, statistics)
    _check_devices(*tensors, sums, count)
    _check_statistics(statistics)
    dx, dr = _fake_gradients(*tensors, sums, count, activation, param, wanted, format)
    if x.numel():
        want_dx, want_dr, *_ = wanted
        planned = (*tensors[:5], None, statistics, None)
        plan = plan_backward(planned, activation, tuple(wanted), format, True)
        results = (dx if want_dx else None, dr if want_dr else None)
        assert plan.apply is not None
        plan.apply((*_dense(plan, tensors), sums, count, *results), param)
    return dx, dr


def _fake_moments(x):
    return x.new_empty(3 * x.shape[1] + 1, dtype=statistics_dtype(x.dtype))


def _fake_merge(
    gathered, bias, running_mean, running_var, num_batches_tracked, momentum, correction, eps, skip
):
    return gathered.new_empty(3, gathered.shape[1] // 3), gathered.new_empty(1)


def _fake_normalise(x, residual, weight, statistics, activation, param, save_mask):
    return _empty_like(x), _empty_mask(x, save_mask and x.numel() > 0)


def _fake_sums(dy, x, residual, mask, weight, statistics, activation, param, wanted, format):
    _, _, want_dw, want_db = wanted
    dtype = parameter_dtype(weight, None, statistics)
    dw = x.new_empty(x.shape[1] if want_dw else 0, dtype=dtype)
    db = x.new_empty(x.shape[1] if want_db else 0, dtype=dtype)
    return torch.empty_like(statistics[:2]), dw, db


def _fake_gradients(
    dy, x, residual, mask, weight, statistics, sums, count, activation, param, wanted, format
):
    want_dx, want_dr, *_ = wanted
    if format is not None:
        x = x.contiguous(memory_format=format)
    return _empty_like(x, want_dx), _empty_like(x, want_dr)


moments = _register("sync_moments", "(Tensor input) -> Tensor", _moments, _fake_moments)
merge = _register(
    "sync_merge",
    "(Tensor gathered, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, float? momentum, float correction, float eps, bool skip)"
    " -> (Tensor statistics, Tensor count)",
    _merge,
    _fake_merge,
)
normalise = _register(
    "sync_normalise",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor statistics,"
    " str activation, float activation_param, bool save_mask) -> (Tensor output, Tensor mask)",
    _normalise,
    _fake_normalise,
)
_SAVED = (
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor? mask, Tensor? weight,"
    " Tensor statistics,"
)
_OPTIONS = " str activation, float activation_param, bool[4] wanted, MemoryFormat? format)"
sums = _register("sync_sums", f"{_SAVED}{_OPTIONS} -> (Tensor, Tensor, Tensor)", _sums, _fake_sums)
gradients = _register(
    "sync_gradients",
    f"{_SAVED} Tensor sums, Tensor count,{_OPTIONS} -> (Tensor, Tensor)",
    _gradients,
    _fake_gradients,
)

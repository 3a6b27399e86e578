"""The steps of `runtime/sync_ops.py` by PyTorch's operations, with the same arguments and results.

Processes may take the steps in either way, since they exchange the same numbers. Only the
mask differs: it has a boolean for each element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..reference import accumulated, axes_of, per_channel
from ..runtime.layout import memory_format


def moments(x: Tensor) -> Tensor:
    """Returns the channels' means, what rounding took from these, sums of squares, and count.

    Returns:
        Shape (3 * C + 1,); zeros for an empty input. The sums of squares are those of
        differences from the mean, and the count is how many values a channel has.
    """
    z, axes = accumulated(x), axes_of(x)
    if x.numel() == 0:
        return z.new_zeros(3 * x.shape[1] + 1)
    # Sums of huge values overflow in `torch.mean`. Sums of their differences may overflow below.
    _, mean = torch.var_mean(z, axes, correction=0)
    centred = z - per_channel(mean, z)
    rest = centred.mean(axes)
    rest = torch.where(rest.isfinite(), rest, 0.0)
    m2 = (centred - per_channel(rest, z)).square().sum(axes)
    return torch.cat([mean, rest, m2, mean.new_full((1,), x.numel() // x.shape[1])])


def merge(
    gathered: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    correction: float,
    eps: float,
    skip: bool,
) -> tuple[Tensor, Tensor]:
    """Merges moments (Chan, Golub and LeVeque, 1983), and updates the running statistics.

    Args:
        gathered: shape (processes, 3 * C + 1), the moments of each process.
        skip: whether a batch with statistics that are not finite updates and counts nothing.

    Returns:
        The (3, C) mean and 1 / sqrt(var + eps) of all values and the bias, or zeros without
        one; and how many values each channel has.
    """
    means, rests, m2s = gathered[:, :-1].chunk(3, dim=1)
    counts = gathered[:, -1:]
    count = counts.sum()
    # A batch without any value has no statistics; dividing by 1 keeps them from being NaN.
    some = count.clamp(min=1)
    shares = counts / some
    about = (shares * means).sum(0)
    # A process without values has no mean, so what it sent as such must not count.
    away = torch.where(counts > 0, (means - about) + rests, 0.0)
    rest = (shares * away).sum(0)
    squares = (counts * away * away).sum(0)
    # Where squares overflow the variance is infinite, as in one process.
    overflows = squares.isinf() & rest.isfinite()
    between = torch.where(overflows, squares, (squares - count * rest * rest).clamp(min=0))
    mean, m2 = about + rest, m2s.sum(0) + between
    rate: float | Tensor = 0.0 if momentum is None else momentum
    if momentum is None and num_batches_tracked is not None:
        rate = 1.0 / (num_batches_tracked + 1).to(mean.dtype)
    unbiased = m2 / (count - correction)
    usable = count > 0
    if skip:
        # As in the kernels, statistics must be finite in the running statistics' dtype too.
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                usable = usable & batch.to(running.dtype).isfinite().all()
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            updated = (1.0 - rate) * running.to(mean.dtype) + rate * batch
            running.copy_(torch.where(usable, updated, running))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(usable.to(num_batches_tracked.device) if skip else 1)
    kept = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return torch.stack([mean, torch.rsqrt(m2 / some + eps), kept]), count.reshape(1)


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor,
    activation: str,
    param: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Returns activation((x - mean) * rstd * weight + bias + residual) and the argument's signs."""
    z = _argument(_centred(x, statistics), residual, weight, statistics)
    y = ACTIVATIONS[activation].function(z, param)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mask = z.new_empty(0, dtype=torch.bool)
    if save_mask:
        # PyTorch takes the derivative of ReLU at NaN for 1, and that of leaky ReLU for the slope.
        mask = ~(z <= 0) if activation == "relu" else z > 0
    return _as_result(y, x, dtype), mask


def sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor,
    activation: str,
    param: float,
    wanted: Sequence[bool],
    format: torch.memory_format | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sums of g and of g * (x - mean), and the gradients of weight and bias.

    Here g is the gradient before the activation.
    """
    centred, axes = _centred(x, statistics), axes_of(x)
    g = _gradient(dy, centred, residual, mask, weight, statistics, activation, param)
    sum_g, sum_gx = g.sum(axes), (g * centred).sum(axes)
    return torch.stack([sum_g, sum_gx]), sum_gx * statistics[1], sum_g


def gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor,
    totals: Tensor,
    count: Tensor,
    activation: str,
    param: float,
    wanted: Sequence[bool],
    format: torch.memory_format | None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of input and residual, from the totals of `sums` over all processes.

    With M values to a channel in all processes, the gradient of the input is

    dx = weight * rstd * (g - sum(g) / M - (x - mean) * rstd^2 * sum(g * (x - mean)) / M)
    """
    centred, rstd = _centred(x, statistics), statistics[1]
    g = _gradient(dy, centred, residual, mask, weight, statistics, activation, param)
    constant, slope = totals / count
    dx = g - per_channel(constant, g) - centred * per_channel(slope * rstd * rstd, g)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    return _as_result(dx * per_channel(scale, g), x, x.dtype), g


def _as_result(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a result of a dtype in the memory format that the input gives it."""
    # PyTorch 2.11's compiler loses the gradient of what `to` or `contiguous` returns unchanged.
    if y.dtype is not dtype:
        y = y.to(dtype)
    format = memory_format(x)
    return y if y.is_contiguous(memory_format=format) else y.contiguous(memory_format=format)


def _centred(x: Tensor, statistics: Tensor) -> Tensor:
    z = accumulated(x)
    return z - per_channel(statistics[0], z)


def _argument(
    centred: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor,
) -> Tensor:
    """Returns the activation's argument."""
    _, rstd, bias = statistics
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    z = centred * per_channel(scale, centred) + per_channel(bias, centred)
    return z if residual is None else z + residual


def _gradient(
    dy: Tensor,
    centred: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor,
    activation: str,
    param: float,
) -> Tensor:
    """Returns the gradient before the activation."""
    g = accumulated(dy)
    if activation == "none":
        return g
    if mask is not None:
        z = 2 * mask.to(g.dtype) - 1
    else:
        z = _argument(centred, residual, weight, statistics)
    return ACTIVATIONS[activation].derivative(g, z, param)

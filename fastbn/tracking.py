"""Updates running statistics and counts batches where the kernels don't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from .reference import accumulated


def track(
    call: Callable[[Any, Any, Any], Tensor],
    running_mean: Any,
    running_var: Any,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip: bool,
) -> Tensor:
    """Returns what a batch norm returns, and counts its batch.

    Args:
        call: the batch norm, which updates the running mean and variance that it is given
            by the share of the batch that it is given.
        running_mean, running_var: the running statistics to update.
        num_batches_tracked: the count of batches to increment, or None.
        momentum: the share of the batch; None, with a count of batches, makes the running
            statistics averages.
        skip: whether a batch with statistics that are not finite is ignored: it updates no
            running statistics and is not counted. If so, running mean and variance are tensors.
    """
    averages = momentum is None and num_batches_tracked is not None
    if skip and (averages or momentum is not None):
        return _skip_nonfinite(call, running_mean, running_var, num_batches_tracked, momentum)
    if num_batches_tracked is None:
        return call(running_mean, running_var, momentum)
    # Count the batch first, since PyTorch may refuse to change the counter; if batch norm
    # itself then fails, take the count back. A checkpoint ends the recomputation
    # of a call by an exception, which is no failure.
    if averages:
        momentum = 1.0 / (float(num_batches_tracked) + 1.0)
    num_batches_tracked.add_(1)
    try:
        return call(running_mean, running_var, momentum)
    except BaseException as error:
        if not isinstance(error, _StopRecomputationError):
            num_batches_tracked.sub_(1)
        raise


def _skip_nonfinite(
    call: Callable[[Any, Any, Any], Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: Any,
) -> Tensor:
    """Computes the batch's statistics apart; updates the running ones only if all are finite.

    Unless the count of batches is on the host, the host reads no value from the device, so that a
    CUDA graph can be captured.
    """
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    output = call(mean, var, 1.0)
    finite = mean.isfinite().all() & var.isfinite().all()
    for running, batch in ((running_mean, mean), (running_var, var)):
        old, share = accumulated(running), momentum
        if num_batches_tracked is not None and share is None:
            share = 1.0 / (num_batches_tracked + 1).to(old.dtype)
        new = (1.0 - share) * old + share * batch
        running.copy_(torch.where(finite, new, old))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(finite.to(num_batches_tracked.device))
    return output

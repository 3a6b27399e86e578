"""`sync_batch_norm`, which the modules call in training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import reads_bias, saved_for
from ..functional import (
    as_float,
    check_residual,
    checked_activation,
    goes_to_kernels,
    with_fixed_history,
)
from ..runtime import support
from . import steps
from .autograd import SyncBatchNorm
from .collectives import all_gather

if support.HAS_TRITON:
    from ..runtime import sync_ops


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    activation_param: float | None,
    residual: Tensor | None,
    biased_running_var: bool,
    skip_nonfinite: bool,
    group: Any,
) -> Tensor:
    """Does what `tracked_batch_norm` does in training, with the batch of a whole process group.

    Every process of the group has to call this function. Its input may have any number of
    values, none included. Where the whole batch has a single value a channel, CPU tensors get
    the error that PyTorch's batch norm raises. On a GPU the host does not wait to check:
    the values are normalised to 0, and the running variance becomes NaN, unless it is biased or
    such batches are skipped.

    Raises:
        RuntimeError: `torch.func` or forward-mode AD is at work, or as `batch_norm` raises it.
        TypeError, ValueError: as `batch_norm` raises them. All errors that this process can
            find by itself are raised before it sends anything.
    """
    activation, param = checked_activation(activation, activation_param)
    if residual is not None:
        check_residual(input, residual)
    if support.transforms_active():
        raise RuntimeError(
            "statistics can't be shared between processes while torch.func or forward-mode AD is at"
            " work: call the module outside of it, in eval mode, or convert it back by"
            " fastbn.revert"
        )
    momentum, eps = as_float(momentum), as_float(eps)
    # `torch.compile` can't tell two uses of one tensor apart, so the second use gets a view.
    if residual is input:
        residual = input.view_as(input)
    if bias is weight and bias is not None:
        bias = bias.view_as(bias)
    # The checks need a batch of two values a channel, and this process may have fewer.
    sample = input if input.numel() > input.shape[1] else input.new_zeros(2, input.shape[1])
    written = (running_mean, running_var, num_batches_tracked)
    added = residual if sample is input else None
    kernels = support.bypass_reason() is None and goes_to_kernels(
        sample, added, weight, bias, *written, True, momentum, eps
    )
    if not kernels:
        _let_pytorch_refuse(input, running_mean, running_var, weight, bias, momentum, eps)
    taken = sync_ops if kernels else steps
    with torch.no_grad():
        gathered = all_gather(taken.moments(input), group)
        if gathered.is_cpu and not torch.compiler.is_compiling() and gathered[:, -1].sum() == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size"
                f" {input.shape} and no values from other processes"
            )
        correction = 0.0 if biased_running_var else 1.0
        # Without both running statistics there is nothing to protect.
        skip = skip_nonfinite and running_mean is not None and running_var is not None
        statistics, count = taken.merge(gathered, bias, *written, momentum, correction, eps, skip)
    options = (eps, activation, param, group, kernels)
    if reads_bias(activation, saved_for(activation, residual is not None)):
        bias = with_fixed_history(bias)
    return SyncBatchNorm.apply(input, residual, weight, bias, statistics, count, options)


def _let_pytorch_refuse(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
) -> None:
    """Raises what PyTorch's batch norm raises for these sizes, dtypes and numbers."""
    mean, var = (None if t is None else t.clone() for t in (running_mean, running_var))
    stand_in = input.new_zeros(2, input.shape[1])
    with torch.no_grad():
        F.batch_norm(stand_in, mean, var, weight, bias, True, momentum or 0.0, eps)

"""The all-gather of a forward, and sums over processes that can be differentiated."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(tensor: Tensor, group: Any) -> Tensor:
    """Returns the vectors of all processes of a group, in the order of their ranks, as rows."""
    size = dist.get_world_size(group)
    gathered = tensor.new_empty(size * tensor.numel())
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(gathered, tensor, group=group)
    else:  # before PyTorch 2.14
        dist.all_gather_into_tensor(gathered, tensor, group=group)
    return gathered.view(size, -1)


class Total(torch.autograd.Function):
    """The sum of a tensor over all processes of a group, differentiable any number of times.

    What is differentiated is the sum of all processes' losses, as in DistributedDataParallel. So
    a term's gradient is the sum of the gradients that the total has in all processes.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Total.apply(grad.contiguous(), ctx.group), None

"""The `torch.autograd.Function` of batch norm whose statistics several processes share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..activations import ACTIVATIONS, reads_bias, saved_for
from ..reference import accumulated, axes_of, per_channel, with_value
from ..runtime import support
from ..runtime.layout import memory_format, unpack_mask
from . import steps
from .collectives import Total

if support.HAS_TRITON:
    from ..runtime import sync_ops


class SyncBatchNorm(torch.autograd.Function):
    """Normalises by given statistics; the gradient takes them for functions of all inputs.

    `options` are eps, activation and its parameter, the process group, and whether the kernels
    take the steps of `steps.py`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        count: Tensor,
        options: tuple[float, str, float, Any, bool],
    ) -> Tensor:
        _, activation, param, _, kernels = options
        saved = saved_for(activation, residual is not None)
        normalise = sync_ops.normalise if kernels else steps.normalise
        tensors = (input, residual, weight, statistics)
        output, mask = normalise(*tensors, activation, param, saved == "mask")
        # Save only what the backward reads, so that everything else may change before it. The bias
        # may change too: the statistics hold a copy of its values, and only second derivatives
        # need `ctx.bias`, for its gradient.
        reads = reads_bias(activation, saved)
        ctx.bias = bias if reads and ctx.needs_input_grad[3] else None
        residual = residual if saved == "residual" else None
        mask = mask if saved == "mask" else None
        ctx.save_for_backward(input, residual, mask, weight, statistics, count)
        # Hooks may change the strides of the saved input, but the mask's bits keep this order.
        ctx.kept = options, None if mask is None else memory_format(input)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if support.backward_is_differentiated():
            return *_differentiable_backward(ctx, grad_output), None, None, None
        *tensors, count = ctx.saved_tensors
        (_, activation, param, group, kernels), format = ctx.kept
        want_dx, want_dr, want_dw, want_db = ctx.needs_input_grad[:4]
        # Without an activation the residual's gradient is the output's, which needs no kernel.
        compute_dr = want_dr and activation != "none"
        taken = sync_ops if kernels else steps
        options = (activation, param, (want_dx, compute_dr, want_dw, want_db), format)
        saved = (grad_output, *tensors)
        dx = dr = dw = db = None
        # If no gradient of the input is wanted, no sums are read, and any of their shape will do.
        sums = tensors[-1][:2]
        if want_dx or want_dw or want_db:
            sums, dw, db = taken.sums(*saved, *options)
        if want_dx:
            assert sums is not None
            dist.all_reduce(sums, group=group)
        if want_dx or compute_dr:
            dx, dr = taken.gradients(*saved, sums, count, *options)
        return (
            dx if want_dx else None,
            dr if compute_dr else grad_output if want_dr else None,
            dw if want_dw else None,
            db if want_db else None,
            None, None, None,
        )  # fmt: skip


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the same gradients by operations that can be differentiated.

    The statistics are computed anew as functions of the input. All processes have to take part.
    """
    input, residual, mask, weight, statistics, count = ctx.saved_tensors
    (eps, activation, param, group, _), format = ctx.kept
    z, axes = accumulated(input), axes_of(input)

    def mean_of(terms: Tensor) -> Tensor:
        return Total.apply(terms.sum(axes), group) / count

    # Sums of differences from the known mean lose no digits.
    centred = z - per_channel(statistics[0], z)
    centred = centred - per_channel(mean_of(centred), z)
    rstd = torch.rsqrt(mean_of(centred * centred) + eps)
    x_hat = centred * per_channel(rstd, z)
    g = accumulated(grad_output)
    if activation != "none":
        if mask is None:
            argument = x_hat
            if weight is not None:
                argument = argument * per_channel(weight, z)
            bias = statistics[2] if ctx.bias is None else with_value(ctx.bias, statistics[2])
            argument = argument + per_channel(bias, z)
            if residual is not None:
                argument = argument + residual
        else:
            # The derivative depends only on the argument's sign, so it can be taken at -1 or 1.
            argument = 2 * _signs(mask, input, format).to(g.dtype) - 1
        g = ACTIVATIONS[activation].derivative(g, argument, param)
    dx = g - per_channel(mean_of(g), z) - x_hat * per_channel(mean_of(g * x_hat), z)
    dx = dx * per_channel(rstd, z)
    if weight is not None:
        dx = dx * per_channel(weight, z)
    grads = (dx, g, (g * x_hat).sum(axes), g.sum(axes))
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad))


def _signs(mask: Tensor, input: Tensor, format: torch.memory_format) -> Tensor:
    """Returns a mask as booleans of the input's shape."""
    if mask.dtype is torch.bool:
        return mask
    if input.numel() == 0:
        return torch.zeros_like(input, dtype=torch.bool)
    return unpack_mask(mask, input.contiguous(memory_format=format))

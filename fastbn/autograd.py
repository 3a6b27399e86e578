"""The `torch.autograd.Function` of batch norm, residual and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .activations import ACTIVATIONS, reads_bias
from .runtime import execution, plan_cache, support, torch_ops
from .runtime.execution_plan import ExecutionPlan, plan_backward
from .runtime.layout import memory_format, unpack_mask
from .strategy import get_strategy

# The gradients of running statistics, num_batches_tracked, and arguments that are no tensors.
_NO_GRADIENTS = (None,) * 6


class BatchNorm(torch.autograd.Function):
    """Batch norm, residual and activation, with the gradient of the kernels.

    `options` are training, momentum, correction, eps, activation, its parameter and whether
    to skip batches that are not finite. They are a plain tuple, since a named one takes four
    times as long to make. `saved` is what `saved_for` returns for the call. `plan` is the forward's
    execution plan, or None for a call that must go through PyTorch's dispatcher.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        options: tuple[bool, float | None, float, float, str, float, bool],
        saved: str | None,
        plan: ExecutionPlan | None,
    ) -> Tensor:
        training, momentum, correction, eps, activation, param, _ = options
        tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
        if plan is not None:
            output, statistics, mask = execution.run_forward(
                plan, tensors, momentum, correction, eps, param
            )
        else:
            output, statistics, mask = torch_ops.forward(tensors, *options, saved == "mask")
        mask = mask if saved == "mask" else None
        # Save only what the backward reads, so that everything else may change before it. The bias
        # may change too, as in unfused layers: a batch's statistics hold a copy of its values, and
        # only second derivatives need `ctx.bias`, for its gradient.
        if not reads_bias(activation, saved):
            bias = None
        ctx.bias = bias if ctx.needs_input_grad[3] else None
        residual = residual if saved == "residual" else None
        if training:
            bias = var = None
        else:
            bias, var = None if bias is None else bias.clone(), running_var
        ctx.save_for_backward(input, residual, mask, weight, bias, statistics, var)
        # Hooks may change the strides of the saved input, but the mask's bits keep this order.
        format = None if mask is None else memory_format(input)
        ctx.kept = plan, eps, activation, param, format
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if support.backward_is_differentiated():
            return *_differentiable_backward(ctx, grad_output), *_NO_GRADIENTS

        input, residual, mask, weight, bias, statistics, var = ctx.saved_tensors
        forward_plan, eps, activation, param, format = ctx.kept
        want_dx, want_dr, want_dw, want_db = ctx.needs_input_grad[:4]
        # Without an activation the residual's gradient is the output's, which needs no kernel.
        compute_dr = want_dr and activation != "none"
        wanted = (want_dx, compute_dr, want_dw, want_db)
        tensors = (grad_output, input, residual, mask, weight, bias, statistics, var)
        plan = None
        if forward_plan is not None and not plan_cache.must_use_dispatcher():
            # The forward's plan stands for all of its options.
            key = (forward_plan, wanted, get_strategy())
            plan = plan_cache.lookup(key, tensors)
            if plan is None:
                plan = plan_cache.insert(key, tensors, plan_backward, activation, wanted, format)
        if plan is not None:
            dx, dr, dw, db = execution.run_backward(plan, tensors, eps, param, wanted)
        else:
            dx, dr, dw, db = torch_ops.backward(*tensors, eps, activation, param, wanted, format)
        # An operator returns empty tensors for gradients that are not wanted.
        return (
            dx if want_dx else None,
            dr if compute_dr else grad_output if want_dr else None,
            dw if want_dw else None,
            db if want_db else None,
            *_NO_GRADIENTS,
        )  # fmt: skip


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the same gradients by the reference, so that they can be differentiated."""
    input, residual, mask, weight, bias, statistics, var = ctx.saved_tensors
    _, eps, activation, param, format = ctx.kept
    if mask is not None:
        # The mask says on which side of 0 the argument was, and the derivative depends
        # on nothing else, so it can be taken at -1 or 1.
        positive = unpack_mask(mask, input.contiguous(memory_format=format))
        grad_output = reference.accumulated(grad_output)
        sign = 2 * positive.to(grad_output.dtype) - 1
        grad_output = ACTIVATIONS[activation].derivative(grad_output, sign, param)
        activation = "none"
    # A saved variance says that the statistics were fixed. The flag `training` doesn't:
    # it may be a tensor, and its value may have changed since.
    fixed = None if var is None else (statistics, var)
    if var is None:
        bias = statistics[2]
    if ctx.bias is not None:
        bias = reference.with_value(ctx.bias, bias)
    grads = reference.batch_norm_backward(
        grad_output, input, weight, bias, fixed, eps, activation, param, residual
    )
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad))

"""The `torch.autograd.Function` around the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .activations import ACTIVATIONS, saved_for
from .runtime import execution, plan_cache, support, torch_ops
from .runtime.execution_plan import ExecutionPlan, plan_backward, plan_forward
from .runtime.layout import memory_format, unpack_mask

# The arguments of a call that are not tensors: training, momentum, eps, activation
# and its parameter. A plain tuple: a named one takes four times as long to make.
Options = tuple[bool, float | None, float, str, float]

# Input, residual, weight, bias, running mean and variance, counter of batches.
Tensors = Sequence[Tensor | None]


def cached_plan(tensors: Tensors, options: Options) -> ExecutionPlan | None:
    """The plan of a call like an earlier one, or None."""
    if plan_cache.must_use_dispatcher():
        return None
    return plan_cache.lookup(_cache_key(tensors, options), tensors)


def batch_norm(tensors: Tensors, options: Options, plan: ExecutionPlan | None) -> Tensor:
    """Batch norm, residual and activation, by a cached plan or a new one."""
    if plan is None and not plan_cache.must_use_dispatcher():
        key = _cache_key(tensors, options)
        plan = plan_cache.insert(key, tensors, plan_forward, *key[:4])
    if _has_backward(tensors):
        return BatchNorm.apply(*tensors, options, plan)
    return _forward(tensors, options, plan, save_mask=False)[0]


def _cache_key(tensors: Tensors, options: Options) -> tuple:
    """By what a forward's plan is kept, the options of `plan_forward` first."""
    training, momentum, _, activation, _ = options
    save_mask = saved_for(activation, tensors[1] is not None) == "mask" and _has_backward(tensors)
    # Guards take a tensor in inference mode for one of inference mode outside, where it can't
    # be saved or written. (A backward does neither.)
    inference = torch.is_inference_mode_enabled()
    # Guards compare sizes, but a network has many.
    shape = getattr(tensors[0], "shape", None)
    cumulative = momentum is None
    return bool(training), cumulative, activation, save_mask, inference, shape, *map(type, tensors)


def _has_backward(tensors: Tensors) -> bool:
    """Whether a gradient may be asked for."""
    if torch.is_grad_enabled():
        for t in tensors:
            # What is no tensor is refused later.
            if getattr(t, "requires_grad", False):
                return True
    return False


def _forward(
    tensors: Tensors, options: Options, plan: ExecutionPlan | None, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, (2, C) mean and rstd (or the fixed mean), and packed mask if it is saved."""
    training, momentum, eps, activation, param = options
    if plan is not None:
        return execution.run_forward(plan, tensors, momentum, eps, param)
    if training:
        return torch_ops.forward_train(*tensors, momentum, eps, activation, param, save_mask)
    output, mask = torch_ops.forward_eval(*tensors[:6], eps, activation, param, save_mask)
    return output, tensors[4], mask


class BatchNorm(torch.autograd.Function):
    """Batch norm, residual and activation, with the kernels' gradient."""

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
        options: Options,
        plan: ExecutionPlan | None,
    ) -> Tensor:
        training, _, eps, activation, param = options
        saved = saved_for(activation, residual is not None)
        tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
        output, statistics, mask = _forward(tensors, options, plan, saved == "mask")
        mask = mask if saved == "mask" else None
        residual = residual if saved == "residual" else None
        # What the backward does not read may change before it, as in PyTorch.
        bias = None if saved == "mask" or activation == "none" else bias
        var = None if training else running_var
        ctx.save_for_backward(input, residual, mask, weight, bias, statistics, var)
        # Hooks on saved tensors may change strides; the mask's bits follow the input's.
        format = None if mask is None else memory_format(input)
        ctx.kept = plan, eps, activation, param, format
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if differentiable or support.transforms_active():
            dx, dr, dw, db = _differentiable_backward(ctx, grad_output)
        else:
            dx, dr, dw, db = _backward(ctx, grad_output)
        return dx, dr, dw, db, None, None, None, None, None


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, residual, weight and bias, each where asked for."""
    input, residual, mask, weight, bias, statistics, var = ctx.saved_tensors
    forward_plan, eps, activation, param, format = ctx.kept
    want_dx, want_dr, want_dw, want_db = ctx.needs_input_grad[:4]
    # With no activation the residual's gradient is the output's: no copy.
    compute_dr = want_dr and activation != "none"
    wanted = (want_dx, compute_dr, want_dw, want_db)
    tensors = (grad_output, input, residual, mask, weight, bias, statistics, var)
    plan = None
    if forward_plan is not None and not plan_cache.must_use_dispatcher():
        # The forward's plan fixes all but the gradients wanted.
        key = (forward_plan, wanted)
        plan = plan_cache.lookup(key, tensors)
        if plan is None:
            plan = plan_cache.insert(key, tensors, plan_backward, activation, wanted, format)
    if plan is not None:
        dx, dr, dw, db = execution.run_backward(plan, tensors, eps, param, wanted)
    else:
        dx, dr, dw, db = torch_ops.backward(*tensors, eps, activation, param, wanted, format)
    return (
        dx if want_dx else None,
        dr if compute_dr else grad_output if want_dr else None,
        dw if want_dw else None,
        db if want_db else None,
    )


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients through the reference, for derivatives of the derivative."""
    input, residual, mask, weight, bias, statistics, var = ctx.saved_tensors
    _, eps, activation, param, format = ctx.kept
    if mask is not None:
        # Whether the activation's argument was positive was kept, and is all that counts.
        positive = unpack_mask(mask, input.contiguous(memory_format=format))
        grad_output = reference.accumulated(grad_output)
        sign = 2 * positive.to(grad_output.dtype) - 1
        grad_output = ACTIVATIONS[activation].derivative(grad_output, sign, param)
        activation = "none"
    # As the forward was. Its flag does not say: it may be a tensor, and have changed since.
    fixed = None if var is None else (statistics, var)
    grads = reference.batch_norm_backward(
        grad_output, input, weight, bias, fixed, eps, activation, param, residual
    )
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad))

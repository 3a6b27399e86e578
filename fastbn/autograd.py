"""The `torch.autograd.Function` around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .layout import memory_format, unpack_mask

# Activations whose derivative is the sign's: with a residual one bit is saved.
SIGN_ACTIVATIONS = ("relu", "leaky_relu")


def saved_for(activation: str, residual: bool) -> str | None:
    """What the backward needs besides input, statistics and parameters."""
    if not residual or activation == "none":
        return None
    return "mask" if activation in SIGN_ACTIVATIONS else "residual"


# The arguments of a call that are not tensors: training, momentum, eps, activation
# and its parameter. A plain tuple: a named one takes four times as long to make.
Options = tuple[bool, float | None, float, str, float]


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, (2, C) mean and rstd (or the frozen mean), and packed mask if it is saved."""
    training, momentum, eps, activation, param = options
    if training:
        return ops.forward_train(
            input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
            momentum, eps, activation, param, save_mask,
        )  # fmt: skip
    output, mask = ops.forward_eval(
        input, residual, weight, bias, running_mean, running_var, eps, activation, param, save_mask
    )
    return output, running_mean, mask


class BatchNorm(torch.autograd.Function):
    """Batch norm, residual and activation, with the kernels' gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        options: Options,
    ) -> Tensor:
        saved = saved_for(options[3], residual is not None)
        output, statistics, mask = forward(
            input, weight, bias, residual, running_mean, running_var, num_batches_tracked, options,
            saved == "mask",
        )  # fmt: skip
        if saved == "mask":
            # Hooks on saved tensors may change strides, and the mask's bits follow these.
            ctx.format = memory_format(input)
        else:
            mask = None
        residual = residual if saved == "residual" else None
        var = None if options[0] else running_var
        ctx.save_for_backward(input, weight, bias, residual, mask, statistics, var)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(ctx, grad_output)
        else:
            grads = _backward(ctx, grad_output)
        return (*grads, *[None] * 4)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and residual, each where asked for."""
    input, weight, bias, residual, mask, statistics, var = ctx.saved_tensors
    if mask is not None:
        input = input.contiguous(memory_format=ctx.format)
    _, _, eps, activation, param = ctx.options
    want_dx, want_dw, want_db, want_dr = ctx.needs_input_grad[:4]
    # With no activation the residual's gradient is the output's: no copy.
    compute_dr = want_dr and activation != "none"
    dx, dw, db, dr = ops.backward(
        grad_output, input, residual, mask, weight, bias, statistics, var, eps, activation, param,
        [want_dx, want_dw, want_db, compute_dr],
    )  # fmt: skip
    return (
        dx if want_dx else None,
        dw if want_dw else None,
        db if want_db else None,
        dr if compute_dr else grad_output if want_dr else None,
    )


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients through the reference, for second derivatives (`create_graph`)."""
    *inputs, mask, statistics, var = ctx.saved_tensors
    training, _, eps, activation, param = ctx.options
    # Views, so that a path from one input to another, or one tensor in two
    # places, is left to the engine and not counted twice.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    input, weight, bias, residual = inputs
    mean = None if training else statistics

    def normalised(act: str, residual: Tensor | None) -> Tensor:
        return reference.batch_norm(
            input, mean, var, weight, bias, training, 0.0, eps, act, param, residual
        )

    if mask is not None:
        # The residual was not kept, but where the argument is positive was,
        # and that is all that the derivatives depend on.
        slope = param if activation == "leaky_relu" else 0.0
        positive = unpack_mask(mask, input.contiguous(memory_format=ctx.format))
        grad_residual = torch.where(positive, grad_output, grad_output * slope)
        output, grad_output = normalised("none", None), grad_residual
    elif ctx.needs_input_grad[3] and residual is None:
        grad_residual = grad_output
        output = normalised(activation, None)
    else:
        grad_residual = None
        output = normalised(activation, residual)

    wanted = [needed and t is not None for needed, t in zip(ctx.needs_input_grad, inputs)]
    grads = iter(
        torch.autograd.grad(
            output,
            [t for t, needed in zip(inputs, wanted) if needed],
            grad_output,
            create_graph=True,
        )
        if any(wanted)
        else ()
    )
    dx, dw, db, dr = (next(grads) if needed else None for needed in wanted)
    return dx, dw, db, grad_residual if ctx.needs_input_grad[3] and dr is None else dr

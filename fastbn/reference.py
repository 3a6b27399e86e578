"""Batch norm in differentiable PyTorch: the definition of correct results.

Tests compare the kernels with it, and second derivatives are those of its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str = "none",
    activation_param: float = 0.0,
    residual: Tensor | None = None,
    correction: float = 1.0,
) -> Tensor:
    """Returns y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual).

    This is algorithm 1 of Ioffe and Szegedy (2015). In training, mean and variance
    are those of `x` over all axes but the second, and the running statistics are
    updated: the running variance by var * M / (M - correction), for M values to a
    channel. Otherwise mean and variance are the running ones. Computations are in
    float32, or in float64 if `x` is.
    """
    z = accumulated(x)
    if training:
        axes = axes_of(x)
        mean, var = z.mean(axes), z.var(axes, correction=0)
        count = x.numel() // x.shape[1]
        for running, batch in (
            (running_mean, mean),
            (running_var, var * count / (count - correction)),
        ):
            if running is not None:
                running.lerp_(batch.detach().to(running.dtype), momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    z = (z - per_channel(mean, z)) * torch.rsqrt(per_channel(var, z) + eps)
    z = _argument(z, weight, bias, residual)
    return ACTIVATIONS[activation].function(z, activation_param).to(x.dtype)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fixed: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str,
    activation_param: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of input, residual, weight and bias, which can be differentiated in turn.

    The gradients have the dtype of sums (`accumulated`), and autograd rounds them to
    the dtype of the tensors.

    With x_hat = (x - mean) * rstd, M values to a channel and g = dy * activation'(z), where
    z = x_hat * weight + bias + residual:

        dr = g,  db = sum(g),  dw = sum(g * x_hat),
        dx = weight * rstd * (g - db / M - x_hat * dw / M)

    but with fixed statistics dx = weight * rstd * g.

    Args:
        fixed: the fixed mean and variance, or None for those of the batch.
    """
    axes, count = axes_of(x), x.numel() // x.shape[1]
    z = accumulated(x)
    mean, var = (z.mean(axes), z.var(axes, correction=0)) if fixed is None else fixed
    rstd = torch.rsqrt(per_channel(var, z) + eps)
    x_hat = (z - per_channel(mean, z)) * rstd
    g = accumulated(dy)
    if activation != "none":
        z = _argument(x_hat, weight, bias, residual)
        g = ACTIVATIONS[activation].derivative(g, z, activation_param)
    dw, db = (g * x_hat).sum(axes), g.sum(axes)
    if fixed is None:
        dx = g - per_channel(db / count, z) - x_hat * per_channel(dw / count, z)
    else:
        # The value is g, but as in PyTorch it requires a gradient if the input does.
        dx = torch.where(torch.zeros_like(z, dtype=torch.bool), x_hat, g)
    dx = dx * rstd
    if weight is not None:
        dx = dx * per_channel(weight, z)
    return dx, g, dw, db


def _argument(
    x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Returns the activation's argument, z = x_hat * weight + bias + residual."""
    z = x_hat
    if weight is not None:
        z = z * per_channel(weight, z)
    if bias is not None:
        z = z + per_channel(bias, z)
    return z if residual is None else z + residual


def accumulated(x: Tensor) -> Tensor:
    """Returns a tensor in the dtype of sums: float64 for float64, else float32."""
    return x.double() if x.dtype == torch.float64 else x.float()


def axes_of(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


class _WithValue(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(variable: Tensor, value: Tensor) -> Tensor:
        return value.to(variable.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent


def with_value(variable: Tensor, value: Tensor) -> Tensor:
    """Returns the value that a variable had earlier, as a function of the variable."""
    return _WithValue.apply(variable, value)


def per_channel(value: Tensor, z: Tensor) -> Tensor:
    return value.to(z.dtype).reshape(1, -1, *[1] * (z.dim() - 2))

"""Batch norm in differentiable PyTorch: the definition of right.

Also the path of second derivatives; its activations follow PyTorch's own batch norm where
no kernel serves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# name -> function of the argument and of the activation's parameter.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, _: F.hardswish(z),
    "relu6": lambda z, _: F.relu6(z),
    "elu": F.elu,
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
}

# Parameters of the activations that take one, with PyTorch's defaults.
DEFAULT_PARAMS = {"leaky_relu": 0.01, "elu": 1.0}


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
) -> Tensor:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual).

    Ioffe and Szegedy (2015), algorithm 1; mean and variance over all axes of
    `x` but the second, computed in at least float32.
    """

    def per_channel(value: Tensor) -> Tensor:
        return value.to(z.dtype).reshape(1, -1, *[1] * (x.dim() - 2))

    z = x.double() if x.dtype == torch.float64 else x.float()
    if training:
        axes = [0, *range(2, x.dim())]
        mean, var = z.mean(axes), z.var(axes, correction=0)
        count = x.numel() // x.shape[1]
        for running, batch in ((running_mean, mean), (running_var, var * count / (count - 1))):
            if running is not None:
                running.lerp_(batch.detach().to(running.dtype), momentum)
    else:
        mean, var = running_mean, running_var
    z = (z - per_channel(mean)) * torch.rsqrt(per_channel(var) + eps)
    if weight is not None:
        z = z * per_channel(weight)
    if bias is not None:
        z = z + per_channel(bias)
    if residual is not None:
        z = z + residual
    return ACTIVATIONS[activation](z, activation_param).to(x.dtype)

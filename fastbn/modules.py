"""Drop-in modules for `nn.BatchNorm1d/2d/3d`, and their forms with an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .activations import ACT_LAYERS, activation_of
from .functional import check_residual, tracked_batch_norm


class _Fused(_BatchNorm):
    """The `forward` of the drop-in modules; the other base class is one of `nn.BatchNorm*d`."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return tracked_batch_norm(input, *arguments_of(self))


def arguments_of(
    module: _BatchNorm,
) -> tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float | None,
    float,
]:  # fmt: skip
    """Returns what a batch norm module passes to `tracked_batch_norm` after the input.

    These are running mean and variance, num_batches_tracked, weight, bias, whether the
    batch's own statistics count, momentum, and eps.
    """
    # `nn.Module` looks in these dictionaries too, and takes five times as long. A plain
    # attribute may stand in the place of a parameter or buffer.
    parameters, buffers = module._parameters, module._buffers
    if "weight" in parameters and "bias" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:
        weight, bias = module.weight, module.bias
    if "running_mean" in buffers and "running_var" in buffers:
        mean, var = buffers["running_mean"], buffers["running_var"]
    else:
        mean, var = module.running_mean, module.running_var
    num_batches_tracked, training, momentum = None, True, module.momentum
    if not module.training:
        training = mean is None and var is None
    elif not module.track_running_stats:
        # In training, statistics that are not tracked must not be updated.
        mean = var = None
    elif "num_batches_tracked" in buffers:
        num_batches_tracked = buffers["num_batches_tracked"]
    else:
        num_batches_tracked = module.num_batches_tracked
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0
    return mean, var, num_batches_tracked, weight, bias, training, momentum, module.eps


class FusedBatchNorm1d(_Fused, nn.BatchNorm1d):
    """`nn.BatchNorm1d` in fused kernels, for input of shape (N, C) or (N, C, L).

    Constructor, parameters, buffers, `state_dict` and results are the same as in
    `nn.BatchNorm1d`.
    """


class FusedBatchNorm2d(_Fused, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in fused kernels, for contiguous or channels-last (N, C, H, W).

    Constructor, parameters, buffers, `state_dict` and results are the same as in
    `nn.BatchNorm2d`.
    """


class FusedBatchNorm3d(_Fused, nn.BatchNorm3d):
    """`nn.BatchNorm3d` in fused kernels, for contiguous or channels-last (N, C, D, H, W).

    Constructor, parameters, buffers, `state_dict` and results are the same as in
    `nn.BatchNorm3d`.
    """


def _hooks(module: nn.Module) -> dict:
    """Returns some of a module's hooks, an empty dictionary if it has none."""
    return (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def fused_activation(module: nn.Module) -> tuple[str, float | None] | None:
    """Returns name and parameter of the activation that the kernels compute for a module.

    Returns None if the module has something that the kernels can't compute: another
    activation, a hook on the activation, or a drop layer. PyTorch then computes drop
    layer, residual and activation after the kernels.
    """
    layers = module._modules
    act, drop = layers.get("act"), layers.get("drop")
    if drop is not None and (type(drop) is not nn.Identity or _hooks(drop)):
        return None
    if act is None:
        return "none", None
    return None if _hooks(act) else activation_of(act)


def _make_activation(
    layer: str | Callable[..., nn.Module] | None, kwargs: dict[str, Any]
) -> nn.Module:
    # timm's name for no activation is "".
    if layer in (None, "none", ""):
        return nn.Identity()
    if isinstance(layer, str):
        if layer not in ACT_LAYERS:
            known = ", ".join(name for name in ACT_LAYERS if name != "none")
            raise ValueError(
                f"act_layer must be None, a module class or one of {known}, none, but got {layer!r}"
            )
        activation = ACT_LAYERS[layer]
        return activation.module(**{**dict(activation.options), **kwargs})
    _check_class("act_layer", layer)
    return layer(**kwargs)


def _check_class(name: str, layer: Any) -> None:
    if isinstance(layer, nn.Module) or not callable(layer):
        raise TypeError(
            f"{name} must be a module class, but got an instance of {type(layer).__name__}"
        )


class _FusedAct(_Fused):
    """Batch norm, residual and activation in one module."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: str | Callable[..., nn.Module] | None = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if drop_layer is None:
            drop_layer = nn.Identity
        _check_class("drop_layer", drop_layer)
        self.drop = drop_layer()
        self.act = _make_activation(act_layer if apply_act else None, act_kwargs or {})

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        fused = fused_activation(self)
        if fused is not None:
            self._check_input_dim(input)
            return tracked_batch_norm(input, *arguments_of(self), *fused, residual)
        if residual is not None:
            check_residual(input, residual)
        output = super().forward(input)
        if self.drop is not None:
            output = self.drop(output)
        if residual is not None:
            output = output + residual
        return output if self.act is None else self.act(output)


_ACT_DOC = """`{base}`, an optional residual and an activation in one.

    `forward(x, residual=None)` returns `act(drop(bn(x)) + residual)`; the residual
    has the shape of `x`. The constructor takes the arguments of timm's
    `BatchNormAct2d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype:
            as for `nn.{base}`.
        apply_act: False leaves the activation out.
        act_layer: a module class; a name that `fastbn.functional.batch_norm`
            knows, "swish" or "hard_swish"; or None for no activation. Activations
            that this function knows run inside the kernels, all others after them.
        act_kwargs: arguments of `act_layer`.
        inplace: accepted for compatibility with timm, without effect: the fused
            output is always new memory.
        drop_layer: a module class applied between normalisation and residual;
            with one, only the normalisation is fused.

    Raises:
        TypeError: `act_layer` or `drop_layer` is a module and not a class, or
            the residual is no tensor.
        ValueError: `act_layer` is an unknown name, or the residual has another
            shape or device than the input.
    """


class FusedBatchNormAct1d(_FusedAct, nn.BatchNorm1d):
    __doc__ = _ACT_DOC.format(base="BatchNorm1d")


class FusedBatchNormAct2d(_FusedAct, nn.BatchNorm2d):
    __doc__ = _ACT_DOC.format(base="BatchNorm2d")


class FusedBatchNormAct3d(_FusedAct, nn.BatchNorm3d):
    __doc__ = _ACT_DOC.format(base="BatchNorm3d")

"""Drop-in modules for `nn.BatchNorm1d/2d/3d`, and their forms with an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor

from .activations import ACT_LAYERS, activation_of
from .functional import check_residual, tracked_batch_norm


class _Fused:
    """`forward` of the drop-in modules, over one of `nn.BatchNorm*d`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._normalise(input)

    def _normalise(
        self,
        input: Tensor,
        activation: str | None = None,
        activation_param: float | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        self._check_input_dim(input)
        weight, bias = parameters_of(self)
        running_mean, running_var, num_batches_tracked, training, momentum = statistics_of(self)
        return tracked_batch_norm(
            input, running_mean, running_var, num_batches_tracked, weight, bias, training,
            momentum, self.eps, activation, activation_param, residual,
        )  # fmt: skip


def parameters_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a batch norm module."""
    # As `nn.Module` finds them, in a fifth of the time.
    parameters = module._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return module.weight, module.bias  # attributes in their place


def statistics_of(
    module: nn.Module,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None]:
    """What a batch norm module passes on.

    Running mean and variance, num_batches_tracked, training or not, and momentum, which is None
    for the counter's.
    """
    buffers = module._buffers  # as for `parameters_of`
    if "running_mean" in buffers and "running_var" in buffers:
        mean, var = buffers["running_mean"], buffers["running_var"]
    else:  # an attribute in its place
        mean, var = module.running_mean, module.running_var
    num_batches_tracked, training, momentum = None, True, module.momentum
    if not module.training:
        training = mean is None and var is None
    elif not module.track_running_stats:
        # In training, statistics that are not tracked are not to be written.
        mean = var = None
    elif "num_batches_tracked" in buffers:
        num_batches_tracked = buffers["num_batches_tracked"]
    else:
        num_batches_tracked = module.num_batches_tracked
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0
    return mean, var, num_batches_tracked, training, momentum


class FusedBatchNorm1d(_Fused, nn.BatchNorm1d):
    """`nn.BatchNorm1d` in fused kernels: input (N, C) or (N, C, L).

    Constructor, parameters, buffers, `state_dict` and results are those of
    `nn.BatchNorm1d`.
    """


class FusedBatchNorm2d(_Fused, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in fused kernels: input (N, C, H, W), contiguous or channels-last.

    Constructor, parameters, buffers, `state_dict` and results are those of
    `nn.BatchNorm2d`.
    """


class FusedBatchNorm3d(_Fused, nn.BatchNorm3d):
    """`nn.BatchNorm3d` in fused kernels: input (N, C, D, H, W), contiguous or channels-last.

    Constructor, parameters, buffers, `state_dict` and results are those of
    `nn.BatchNorm3d`.
    """


def _hooks(module: nn.Module) -> dict:
    """Some of a module's hooks; empty if it has none."""
    return (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def fused_activation(module: nn.Module) -> tuple[str, float | None] | None:
    """The activation that the kernels compute, and its parameter.

    None if there is something that they can't compute: another activation, a
    hook on it, a drop layer. It then comes after them, and so does the residual.
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
            return self._normalise(input, *fused, residual)
        if residual is not None:
            check_residual(input, residual)
        output = self._normalise(input)
        if self.drop is not None:
            output = self.drop(output)
        if residual is not None:
            output = output + residual
        return output if self.act is None else self.act(output)


_ACT_DOC = """`{base}`, an optional residual and an activation in one.

    `forward(x, residual=None)` is `act(drop(bn(x)) + residual)`; the residual has
    the shape of `x`. The constructor is that of timm's `BatchNormAct2d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype:
            as for `nn.{base}`.
        apply_act: False leaves the activation out.
        act_layer: a module class; a name that `fastbn.functional.batch_norm`
            knows, "swish" or "hard_swish"; or None for no activation. What that
            function knows runs inside the kernels, any other class after them.
        act_kwargs: arguments of `act_layer`.
        inplace: accepted for timm's sake; the fused output is new memory anyway.
        drop_layer: a module class applied between normalisation and residual;
            with one, nothing but the normalisation is fused.

    Raises:
        TypeError: `act_layer` or `drop_layer` is a module and not a class, or
            the residual no tensor.
        ValueError: `act_layer` is an unknown name, or the residual is of
            another shape than the input, or on another device.
    """


class FusedBatchNormAct1d(_FusedAct, nn.BatchNorm1d):
    __doc__ = _ACT_DOC.format(base="BatchNorm1d")


class FusedBatchNormAct2d(_FusedAct, nn.BatchNorm2d):
    __doc__ = _ACT_DOC.format(base="BatchNorm2d")


class FusedBatchNormAct3d(_FusedAct, nn.BatchNorm3d):
    __doc__ = _ACT_DOC.format(base="BatchNorm3d")

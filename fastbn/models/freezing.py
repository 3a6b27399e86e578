"""Fixes the statistics of a model's norms, in training mode too."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from .frozen import FROZEN, THAWED, Frozen
from .generated import set_class
from .norm_types import convert_norm, twin_of


def freeze(model: nn.Module, *, parameters: bool = True) -> nn.Module:
    """Fixes the statistics of a model's batch norms in place; they stay fixed in training mode.

    Norms of PyTorch's and timm's become fastbn's first, as by `fastbn.convert`. Modules that
    replace norms afterwards, such as `nn.SyncBatchNorm.convert_sync_batchnorm`, end the freeze.

    Args:
        model: any module. To freeze a part of a model, give that part.
        parameters: whether weights and biases are frozen too. They are then buffers, as in
            torchvision's `FrozenBatchNorm2d`; otherwise they stay trainable parameters.

    Returns:
        The model.

    Raises:
        TypeError: the model is no module.
        ValueError: a norm has no running statistics to fix, or is of a type that can't be
            frozen, such as norms that share statistics; the model is then unchanged.
    """
    _check(model)
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, Frozen):
            continue
        if type(module) not in FROZEN and twin_of(type(module)) is None:
            raise ValueError(
                f"model has a norm that can't be frozen, a {type(module).__name__} at"
                f" {path or 'itself'}: give freeze the parts of the model that have others"
            )
        if module.running_mean is None:
            raise ValueError(
                f"model has a norm without running statistics to fix, {path or 'itself'}:"
                " give freeze the parts of the model that have them"
            )
    for module in list(model.modules()):
        convert_norm(module)
        if type(module) in FROZEN:
            set_class(module, FROZEN[type(module)])
            module._non_persistent_buffers_set.add("num_batches_tracked")
        if isinstance(module, Frozen) and parameters:
            _make_buffers(module)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Lets statistics of a model's frozen norms change again, and makes their parameters trainable.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: the model is no module.
    """
    _check(model)
    for module in list(model.modules()):
        if type(module) in THAWED:
            set_class(module, THAWED[type(module)])
            module._non_persistent_buffers_set.discard("num_batches_tracked")
            _make_parameters(module)
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, but got a {type(model).__name__}")


def _make_buffers(module: nn.Module) -> None:
    """Makes weight and bias buffers, which come before the other buffers."""
    others = dict(module._buffers)
    module._buffers.clear()
    for name in ("weight", "bias"):
        parameter = module._parameters.pop(name, others.pop(name, None))
        if parameter is not None:
            parameter.requires_grad_(False)
            parameter.grad = None
        # The object stays the same, so an optimizer that holds it trains it again once unfrozen.
        module._buffers[name] = parameter
    module._buffers.update(others)


def _make_parameters(module: nn.Module) -> None:
    for name in ("weight", "bias"):
        value = module._buffers.pop(name, module._parameters.get(name))
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value)
        if value is not None:
            value.requires_grad_(True)
        module._parameters[name] = value
    if module._buffers.get("num_batches_tracked") is None:
        device = module._buffers["running_mean"].device  # type: ignore[union-attr]
        module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=device)

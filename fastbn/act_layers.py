"""Makes the layers of `FusedBatchNormAct*d` from the arguments `act_layer` and `drop_layer`."""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch.nn as nn

from .activations import ACT_LAYERS

_NO_MODULE = "{} must be a module class or a function that returns a module, but got {}: {}"


def make_activation(
    layer: str | Callable[..., nn.Module] | None, kwargs: dict[str, Any]
) -> nn.Module:
    """Returns the activation that `act_layer` stands for, or `nn.Identity()` for none."""
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
    return make_layer("act_layer", layer, kwargs)


def make_layer(name: str, layer: Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    """Returns the module that the argument `name` makes, or raises an error that names it."""
    if isinstance(layer, nn.Module) or not callable(layer):
        raise TypeError(
            f"{name} must be a module class, but got an instance of {type(layer).__name__}"
        )
    try:
        made = layer(**kwargs)
    except TypeError as error:
        if isinstance(layer, (FunctionType, BuiltinFunctionType)):
            raise TypeError(_NO_MODULE.format(name, layer.__name__, error)) from error
        raise
    if not isinstance(made, nn.Module):
        given = getattr(layer, "__name__", repr(layer))
        raise TypeError(_NO_MODULE.format(name, given, f"it returned a {type(made).__name__}"))
    return made

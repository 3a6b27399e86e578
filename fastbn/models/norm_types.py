"""Makes norms fastbn's, and undoes that, by a change of their class."""

from __future__ import annotations

import sys
from typing import cast

import torch.nn as nn
from torch import Tensor

from ..modules import (
    FusedBatchNorm1d,
    FusedBatchNorm2d,
    FusedBatchNorm3d,
    FusedBatchNormAct2d,
)
from .frozen import FrozenBatchNorm2d
from .generated import set_class

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.BatchNorm3d: FusedBatchNorm3d,
}
# The attributes of a norm that torchvision's frozen norm lacks.
_OF_A_NORM = {"momentum": 0.1, "affine": True, "track_running_stats": True}
_ORIGINALS = {twin: original for original, twin in _TWINS.items()}


# Norms of other libraries and their twins. A library that the program has not imported is not
# imported here.
_OTHERS = {
    ("timm.layers.norm_act", "BatchNormAct2d"): FusedBatchNormAct2d,
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): FrozenBatchNorm2d,
}


def twin_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the type of fastbn's norms that takes a type's place, or None."""
    if kind in _TWINS:
        return _TWINS[kind]
    twin = _OTHERS.get((kind.__module__, kind.__name__))
    return twin if kind is getattr(sys.modules.get(kind.__module__), kind.__name__, None) else None


def convert_norm(module: nn.Module) -> None:
    """Makes a norm fastbn's, if it is of a type that has a twin."""
    kind = type(module)
    twin = twin_of(kind)
    if twin is None:
        return
    set_class(module, twin)
    attributes = module.__dict__
    if twin is FusedBatchNormAct2d:
        # The twin's eps is a property, which stores its value under another name.
        attributes["_eps"] = attributes.pop("eps")
    if twin is FrozenBatchNorm2d:
        attributes |= _OF_A_NORM | {"num_features": cast(Tensor, module.running_mean).numel()}
    if kind not in _TWINS:
        attributes["_converted_from"] = kind


def revert_norm(module: nn.Module) -> None:
    """Gives one of fastbn's norms its first type back, unless it has options that this lacks.

    A norm that was made as a `FusedBatchNormAct*d` stays: PyTorch has no such norm.
    """
    attributes = module.__dict__
    if type(module) in _ORIGINALS and not (module.biased_running_var or module.skip_nonfinite):
        set_class(module, _ORIGINALS[type(module)])
    elif "_converted_from" in attributes and type(module) in _OTHERS.values():
        if type(module) is FusedBatchNormAct2d:
            attributes["eps"] = attributes.pop("_eps")
        else:
            for name in ("num_features", *_OF_A_NORM):
                del attributes[name]
        set_class(module, attributes.pop("_converted_from"))

"""Norms that become fastbn's, and become what they were, by a change of their class."""

from __future__ import annotations

import sys

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules import (
    FusedBatchNorm1d,
    FusedBatchNorm2d,
    FusedBatchNorm3d,
    FusedBatchNormAct2d,
)
from .generated import set_class

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.BatchNorm3d: FusedBatchNorm3d,
}
_ORIGINALS = {twin: original for original, twin in _TWINS.items()}


def _timm_norm() -> type[nn.Module] | None:
    """Returns timm's `BatchNormAct2d`, if the program has imported timm."""
    layers = sys.modules.get("timm.layers.norm_act")
    return getattr(layers, "BatchNormAct2d", None)


def convert_norm(module: nn.Module) -> bool:
    """Makes a norm fastbn's, if it is of a type that has a twin; says whether it was."""
    kind = type(module)
    if kind in _TWINS:
        set_class(module, _TWINS[kind])
        return True
    if kind is _timm_norm():
        # The twin's eps is a property, which stores its value under another name.
        eps = module.__dict__.pop("eps")
        set_class(module, FusedBatchNormAct2d)
        module.__dict__["_eps"] = eps
        module.__dict__["_converted_from"] = kind
        return True
    return False


def revert_norm(module: nn.Module) -> None:
    """Gives a norm the type back that it had, if it is one of fastbn's and has no other options.

    One that was made as a `FusedBatchNormAct*d` stays: PyTorch has no such norm.
    """
    original = module.__dict__.pop("_converted_from", None)
    if original is not None:
        eps = module.__dict__.pop("_eps")
        set_class(module, original)
        module.__dict__["eps"] = eps
    elif type(module) in _ORIGINALS and not module.biased_running_var:
        set_class(module, _ORIGINALS[type(module)])


def is_unknown_norm(module: nn.Module) -> bool:
    """Says whether a module is a batch norm of a type that has no twin and is none."""
    return isinstance(module, _BatchNorm) and not isinstance(
        module, (*_ORIGINALS, FusedBatchNormAct2d)
    )

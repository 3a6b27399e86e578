"""Makes a model's norms share statistics with other processes, and undoes that."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules import (
    FusedBatchNorm1d,
    FusedBatchNorm2d,
    FusedBatchNorm3d,
    FusedBatchNormAct1d,
    FusedBatchNormAct2d,
    FusedBatchNormAct3d,
    _FusedAct,
)
from .modules import FusedSyncBatchNorm, FusedSyncBatchNormAct, _Synchronised

_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    FusedBatchNorm1d, FusedBatchNorm2d, FusedBatchNorm3d,
)  # fmt: skip
_NORMS_WITH_ACTIVATION = (FusedBatchNormAct1d, FusedBatchNormAct2d, FusedBatchNormAct3d)
# The attribute that holds the class which a norm had before its conversion.
_ORIGINAL = "_synchronised_from"


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes a model's batch norms share their statistics between processes, in place.

    It takes PyTorch's norms (`nn.SyncBatchNorm` too), timm's and fastbn's, in plain models and
    in those that `fastbn.convert` or `fastbn.fuse` changed; fused activations stay fused. Each
    norm is the same object with another class, `FusedSyncBatchNorm` or `FusedSyncBatchNormAct`.
    Parameters, buffers, hooks, names and the keys of `state_dict` stay. Frozen norms have no
    statistics to share, and stay as they are. A subclass of a norm may compute anything: it stays
    as it is, with a warning. `fastbn.revert` undoes all this.

    Args:
        module: any module, before DistributedDataParallel or `fully_shard` wraps it.
        process_group: the processes that share statistics. With None, norms that have a group
            keep it, and all others take the group of all processes.

    Returns:
        The module.

    Raises:
        TypeError: `module` is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a module, but got a {type(module).__name__}")
    left = {}
    for path, found in list(module.named_modules()):
        new = _synchronised_class(type(found))
        if new is not None:
            _synchronise(found, new)
        if isinstance(found, _Synchronised):
            if process_group is not None:
                found.process_group = process_group
        elif isinstance(found, _BatchNorm) and not getattr(found, "has_fixed_statistics", False):
            left[path or "the module"] = type(found).__name__
    if left:
        names = ", ".join(f"{path} ({name})" for path, name in left.items())
        warnings.warn(
            f"these norms keep statistics of their own, since fastbn doesn't know their classes:"
            f" {names}; replace them by norms that it knows",
            RuntimeWarning,
            stacklevel=2,
        )
    return module


def revert_sync_norm(module: nn.Module) -> None:
    """Gives a norm the class back that `convert_sync_batchnorm` took from it.

    A norm that was made as a `FusedSyncBatchNorm` becomes an `nn.SyncBatchNorm`, unless it has
    options that `nn.SyncBatchNorm` lacks. One that was made as a `FusedSyncBatchNormAct` stays:
    PyTorch has no such norm.
    """
    if type(module) not in (FusedSyncBatchNorm, FusedSyncBatchNormAct):
        return
    state = module.__dict__
    original = state.pop(_ORIGINAL, None)
    if original is None:
        has_options = module.biased_running_var or module.skip_nonfinite
        if type(module) is FusedSyncBatchNorm and not has_options:
            _set_class(module, nn.SyncBatchNorm)
        return
    if not issubclass(original, nn.SyncBatchNorm):
        state.pop("process_group", None)
    if isinstance(module, _FusedAct) and not issubclass(original, _FusedAct):
        state["eps"] = state.pop("_eps")
    _set_class(module, original)


def _synchronised_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    if kind in _NORMS:
        return FusedSyncBatchNorm
    if kind in _NORMS_WITH_ACTIVATION or kind in _timm_norms():
        return FusedSyncBatchNormAct
    return None


def _timm_norms() -> tuple[type[nn.Module], ...]:
    """Returns timm's norms with an activation, if the program has imported timm."""
    layers = sys.modules.get("timm.layers.norm_act")
    names = ("BatchNormAct2d", "SyncBatchNormAct")
    return tuple(getattr(layers, name) for name in names if hasattr(layers, name))


def _synchronise(module: nn.Module, new: type[nn.Module]) -> None:
    state = module.__dict__
    state[_ORIGINAL] = type(module)
    if issubclass(new, _FusedAct) and "eps" in state:
        # The new class has eps as a property, which stores the value under another name.
        state["_eps"] = state.pop("eps")
    _set_class(module, new)


def _set_class(module: nn.Module, new: type[nn.Module]) -> None:
    # A module's class may have a `__setattr__` of its own, which must not see this.
    object.__setattr__(module, "__class__", new)

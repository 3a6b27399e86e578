"""Norms whose statistics stay fixed, which `freeze` makes."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from ..modules import (
    FusedBatchNorm1d,
    FusedBatchNorm2d,
    FusedBatchNorm3d,
    FusedBatchNormAct1d,
    FusedBatchNormAct2d,
    FusedBatchNormAct3d,
    _Fused,
)


class Frozen(_Fused):
    """The base of frozen norms: running statistics normalise in training too, and never change.

    `state_dict` has the keys of torchvision's `FrozenBatchNorm2d`: weight, bias, running_mean
    and running_var. Checkpoints of either form load into the other one.
    """

    has_fixed_statistics = True
    # PyTorch's batch norm expects no num_batches_tracked in checkpoints of this version.
    _version = 1

    def reset_running_stats(self) -> None:
        """Does nothing, so that `torch.optim.swa_utils.update_bn` leaves the statistics alone."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def _options(self) -> str:
        return super()._options() + ", frozen"


class FrozenBatchNorm1d(Frozen, FusedBatchNorm1d):
    """A frozen `FusedBatchNorm1d`, which `freeze` makes."""


class FrozenBatchNorm2d(Frozen, FusedBatchNorm2d):
    """A frozen `FusedBatchNorm2d`, which `freeze` makes."""


class FrozenBatchNorm3d(Frozen, FusedBatchNorm3d):
    """A frozen `FusedBatchNorm3d`, which `freeze` makes."""


class FrozenBatchNormAct1d(Frozen, FusedBatchNormAct1d):
    """A frozen `FusedBatchNormAct1d`, which `freeze` makes."""


class FrozenBatchNormAct2d(Frozen, FusedBatchNormAct2d):
    """A frozen `FusedBatchNormAct2d`, which `freeze` makes."""


class FrozenBatchNormAct3d(Frozen, FusedBatchNormAct3d):
    """A frozen `FusedBatchNormAct3d`, which `freeze` makes."""


# The frozen class of each class, and the class of each frozen one.
FROZEN: dict[type, type] = {kind.__mro__[2]: kind for kind in Frozen.__subclasses__()}
THAWED: dict[type, type] = {frozen: kind for kind, frozen in FROZEN.items()}

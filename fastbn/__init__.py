"""Batch normalization for PyTorch in fused Triton kernels."""

from .backend import get_backend, set_backend, use_backend
from .explain import explain
from .functional import batch_norm
from .models import convert, freeze, fuse, revert, unfreeze
from .modules import (
    FusedBatchNorm1d,
    FusedBatchNorm2d,
    FusedBatchNorm3d,
    FusedBatchNormAct1d,
    FusedBatchNormAct2d,
    FusedBatchNormAct3d,
)
from .recomputation import update_once
from .strategy import use_strategy
from .sync import FusedSyncBatchNorm, FusedSyncBatchNormAct, convert_sync_batchnorm

__version__ = "0.1.0"

__all__ = [
    "FusedBatchNorm1d",
    "FusedBatchNorm2d",
    "FusedBatchNorm3d",
    "FusedBatchNormAct1d",
    "FusedBatchNormAct2d",
    "FusedBatchNormAct3d",
    "FusedSyncBatchNorm",
    "FusedSyncBatchNormAct",
    "batch_norm",
    "convert",
    "convert_sync_batchnorm",
    "explain",
    "freeze",
    "fuse",
    "get_backend",
    "revert",
    "set_backend",
    "unfreeze",
    "update_once",
    "use_backend",
    "use_strategy",
]

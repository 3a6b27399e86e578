"""A user's code for mypy. Each wrong line has an `ignore`, an error if mypy accepts the line."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastbn
from fastbn import (
    FusedBatchNorm2d,
    FusedBatchNormAct2d,
    FusedSyncBatchNorm,
    FusedSyncBatchNormAct,
    batch_norm,
    explain,
)

x = torch.randn(2, 8, 4, 4)
norm: nn.BatchNorm2d = FusedBatchNorm2d(8, momentum=None)
act = FusedBatchNormAct2d(8, act_layer="silu", drop_layer=nn.Dropout)
other = FusedBatchNormAct2d(8, act_layer=nn.GELU, act_kwargs={"approximate": "tanh"})

sync = FusedSyncBatchNormAct(8, process_group=None, act_layer="silu")

assert_type(sync.forward(x, residual=x), Tensor)
assert_type(fastbn.convert_sync_batchnorm(norm), nn.Module)
assert_type(act.forward(x, residual=x), Tensor)
assert_type(batch_norm(x, None, None, training=True, activation="relu", residual=x), Tensor)
assert_type(norm.weight.shape[0], int)
assert_type(fastbn.get_backend(), str)
assert_type(fastbn.set_backend("torch"), None)
assert_type(explain(act, x, x).backend, str)
assert_type(explain(None, x).forward_bytes, int | None)
backend: AbstractContextManager[None] = fastbn.use_backend("triton")

FusedBatchNorm2d("8")  # type: ignore[arg-type]
FusedSyncBatchNorm(8, eps="small")  # type: ignore[arg-type]
FusedBatchNormAct2d(8, act_layer=3)  # type: ignore[arg-type]
act.forward(x, residual="x")  # type: ignore[arg-type]
batch_norm(x, None, None, activation=nn.ReLU)  # type: ignore[arg-type]
batch_norm(x, None)  # type: ignore[call-arg]
fastbn.set_backend(None)  # type: ignore[arg-type]

"""`FusedSyncBatchNorm`, and its form with an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules import _Fused, _FusedAct, arguments_of
from .functional import sync_batch_norm


class _Synchronised(_Fused):
    """The part of the modules that shares statistics with other processes."""

    process_group: Any = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def normalise(
        self,
        input: Tensor,
        activation: str = "none",
        activation_param: float | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        group = self._group_to_ask()
        if group is None:
            return super().normalise(input, activation, activation_param, residual)
        self._check_input_dim(input)
        mean, var, num_batches_tracked, weight, bias, _, momentum, eps = arguments_of(self)
        return sync_batch_norm(
            input, mean, var, num_batches_tracked, weight, bias, momentum, eps,
            activation, activation_param, residual, self.biased_running_var,
            self.skip_nonfinite, group,
        )  # fmt: skip

    def processes(self) -> int:
        """Returns how many processes share the statistics of a call, 1 in eval mode."""
        group = self._group_to_ask()
        return 1 if group is None else dist.get_world_size(group)

    def _group_to_ask(self) -> Any:
        """Returns the process group, or None if no other process has a share in the statistics."""
        if not self.training or not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        size = dist.get_world_size(group)
        if size < 1:
            raise ValueError(
                f"process_group must hold this process, rank {dist.get_rank()}, but does not;"
                " give each process the group that it belongs to"
            )
        return group if size > 1 else None


class FusedSyncBatchNorm(_Synchronised):
    """`nn.SyncBatchNorm` in fused kernels: statistics of a batch spread over many processes.

    In training all processes of the group have to call the module equally often, forward and
    backward. They may bring batches of different sizes, and empty ones. A call sends one
    all-gather of 3 * C + 1 numbers, and its backward one all-reduce of 2 * C. In eval mode, or
    if the group has one process, it is the plain module and sends nothing.

    It works with any backend of `torch.distributed`: NCCL on GPUs, Gloo on CPUs. `state_dict` is
    that of `nn.SyncBatchNorm`. Gradients of weight and bias are those of the process's own part
    of the batch, as DistributedDataParallel expects.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for
            `nn.SyncBatchNorm`.
        process_group: the processes that share statistics; None for all.
        biased_running_var, skip_nonfinite: as for `batch_norm`; it is the whole batch that is
            skipped, in all processes.

    Raises:
        ValueError: on a CPU, the whole batch has one value per channel; the group does not hold
            this process; the input has fewer than two axes. On a GPU one value per channel is
            normalised to 0, and makes the running variance NaN.
        RuntimeError: a call in training inside of `torch.func` or forward-mode AD.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        biased_running_var: bool = False,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            biased_running_var=biased_running_var, skip_nonfinite=skip_nonfinite, **kwargs,
        )  # fmt: skip
        self.process_group = process_group


class FusedSyncBatchNormAct(_Synchronised, _FusedAct):
    """`FusedSyncBatchNorm`, an optional residual and an activation in one.

    `forward(x, residual=None)` returns `act(drop(bn(x)) + residual)`; the residual has the shape
    of `x`.

    Args:
        process_group: as for `FusedSyncBatchNorm`.
        others: as for `FusedBatchNormAct2d`, which are the arguments of timm's `BatchNormAct2d`.

    Raises:
        TypeError, ValueError: as `FusedBatchNormAct2d` raises them.
    """

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
        *,
        process_group: Any = None,
        biased_running_var: bool = False,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, apply_act, act_layer,
            act_kwargs, inplace, drop_layer, device, dtype,
            biased_running_var=biased_running_var, skip_nonfinite=skip_nonfinite, **kwargs,
        )  # fmt: skip
        self.process_group = process_group

    def without_activation(self) -> _BatchNorm:
        """Returns the norm alone, an `nn.SyncBatchNorm` that shares parameters and buffers."""
        norm = super().without_activation()
        norm.process_group = self.process_group
        return norm

"""What the sizes of a call decide, once: its plan, and a launcher for each of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .kernels.backward import bn_apply_bwd_kernel, bn_reduce_bwd_kernel
from .kernels.forward import bn_apply_fwd_kernel, bn_stats_fwd_kernel
from .kernels.plan import Pass, Schedule, make_plan
from .kernels.resident import bn_resident_bwd_kernel, bn_resident_fwd_kernel
from .kernels.ticketed import bn_ticketed_bwd_kernel, bn_ticketed_fwd_kernel
from .kernels.tiling import Problem, Tile
from .launch import Launcher, device_facts, limits_registers
from .layout import mask_sizes, memory_format, sizes, statistics_dtype

# Multiplications and additions are not contracted, so that the backward finds
# the activation's argument on the side of a kink where the forward left it.
# Triton's default is about to change (3.10), and differs between targets.
_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True, eq=False)  # a key in `recall.py`, by identity
class Call:
    """One direction of calls of the same sizes, strides, dtypes and options.

    Attributes:
        format: in which the kernels take tensors of the input's sizes.
        statistics: dtype of mean and rstd.
        mask_bytes: of the packed mask, 0 if none is saved.
        blocks: channel blocks, each of which needs a counter.
        partials: elements of the partial results.
        schedule: what the planner decided.
        whole: everything in one launch, or None.
        reduce, apply: the two passes, for where `whole` is None or does not serve.
    """

    schedule: Schedule
    format: torch.memory_format
    statistics: torch.dtype
    mask_bytes: int
    blocks: int
    partials: int
    whole: Launcher | None
    reduce: Launcher | None
    apply: Launcher | None


def forward_call(
    tensors: Sequence[Tensor | None], training: bool, cumulative: bool, activation: str,
    save_mask: bool,
) -> Call:  # fmt: skip
    """What a forward does.

    Args:
        tensors: input, residual, weight, bias, running mean and variance, counter.
        cumulative: momentum is the counter's.
        save_mask: for the backward.
    """
    options = (training, cumulative, activation, save_mask)
    return _forward_call(*_looks(tensors, tensors[0]), *options)


def backward_call(
    tensors: Sequence[Tensor | None],
    activation: str,
    wanted: tuple[bool, ...],
    format: torch.memory_format | None,
) -> Call:
    """What a backward does.

    Args:
        tensors: gradient of the output, input, residual, mask, weight, bias, statistics
            (a batch's mean and rstd, or the frozen mean), frozen variance.
        wanted: of input, residual, weight and bias, which gradients.
        format: of the tensors that the mask was made for; None without a mask.

    Raises:
        RuntimeError: mean and rstd are no longer of the forward's dtype.
    """
    *_, statistics, var = tensors
    if var is None and statistics.dtype != statistics_dtype(tensors[1].dtype):
        raise RuntimeError(
            f"saved statistics must be of {statistics_dtype(tensors[1].dtype)},"
            f" but hooks made them {statistics.dtype}"
        )
    return _backward_call(*_looks(tensors, tensors[1]), activation, wanted, format)


def _looks(tensors: Sequence[Tensor | None], x: Tensor) -> tuple:
    """Sizes, strides and device of the input, and the dtypes of all: None where there is none."""
    return x.shape, x.stride(), x.device, tuple(None if t is None else t.dtype for t in tensors)


# Launchers are not shared between calls that differ in anything that these take.
@lru_cache(maxsize=1024)
def _forward_call(
    shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device,
    dtypes: tuple[torch.dtype | None, ...], training: bool, cumulative: bool, activation: str,
    save_mask: bool,
) -> Call:  # fmt: skip
    dtype, residual, *_ = dtypes
    saves = "mask" if save_mask else None
    setup = _Setup(shape, stride, dtype, device, training, residual is not None, saves)
    problem, schedule = setup.problem, make_plan(setup.problem, device_facts(device)).forward
    reduce, tile = schedule.reduce, schedule.apply
    one_pass = {"ACTIVATION": activation, "CUMULATIVE": cumulative}
    whole = first = None
    if schedule.strategy == "resident":
        whole = setup.launcher(bn_resident_fwd_kernel, tile, setup.programs(tile), **one_pass)
    elif schedule.strategy == "ticketed":
        whole = setup.launcher(
            bn_ticketed_fwd_kernel, reduce.tile, schedule.tickets(problem),
            reduce.splits, schedule.slice_blocks, MERGE=reduce.merge, **one_pass,
        )  # fmt: skip
    elif training:
        first = setup.launcher(
            bn_stats_fwd_kernel, reduce.tile, setup.programs_of(reduce), reduce.splits,
            MERGE=reduce.merge, CUMULATIVE=cumulative,
        )  # fmt: skip
    second = setup.launcher(bn_apply_fwd_kernel, tile, setup.programs(tile), ACTIVATION=activation)
    return setup.call(schedule, whole, first, None if whole else second, counts=True)


@lru_cache(maxsize=1024)
def _backward_call(
    shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device,
    dtypes: tuple[torch.dtype | None, ...], activation: str, wanted: tuple[bool, ...],
    format: torch.memory_format | None,
) -> Call:  # fmt: skip
    _, dtype, residual, mask, *_, var = dtypes
    training = var is None
    saves = "mask" if mask is not None else None if residual is None else "residual"
    setup = _Setup(shape, stride, dtype, device, training, saves is not None, saves, format)
    problem, schedule = setup.problem, make_plan(setup.problem, device_facts(device)).backward
    reduce, tile = schedule.reduce, schedule.apply
    if schedule.strategy == "resident":
        whole = setup.launcher(
            bn_resident_bwd_kernel, tile, setup.programs(tile), ACTIVATION=activation
        )
        return setup.call(schedule, whole, None, None, counts=False)
    whole = second = None
    if schedule.strategy == "ticketed":
        whole = setup.launcher(
            bn_ticketed_bwd_kernel, reduce.tile, schedule.tickets(problem),
            reduce.splits, schedule.slice_blocks, MERGE=reduce.merge, ACTIVATION=activation,
        )  # fmt: skip
    first = setup.launcher(
        bn_reduce_bwd_kernel, reduce.tile, setup.programs_of(reduce), reduce.splits,
        MERGE=reduce.merge, ACTIVATION=activation,
    )  # fmt: skip
    if training:
        second = setup.launcher(
            bn_apply_bwd_kernel, tile, setup.programs(tile), ACTIVATION=activation
        )
    return setup.call(schedule, whole, first, second, counts=False)


def forget() -> None:
    """Forgets all calls: what comes next is planned anew."""
    for cached in (make_plan, _forward_call, _backward_call):
        cached.cache_clear()


class _Setup:
    """The problem that an input poses, and launchers for it."""

    def __init__(
        self, shape, stride, dtype, device, training, residual, saves, format=None
    ) -> None:
        self.like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if format is not None:
            self.like = self.like.contiguous(memory_format=format)
        self.format, self.device = memory_format(self.like), device
        self.problem = make_problem(self.like, training, residual, saves)

    def programs(self, tile: Tile) -> int:
        return prod(tile.grid(self.problem))

    def programs_of(self, reduce: Pass) -> int:
        return reduce.splits * reduce.tile.grid(self.problem)[1]

    def launcher(
        self, kernel: Any, tile: Tile, programs: int, *integers: int, **constants: Any
    ) -> Launcher:
        n, c, s = self.problem.n, self.problem.c, self.problem.s
        # Of the extents the contiguous one, or that of flattened planes, in units of its alignment.
        extents = (n, c // tile.align, s) if s == 1 or tile.flat else (n, c, s // tile.align)
        constants |= {"ALIGN": tile.align, "FLAT": tile.flat, "num_warps": tile.warps, **_OPTIONS}
        constants |= {"BLOCK_N": tile.n, "BLOCK_C": tile.c, "BLOCK_S": tile.s}
        if limits_registers(self.device):
            constants["maxnreg"] = tile.registers
        return Launcher(kernel, self.device, programs, (*extents, *integers), constants)

    def call(self, schedule, whole, reduce, apply, counts: bool) -> Call:
        splits, blocks = schedule.reduce.splits, schedule.reduce.tile.grid(self.problem)[1]
        return Call(
            schedule=schedule,
            format=self.format,
            statistics=statistics_dtype(self.like.dtype),
            mask_bytes=prod(mask_sizes(self.like)) if self.problem.saves == "mask" else 0,
            blocks=blocks,
            partials=splits * (2 * self.problem.c + counts * blocks),
            whole=whole,
            reduce=reduce,
            apply=apply,
        )


def make_problem(
    x: Tensor, training: bool = True, residual: bool = False, saves: str | None = None
) -> Problem:
    """What the planner needs to know of a call."""
    return Problem(*sizes(x, memory_format(x)), x.element_size(), training, residual, saves)

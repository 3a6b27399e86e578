"""What the sizes of a call decide, once: its plan, and a launcher for each of its kernels."""

from __future__ import annotations

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
from .launch import Launcher, device_facts
from .layout import mask_sizes, memory_format, sizes, statistics_dtype

# Multiplications and additions are not contracted, so that the backward finds
# the activation's argument on the side of a kink where the forward left it.
# Triton's default is about to change (3.10), and differs between targets.
_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Call:
    """One direction of calls of the same sizes, strides, dtypes and options.

    Attributes:
        format: in which the kernels take tensors of the input's sizes.
        statistics: dtype of mean and rstd.
        mask_bytes: of the packed mask.
        blocks: channel blocks, each of which needs a counter.
        partials: elements of the partial results.
        whole: the only launch; None if there are two, or may be.
        reduce, apply: the launches of two passes; None if there is no such call.
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


@lru_cache(maxsize=1024)
def forward_call(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    residual: bool, save_mask: bool, training: bool, activation: str, cumulative: bool,
    *kinds: torch.dtype | bool | None,
) -> Call:  # fmt: skip
    """What a forward does with an input of these sizes and strides.

    Args:
        kinds: dtypes of the other tensors, None where there is none: launchers
            are not shared between them.
    """
    setup = _Setup(shape, stride, dtype, device, training, residual, "mask" if save_mask else None)
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
def backward_call(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    saves: str | None, training: bool, activation: str, *kinds: torch.dtype | bool | None,
) -> Call:  # fmt: skip
    """What a backward does, given the forward's input.

    Args:
        kinds: dtypes of the other tensors, None where there is none, and the
            gradients wanted: launchers are not shared between them.
    """
    setup = _Setup(shape, stride, dtype, device, training, saves is not None, saves)
    problem, schedule = setup.problem, make_plan(setup.problem, device_facts(device)).backward
    reduce, tile = schedule.reduce, schedule.apply
    whole = None
    if schedule.strategy == "resident":
        whole = setup.launcher(
            bn_resident_bwd_kernel, tile, setup.programs(tile), ACTIVATION=activation
        )
    elif schedule.strategy == "ticketed":
        whole = setup.launcher(
            bn_ticketed_bwd_kernel, reduce.tile, schedule.tickets(problem),
            reduce.splits, schedule.slice_blocks, MERGE=reduce.merge, ACTIVATION=activation,
        )  # fmt: skip
    first = setup.launcher(
        bn_reduce_bwd_kernel, reduce.tile, setup.programs_of(reduce), reduce.splits,
        MERGE=reduce.merge, ACTIVATION=activation,
    )  # fmt: skip
    second = setup.launcher(bn_apply_bwd_kernel, tile, setup.programs(tile), ACTIVATION=activation)
    return setup.call(schedule, whole, first, second if training else None, counts=False)


class _Setup:
    """The problem that an input poses, and launchers for it."""

    def __init__(self, shape, stride, dtype, device, training, residual, saves) -> None:
        self.like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
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
        return Launcher(kernel, self.device, programs, (*extents, *integers), constants)

    def call(self, schedule, whole, reduce, apply, counts: bool) -> Call:
        splits, blocks = schedule.reduce.splits, schedule.reduce.tile.grid(self.problem)[1]
        return Call(
            schedule=schedule,
            format=self.format,
            statistics=statistics_dtype(self.like.dtype),
            mask_bytes=prod(mask_sizes(self.like)),
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

"""An execution plan holds all that sizes, strides, dtypes and options of a call decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..kernels.backward import bn_apply_bwd_kernel, bn_reduce_bwd_kernel
from ..kernels.forward import bn_apply_fwd_kernel, bn_stats_fwd_kernel
from ..kernels.passes import Pass
from ..kernels.plan import make_schedule
from ..kernels.resident import bn_resident_bwd_kernel, bn_resident_fwd_kernel
from ..kernels.schedules import Schedule
from ..kernels.synchronised import (
    MERGED_CHANNELS,
    MERGED_RANKS,
    bn_merge_fwd_kernel,
    bn_moments_fwd_kernel,
)
from ..kernels.ticketed import bn_ticketed_bwd_kernel, bn_ticketed_fwd_kernel
from ..kernels.tiling import (
    PROGRAMS_PER_SM,
    Problem,
    choose_tile,
    group_width,
    registers_of,
)
from ..strategy import get_strategy
from .device import allocator, device_facts, limits_registers
from .launcher import Launcher
from .layout import mask_sizes, memory_format, problem_of, statistics_dtype

# These are input, residual, weight, bias, running mean and variance, and num_batches_tracked.
ForwardTensors: TypeAlias = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]

# These are the output's gradient, input, residual, mask, weight, bias, statistics, and fixed
# variance. A batch's statistics are mean, rstd and bias in one tensor, and the bias itself is None.
# Fixed statistics are the mean alone, with the bias and the variance as further tensors.
BackwardTensors: TypeAlias = tuple[
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor,
    Tensor | None,
]

# Keep multiplications and additions apart: if the compiler contracted them in one kernel
# and not in another, the backward might find the activation's argument on the other side
# of a kink than the forward did. Triton's default differs between targets and versions.
_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True, eq=False)  # a backward's key compares the forward's plan by identity
class ExecutionPlan:
    """How one direction of a call runs, with a launcher for each of its kernels.

    Attributes:
        schedule: the planner's decisions.
        format: the memory format in which the kernels read and write tensors of the
            input's shape.
        allocate: allocates a tensor of given sizes, strides and dtype on the call's device.
        output: sizes, strides and dtype of output and gradients of the input's shape.
        channels: the number of channels.
        statistics: dtype of mean, rstd and sums.
        mask_bytes: size of the packed mask, 0 if the call saves none.
        groups: number of groups of channels, each of which needs a counter.
        partial_bytes: size of the partial results.
        skip: whether a batch with statistics that are not finite updates nothing.
        single_launch: launcher of the kernel that does everything, or None.
        reduce, apply: launchers of the two passes, for a plan without a single launch
            and for calls that the single launch can't serve.
    """

    schedule: Schedule
    format: torch.memory_format
    allocate: Callable[..., Tensor]
    output: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
    channels: int
    statistics: torch.dtype
    mask_bytes: int
    groups: int
    partial_bytes: int
    skip: bool
    single_launch: Launcher | None
    reduce: Launcher | None
    apply: Launcher | None


def plan_forward(
    tensors: ForwardTensors, training: bool, cumulative: bool, activation: str,
    save_mask: bool, skip: bool, synchronised: bool = False,
) -> ExecutionPlan:  # fmt: skip
    """Plans a forward.

    Args:
        tensors: the tensors of the call.
        training: whether the statistics are the batch's own.
        cumulative: whether momentum is None, so that the running statistics are averages
            over all batches.
        activation: name of the activation.
        save_mask: whether the signs of the activation's argument are saved for the backward.
        skip: whether a batch with statistics that are not finite updates nothing.
        synchronised: whether the plan has two passes, of which the first leaves the moments of the
            input as they are, so that other processes' moments can be merged with them.
    """
    strategy = "two-pass" if synchronised else get_strategy()
    options = (training, cumulative, activation, save_mask, skip, strategy, synchronised)
    return _plan_forward(*_signature(tensors, tensors[0]), *options)


def plan_backward(
    tensors: BackwardTensors,
    activation: str,
    wanted: tuple[bool, ...],
    format: torch.memory_format | None,
    synchronised: bool = False,
) -> ExecutionPlan:
    """Plans a backward.

    Args:
        tensors: the tensors of the call.
        activation: name of the activation.
        wanted: which gradients are wanted, of input, residual, weight and bias.
        format: memory format of the tensors that the mask was made for; None without
            a mask.
        synchronised: whether the plan has two passes, between which processes add up their sums.

    Raises:
        RuntimeError: hooks on saved tensors changed the dtype of mean and rstd.
    """
    *_, statistics, var = tensors
    if var is None and statistics.dtype != statistics_dtype(tensors[1].dtype):
        raise RuntimeError(
            f"saved statistics must be of {statistics_dtype(tensors[1].dtype)},"
            f" but hooks made them {statistics.dtype}"
        )
    strategy = "two-pass" if synchronised else get_strategy()
    options = (activation, wanted, format, strategy, synchronised)
    return _plan_backward(*_signature(tensors, tensors[1]), *options)


def plan_merge(
    gathered: Tensor, parameters: Sequence[Tensor | None], cumulative: bool, skip: bool
) -> Launcher:
    """Returns the launcher of the kernel that merges the moments of several processes.

    Args:
        gathered: shape (processes, 3 * C + 1), the moments.
        parameters: bias, running mean and variance, and num_batches_tracked.
        cumulative, skip: as for `plan_forward`.
    """
    dtypes = tuple(None if t is None else t.dtype for t in (gathered, *parameters))
    return _plan_merge(gathered.shape, gathered.device, dtypes, cumulative, skip)


def clear() -> None:
    """Drops all cached plans and schedules, so that the next call is planned anew."""
    plans = _plan_forward, _plan_backward, _plan_merge
    for cached in (make_schedule, choose_tile, group_width, *plans):
        cached.cache_clear()


def _signature(tensors: Sequence[Tensor | None], x: Tensor) -> tuple:
    """Returns the input's shape, strides and device, and all dtypes, None for no tensor."""
    return x.shape, x.stride(), x.device, tuple(None if t is None else t.dtype for t in tensors)


# The arguments of the next two functions hold all that Triton specialises a kernel on,
# except for alignment. So calls that need different compiled kernels never share a launcher.
@lru_cache(maxsize=1024)
def _plan_forward(
    shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device,
    dtypes: tuple[torch.dtype | None, ...], training: bool, cumulative: bool, activation: str,
    save_mask: bool, skip: bool, strategy: str, synchronised: bool,
) -> ExecutionPlan:  # fmt: skip
    dtype, residual, *_ = dtypes
    assert dtype is not None
    statistics = statistics_dtype(dtype)
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    problem = problem_of(x, training, residual is not None, "mask" if save_mask else None)
    schedule = make_schedule(problem, device_facts(device), False, strategy)
    launcher = partial(_launcher, problem, device, schedule)
    reduce, apply = schedule.reduce, schedule.apply
    single_launch = first = second = None
    if schedule.strategy == "resident":
        single_launch = launcher(
            bn_resident_fwd_kernel, apply, ACTIVATION=activation, CUMULATIVE=cumulative
        )
    elif schedule.strategy == "ticketed":
        single_launch = launcher(
            bn_ticketed_fwd_kernel, reduce, ACTIVATION=activation, CUMULATIVE=cumulative
        )
    else:
        if synchronised:
            first = launcher(bn_moments_fwd_kernel, reduce)
        elif training:
            first = launcher(bn_stats_fwd_kernel, reduce, CUMULATIVE=cumulative)
        second = launcher(bn_apply_fwd_kernel, apply, ACTIVATION=activation)
    return ExecutionPlan(
        schedule=schedule,
        format=memory_format(x),
        allocate=allocator(device),
        output=(tuple(shape), torch.empty_like(x, memory_format=memory_format(x)).stride(), dtype),
        channels=shape[1],
        statistics=statistics,
        mask_bytes=prod(mask_sizes(x)) if save_mask else 0,
        groups=reduce.groups(problem),
        partial_bytes=2 * reduce.rows(problem) * problem.c * statistics.itemsize,
        skip=skip,
        single_launch=single_launch,
        reduce=first,
        apply=second,
    )


@lru_cache(maxsize=1024)
def _plan_backward(
    shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device,
    dtypes: tuple[torch.dtype | None, ...], activation: str, wanted: tuple[bool, ...],
    format: torch.memory_format | None, strategy: str, synchronised: bool,
) -> ExecutionPlan:  # fmt: skip
    _, dtype, residual, mask, *_, var = dtypes
    assert dtype is not None
    statistics = statistics_dtype(dtype)
    training = var is None
    saves = "mask" if mask is not None else None if residual is None else "residual"
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if format is not None:
        x = x.contiguous(memory_format=format)
    problem = problem_of(x, training, saves is not None, saves)
    schedule = make_schedule(problem, device_facts(device), True, strategy)
    launcher = partial(_launcher, problem, device, schedule)
    reduce, apply = schedule.reduce, schedule.apply
    single_launch = first = second = None
    if schedule.strategy == "resident":
        single_launch = launcher(bn_resident_bwd_kernel, apply, ACTIVATION=activation)
    else:
        if schedule.strategy == "ticketed":
            single_launch = launcher(bn_ticketed_bwd_kernel, reduce, ACTIVATION=activation)
        # A ticketed backward has the two passes too, for calls that want no gradient of the
        # input.
        first = launcher(bn_reduce_bwd_kernel, reduce, ACTIVATION=activation)
        if training:
            second = launcher(bn_apply_bwd_kernel, apply, ACTIVATION=activation)
    return ExecutionPlan(
        schedule=schedule,
        format=memory_format(x),
        allocate=allocator(device),
        output=(tuple(shape), torch.empty_like(x, memory_format=memory_format(x)).stride(), dtype),
        channels=shape[1],
        statistics=statistics,
        mask_bytes=prod(mask_sizes(x)) if saves == "mask" else 0,
        groups=reduce.groups(problem),
        partial_bytes=2 * reduce.rows(problem) * problem.c * statistics.itemsize,
        skip=False,
        single_launch=single_launch,
        reduce=first,
        apply=second,
    )


@lru_cache(maxsize=1024)
def _plan_merge(
    shape: tuple[int, int], device: torch.device, dtypes: tuple[torch.dtype | None, ...],
    cumulative: bool, skip: bool,
) -> Launcher:  # fmt: skip
    ranks, channels = shape[0], shape[1] // 3
    constants = {"CUMULATIVE": cumulative, "RANKS": MERGED_RANKS, "WIDTH": MERGED_CHANNELS}
    constants |= {"num_warps": 2, **_OPTIONS}
    programs = -(-channels // MERGED_CHANNELS)
    return Launcher(bn_merge_fwd_kernel, device, programs, (channels, ranks), constants)


def _launcher(
    problem: Problem, device: torch.device, schedule: Schedule, kernel: Any, work: Pass,
    **constants: Any,
) -> Launcher:  # fmt: skip
    """Makes a launcher of a kernel for one pass over a problem."""
    values = {
        "N": problem.n, "C": problem.c, "S": problem.s, "Q": problem.c * problem.s,
        "width": work.width, "length": work.length, "splits": work.splits,
        "slice_groups": schedule.slice_groups,
    }  # fmt: skip
    integers = [value for name, value in values.items() if name in kernel.arg_names]
    programs = work.programs(problem)
    if "slice_groups" in kernel.arg_names:
        at_once = PROGRAMS_PER_SM * device_facts(device).sm_count
        programs = min(schedule.tickets(problem), at_once)
    constants |= {"TILE": work.tile, "num_warps": schedule.warps, **_OPTIONS}
    if limits_registers(device):
        constants["maxnreg"] = registers_of(schedule.warps, schedule.strategy)
    return Launcher(kernel, device, programs, integers, constants)

"""Ticketed kernels read or write each tensor once in memory, in one launch.

What is read twice is read from the L2 cache the second time. The formulas are those of
`forward.py` and `backward.py`; `tickets.py` says in which order programs work and how
they wait for each other. Tiles that will be read again are loaded with "evict_last",
to stay in the cache, and tiles in their last use with "evict_first", to leave it first.
"""

import triton
import triton.language as tl

from .access import load_whole
from .addressing import (
    SIZES,
    Sizes,
    channels_of,
    find_run,
    groups_of,
    sizes_of,
    tiles_of_group,
)
from .backward import apply_run_backward, finish_sums, load_coefficients, store_partial_sums
from .epilogue import batch_affine
from .forward import apply_run, finish_statistics, store_partial_moments
from .tickets import draw_ticket, last_to_arrive, raise_flag, wait_for_flag, work_of


@triton.jit
def in_loop(sizes, ticket, TILE: tl.constexpr):
    """Returns the sizes, so that the compiler computes what depends on them anew for each ticket.

    Otherwise it would compute that once, before the loop over tickets, and run out of registers.
    """
    zero = tl.minimum(ticket, 0)
    columns = zero * TILE.align  # so that Q and width are known as multiples of TILE.align
    return Sizes(
        sizes.N + zero, sizes.C + zero, sizes.S + zero, sizes.Q + columns, sizes.width + columns,
        sizes.length + zero, sizes.splits + zero,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def bn_ticketed_fwd_kernel(
    X,  # pointer to the input
    R,  # pointer to the residual, or None
    Y,  # pointer to the output
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias, written
    RunningMean,  # pointer to the running mean, updated, or None
    RunningVar,  # pointer to the running variance, updated, or None
    NumBatchesTracked,  # pointer to num_batches_tracked, incremented, or None
    Variances,  # pointer to (C,), written, or None: then no batch is skipped
    Partials,  # pointer to a (2, rows, C) table of means and sums of squares
    Arrivals,  # pointer to a zero for each group of channels, and one more
    Tickets,  # pointer to the counter of tickets, and a flag for each group of channels
    N,
    C,
    S,
    Q,
    width,
    length,
    splits,
    slice_groups,
    momentum: "fp64",
    correction: "fp64",
    eps: "fp64",
    param: "fp64",
    ACTIVATION: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program draws tickets, and takes the moments or computes the output of their runs."""
    acc = Statistics.dtype.element_ty
    sizes = sizes_of(N, C, S, Q, width, length, splits, TILE)
    groups, tiles = groups_of(sizes), tiles_of_group(sizes, TILE)
    slices = (groups - 1) // slice_groups + 1
    total = 2 * slices * slice_groups * tiles * splits
    ticket, generation = draw_ticket(Tickets, total)
    while ticket < total:
        applies, group, tile, split = work_of(ticket, slices, slice_groups, tiles, splits)
        if group < groups:
            here = in_loop(sizes, ticket, TILE)
            run = find_run(group, tile, split, here, TILE)
            if applies:
                # The load of the input is in flight while the program waits.
                x = load_whole(X, run, run.whole, "evict_first", TILE)
                wait_for_flag(Tickets + 1 + group, generation)
                channels = channels_of(run, here, TILE)
                affine = batch_affine(Statistics, W, channels, C, ".cg")
                apply_run(
                    x, X, R, Y, Mask, affine, param, run, here, ACTIVATION, "evict_first", TILE
                )
            else:
                store_partial_moments(X, Partials, run, here, acc, "evict_last", TILE)
                if last_to_arrive(Arrivals + group, splits * tiles):
                    finish_statistics(
                        X, Partials, B, Statistics, RunningMean, RunningVar,
                        NumBatchesTracked, Variances, Arrivals, group, groups, momentum,
                        correction, eps, here, CUMULATIVE, TILE,
                    )  # fmt: skip
                    raise_flag(Tickets + 1 + group, generation)
        ticket, _ = draw_ticket(Tickets, total)


@triton.jit(do_not_specialize=SIZES)
def bn_ticketed_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias
    DW,  # pointer to the weight's gradient, or None
    DB,  # pointer to the bias's gradient, or None
    Sums,  # pointer to (2, C): sum(g), sum(g * (x - mean))
    DX,  # pointer to the input's gradient
    DR,  # pointer to the residual's gradient, or None
    Partials,  # pointer to a (2, rows, C) table of sums
    Arrivals,  # pointer to a zero for each group of channels
    Tickets,  # pointer to the counter of tickets, and a flag for each group of channels
    N,
    C,
    S,
    Q,
    width,
    length,
    splits,
    slice_groups,
    param: "fp64",
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program draws tickets, and takes the sums or computes the gradients of their runs."""
    acc = Statistics.dtype.element_ty
    sizes = sizes_of(N, C, S, Q, width, length, splits, TILE)
    groups, tiles = groups_of(sizes), tiles_of_group(sizes, TILE)
    slices = (groups - 1) // slice_groups + 1
    total = 2 * slices * slice_groups * tiles * splits
    ticket, generation = draw_ticket(Tickets, total)
    while ticket < total:
        applies, group, tile, split = work_of(ticket, slices, slice_groups, tiles, splits)
        if group < groups:
            here = in_loop(sizes, ticket, TILE)
            run = find_run(group, tile, split, here, TILE)
            if applies:
                channels = channels_of(run, here, TILE)
                affine = batch_affine(Statistics, W, channels, C, "")
                wait_for_flag(Tickets + 1 + group, generation)
                constant, slope = load_coefficients(Sums, None, affine, channels, here, ".cg")
                apply_run_backward(
                    DY, X, R, Mask, affine, constant, slope, param, DX, DR, run, here,
                    ACTIVATION, "evict_first", TILE,
                )  # fmt: skip
            else:
                channels = channels_of(run, here, TILE)
                affine = batch_affine(Statistics, W, channels, C, "")
                store_partial_sums(
                    DY, X, R, Mask, Partials, None, None, affine, channels, param,
                    run, here, ACTIVATION, "evict_last", TILE,
                )  # fmt: skip
                if last_to_arrive(Arrivals + group, splits * tiles):
                    finish_sums(
                        Partials, Sums, Statistics, None, DW, DB, 0.0, group, here, acc,
                        TILE,
                    )  # fmt: skip
                    raise_flag(Tickets + 1 + group, generation)
        ticket, _ = draw_ticket(Tickets, total)

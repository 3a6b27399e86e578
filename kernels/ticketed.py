"""Ticketed kernels: one launch in which each tensor crosses memory once.

What is read twice is read from the L2 cache the second time. The formulas are those of
`forward.py` and `backward.py`; `tickets.py` says in which order programs work and how
they wait for each other. Tiles that will be read again are loaded to stay in the cache,
and tiles in their last use are loaded to leave it first.
"""

import triton
import triton.language as tl

from .addressing import (
    advance,
    blocks_of,
    corner,
    extents,
    load_tile,
    tile_numbers,
    tiles_of_block,
)
from .backward import (
    finish_sums,
    load_gradient,
    load_means,
    store_gradients,
    store_partial_sums,
)
from .epilogue import mean_and_rstd, scale_and_bias
from .forward import finish_statistics, store_output, store_partial_moments
from .tickets import draw_ticket, last_to_arrive, raise_flag, wait_for_flag, work_of


@triton.jit
def bn_ticketed_fwd_kernel(
    X,  # pointer to the input
    R,  # pointer to the residual, or None
    Y,  # pointer to the output
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (2, C): mean and 1 / sqrt(var + eps), written
    RunningMean,  # pointer to the running mean, updated, or None
    RunningVar,  # pointer to the running variance, updated, or None
    NumBatchesTracked,  # pointer to num_batches_tracked, incremented, or None
    Partials,  # pointer to (2, splits, C) means and sums of squares, then (blocks, splits) counts
    Arrivals,  # pointer to a zero for each channel block, and one more
    Tickets,  # pointer to the counter of tickets, and a flag for each channel block
    N,
    C,
    S,
    splits,
    slice_blocks,
    momentum: "fp64",
    eps: "fp64",
    param: "fp64",
    ALIGN: tl.constexpr,
    MERGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program serves one ticket: it reduces or applies every splits-th tile of a block."""
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = Statistics.dtype.element_ty
    blocks = blocks_of(C, BLOCK_C)
    ticket, generation = draw_ticket(Tickets)
    slices = blocks_of(blocks, slice_blocks)
    applies, block, split = work_of(ticket, slices, slice_blocks, splits)
    if block < blocks:
        if applies:
            c0 = block * BLOCK_C
            wait_for_flag(Tickets + 1 + block, generation)
            mean, rstd = mean_and_rstd(Statistics, None, 0.0, c0, C, acc, BLOCK_C, ".cg")
            scale, bias = scale_and_bias(W, B, rstd, c0, C, BLOCK_C)
            n_tile, s_tile = tile_numbers(split, S, BLOCK_S)
            n_step, s_step = tile_numbers(splits, S, BLOCK_S)
            for _ in range(split, tiles_of_block(N, S, BLOCK_N, BLOCK_S), splits):
                n0, s0 = corner(n_tile, s_tile, BLOCK_N, BLOCK_S)
                n_tile, s_tile = advance(n_tile, s_tile, n_step, s_step, S, BLOCK_S)
                x = load_tile(
                    X, N, C, S, n0, c0, s0, ACCESS, "evict_first", BLOCK_N, BLOCK_C, BLOCK_S
                )
                store_output(
                    x.to(acc), R, Y, Mask, mean, scale, bias, param, N, C, S, n0, c0, s0,
                    ACTIVATION, ACCESS, "evict_first", BLOCK_N, BLOCK_C, BLOCK_S,
                )  # fmt: skip
        else:
            about = store_partial_moments(
                X, Partials, N, C, S, block, split, splits, acc,
                ACCESS, "evict_last", BLOCK_N, BLOCK_C, BLOCK_S,
            )  # fmt: skip
            if last_to_arrive(Arrivals + block, splits):
                finish_statistics(
                    Partials, about, Statistics, RunningMean, RunningVar, NumBatchesTracked,
                    Arrivals, C, block, splits, momentum, eps, CUMULATIVE, MERGE, BLOCK_C,
                )  # fmt: skip
                raise_flag(Tickets + 1 + block, generation)


@triton.jit
def bn_ticketed_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (2, C): mean and 1 / sqrt(var + eps)
    DW,  # pointer to the weight's gradient, or None
    DB,  # pointer to the bias' gradient, or None
    Sums,  # pointer to (2, C): sum(g), sum(g * (x - mean))
    DX,  # pointer to the input's gradient
    DR,  # pointer to the residual's gradient, or None
    Partials,  # pointer to (2, splits, C) sums
    Arrivals,  # pointer to a zero for each channel block
    Tickets,  # pointer to the counter of tickets, and a flag for each channel block
    N,
    C,
    S,
    splits,
    slice_blocks,
    param: "fp64",
    ALIGN: tl.constexpr,
    MERGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program serves one ticket: it sums or applies every splits-th tile of a block."""
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = Statistics.dtype.element_ty
    blocks = blocks_of(C, BLOCK_C)
    ticket, generation = draw_ticket(Tickets)
    slices = blocks_of(blocks, slice_blocks)
    applies, block, split = work_of(ticket, slices, slice_blocks, splits)
    if block < blocks:
        c0 = block * BLOCK_C
        mean, rstd = mean_and_rstd(Statistics, None, 0.0, c0, C, acc, BLOCK_C, "")
        scale, bias = scale_and_bias(W, B, rstd, c0, C, BLOCK_C)
        if applies:
            wait_for_flag(Tickets + 1 + block, generation)
            mean_g, mean_gx = load_means(Sums, N, S, C, c0, acc, BLOCK_C, ".cg")
            n_tile, s_tile = tile_numbers(split, S, BLOCK_S)
            n_step, s_step = tile_numbers(splits, S, BLOCK_S)
            for _ in range(split, tiles_of_block(N, S, BLOCK_N, BLOCK_S), splits):
                n0, s0 = corner(n_tile, s_tile, BLOCK_N, BLOCK_S)
                n_tile, s_tile = advance(n_tile, s_tile, n_step, s_step, S, BLOCK_S)
                g, centred = load_gradient(
                    DY, X, R, Mask, mean, scale, bias, param, N, C, S, n0, c0, s0,
                    ACTIVATION, ACCESS, "evict_first", BLOCK_N, BLOCK_C, BLOCK_S,
                )  # fmt: skip
                store_gradients(
                    g, centred, rstd, scale, mean_g, mean_gx, DX, DR, N, C, S, n0, c0, s0,
                    ACCESS, "evict_first", BLOCK_N, BLOCK_C, BLOCK_S,
                )  # fmt: skip
        else:
            store_partial_sums(
                DY, X, R, Mask, Partials, None, None, mean, scale, bias, param, N, C, S,
                block, split, splits, ACTIVATION, ACCESS, "evict_last",
                BLOCK_N, BLOCK_C, BLOCK_S,
            )  # fmt: skip
            if last_to_arrive(Arrivals + block, splits):
                finish_sums(Partials, Sums, rstd, DW, DB, C, c0, splits, MERGE, BLOCK_C)
                raise_flag(Tickets + 1 + block, generation)

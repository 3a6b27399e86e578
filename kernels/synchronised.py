"""Kernels for statistics of a batch that is spread over several devices.

Each device takes the moments of its own part of the batch (mean, sum of squares about the mean,
count). The devices exchange these, and each merges all of them in the same order, so that all
get the same bits. `forward.py` and `backward.py` do the rest.

A mean is a sum of two numbers, the rounded mean and what rounding took away. Otherwise rounding
would change the distance between two means, whose square is a part of the variance.
"""

import triton
import triton.language as tl

from .addressing import SIZES, find_run, share_of, sizes_of, tiles_of_group
from .forward import store_partial_moments, store_statistics
from .moments import about_the_mean, merge_partials, rows_of, typical_values
from .running import averaging_factor, finish_batch
from .tickets import last_to_arrive

# A program merges the moments of so many channels, and those of so many ranks at a time.
MERGED_CHANNELS = 32
MERGED_RANKS = 16


@triton.jit
def store_group_moments(X, Partials, Moments, group, sizes, TILE: tl.constexpr):
    """Merges the partial moments of a group of channels and stores the result."""
    acc: tl.constexpr = Moments.dtype.element_ty
    WIDTH: tl.constexpr = TILE.merge_channels
    first = group * (sizes.width // sizes.S)
    end = tl.minimum(first + sizes.width // sizes.S, sizes.C)
    for some in range(first, end, WIDTH):
        c = some + tl.arange(0, WIDTH)[None, :]
        near = typical_values(X, tl.minimum(c, sizes.C - 1), sizes, acc)
        _, mean, m2 = merge_partials(
            Partials, Partials + rows_of(sizes, TILE) * sizes.C, first, end, c, sizes, acc, TILE
        )
        rounded = near + mean
        tl.store(Moments + c, rounded, c < end)
        tl.store(Moments + sizes.C + c, (near - rounded) + mean, c < end)
        tl.store(Moments + 2 * sizes.C + c, m2, c < end)
    if group == 0:
        tl.store(Moments + 3 * sizes.C, (tl.cast(sizes.N, tl.int64) * sizes.S).to(acc))


@triton.jit(do_not_specialize=SIZES)
def bn_moments_fwd_kernel(
    X,  # pointer to the input
    Moments,  # pointer to 3 * C + 1 numbers, written: means, their rests, sums of squares, count
    Partials,  # pointer to a (2, rows, C) table of means and sums of squares
    Arrivals,  # pointer to a zero for each group of channels
    N,
    C,
    S,
    Q,
    width,
    length,
    splits,
    TILE: tl.constexpr,
):
    """Does what `bn_stats_fwd_kernel` does, but leaves the moments as they are."""
    sizes = sizes_of(N, C, S, Q, width, length, splits, TILE)
    group, tile, split = share_of(tl.program_id(0), sizes, TILE)
    run = find_run(group, tile, split, sizes, TILE)
    store_partial_moments(X, Partials, run, sizes, Moments.dtype.element_ty, "", TILE)
    if last_to_arrive(Arrivals + group, splits * tiles_of_group(sizes, TILE)):
        store_group_moments(X, Partials, Moments, group, sizes, TILE)


@triton.jit
def load_counts(Gathered, rank, ranks, C):
    """Loads how many values a channel has on each of some ranks, 0 past the last rank."""
    return tl.load(Gathered + rank * (3 * C + 1) + 3 * C, rank < ranks, other=0.0)


@triton.jit
def merge_ranks(Gathered, c, ranks, C, acc: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr):
    """Merges the moments of all ranks (Chan, Golub and LeVeque, 1983); ranks may have no values.

    The moments are merged about the rounded mean of all values, so that nothing cancels:

    mean = about + d    with d_i = mean_i - about and d = sum(d_i * count_i / count)
    m2   = sum(m2_i) + sum(count_i * d_i^2) - count * d^2
    """
    rows = tl.arange(0, RANKS)[:, None].to(tl.int64)
    count = tl.zeros((RANKS, 1), acc)
    for first in range(0, ranks, RANKS):
        count += load_counts(Gathered, first + rows, ranks, C)
    count = tl.sum(count, axis=0, keep_dims=True)
    about = tl.zeros((RANKS, WIDTH), acc)
    for first in range(0, ranks, RANKS):
        counts = load_counts(Gathered, first + rows, ranks, C)
        at = Gathered + (first + rows) * (3 * C + 1) + c
        about += counts / count * tl.load(at, (counts > 0) & (c < C), other=0.0)
    about = tl.sum(about, axis=0, keep_dims=True)
    weighted = tl.zeros((RANKS, WIDTH), acc)
    squares = tl.zeros((RANKS, WIDTH), acc)
    m2 = tl.zeros((RANKS, WIDTH), acc)
    for first in range(0, ranks, RANKS):
        counts = load_counts(Gathered, first + rows, ranks, C)
        at = Gathered + (first + rows) * (3 * C + 1) + c
        exists = (counts > 0) & (c < C)
        near, rest = tl.load(at, exists, other=0.0), tl.load(at + C, exists, other=0.0)
        away = tl.where(exists, (near - about) + rest, 0.0)
        weighted += counts / count * away
        squares = tl.fma(counts * away, away, squares)
        m2 += tl.load(at + 2 * C, exists, other=0.0)
    weighted = tl.sum(weighted, axis=0, keep_dims=True)
    squares = tl.sum(squares, axis=0, keep_dims=True)
    between = about_the_mean(squares, count * weighted, weighted)
    return count, about + weighted, tl.sum(m2, axis=0, keep_dims=True) + between


@triton.jit(do_not_specialize=["C", "ranks"])
def bn_merge_fwd_kernel(
    Gathered,  # pointer to (ranks, 3 * C + 1): the `Moments` of each rank
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias, written
    Count,  # pointer to the number of values of a channel on all ranks, written
    RunningMean,  # pointer to the running mean, updated, or None
    RunningVar,  # pointer to the running variance, updated, or None
    NumBatchesTracked,  # pointer to num_batches_tracked, incremented, or None
    Variances,  # pointer to (C,), written, or None: then no batch is skipped
    Arrivals,  # pointer to a zero
    C,
    ranks,
    momentum: "fp64",
    correction: "fp64",
    eps: "fp64",
    CUMULATIVE: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program merges the moments of WIDTH channels, RANKS ranks at a time."""
    acc: tl.constexpr = Statistics.dtype.element_ty
    factor = averaging_factor(momentum, NumBatchesTracked, CUMULATIVE, acc)
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    count, mean, m2 = merge_ranks(Gathered, c, ranks, C, acc, RANKS, WIDTH)
    exists = c < C
    if Variances is None:
        # A batch without any value has no statistics to store. With Variances they are stored all
        # the same: they are NaN, by which `finish_batch` knows that it must skip the batch.
        exists = exists & (count > 0)
    store_statistics(
        count, mean, m2, B, Statistics, Variances, RunningMean, RunningVar, factor, correction, eps,
        c, exists, C,
    )  # fmt: skip
    first = tl.program_id(0) == 0
    if first:
        tl.store(Count + tl.arange(0, 1)[:, None], count)
    finish_batch(
        Statistics, RunningMean, RunningVar, NumBatchesTracked, Variances, momentum, C, first,
        Arrivals, tl.num_programs(0), CUMULATIVE,
    )  # fmt: skip

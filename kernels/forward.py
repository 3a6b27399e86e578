"""Forward kernels compute the statistics of the batch, then normalise.

With M = N * S values x to a channel:

    mean = sum(x) / M
    var  = sum((x - mean)^2) / M
    rstd = 1 / sqrt(var + eps)
    y    = activation((x - mean) * rstd * weight + bias + residual)
    running_mean <- (1 - momentum) * running_mean + momentum * mean
    running_var  <- (1 - momentum) * running_var  + momentum * var * M / (M - correction)

where the correction is 1 (Bessel's), or 0 for a running variance that is biased too.
"""

import triton
import triton.language as tl

from .access import (
    centre,
    load_tile,
    load_whole,
    store_tile,
)
from .addressing import (
    SIZES,
    channels_of,
    find_run,
    groups_of,
    inside,
    masked_tile,
    masked_tiles,
    share_of,
    sizes_of,
    tiles_of_group,
    values_of,
)
from .epilogue import activate, affine_of, is_positive, normalise, pack, store_mask
from .moments import (
    about_the_mean,
    merge_partials,
    rows_of,
    store_moments,
    sum_rows,
    typical_values,
)
from .running import averaging_factor, finish_batch, update_running
from .tickets import last_to_arrive


@triton.jit
def store_statistics(
    count, mean, m2, B, Statistics, Variances, RunningMean, RunningVar, factor, correction, eps, c,
    exists, C,
):  # fmt: skip
    """Stores statistics of channels, and updates the running ones unless Variances are given.

    The bias is written beside them: the parameter may change before the backward reads it.
    Returns rstd and the bias.
    """
    rstd = 1.0 / tl.sqrt(m2 / count + tl.full((), eps, mean.dtype))
    bias = tl.zeros_like(rstd)
    if B is not None:
        bias = tl.load(B + c, exists, other=0.0).to(rstd.dtype)
    tl.store(Statistics + c, mean, exists)
    tl.store(Statistics + C + c, rstd, exists)
    tl.store(Statistics + C + C + c, bias, exists)
    var = m2 / (count - tl.full((), correction, mean.dtype))
    if Variances is not None:
        tl.store(Variances + c, var, exists)
    else:
        update_running(RunningMean, mean, factor, c, exists)
        update_running(RunningVar, var, factor, c, exists)
    return rstd, bias


@triton.jit
def about_its_mean(x, near, run, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Returns the mean of a run's first tile, and the differences of its values from that.

    The mean is taken of differences from a typical value, since sums of large values might
    overflow. In a constant channel these differences are exactly 0.
    """
    part: tl.constexpr = 1.0 / (TILE.n * TILE.q if TILE.layout == "planes" else TILE.n)
    x = x.to(near.dtype)
    differences = tl.fma(x, part, -part * near)
    if MASKED:
        differences = tl.where(inside(run, 0, TILE), differences, 0.0)
        count = values_of(run, 1, TILE).to(near.dtype)
        mean = near + sum_rows(differences, TILE) / (count * part)
        return mean, centre(x, mean, run, 0, TILE)
    else:
        mean = near + sum_rows(differences, TILE)
        return mean, x - mean


@triton.jit
def store_partial_moments(
    X, Partials, run, sizes, acc: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr
):
    """Stores a run's moments, with means as differences from the channels' typical values.

    Sums are taken element by element, about the mean of the run's first tile, and reduced at
    the end of the run. Of K tiles the first is a fraction 1 / K, so whatever the data are, its
    mean s satisfies count * (s - mean)^2 <= (K - 1) * m2: what cancels is at most K times what
    remains.
    """
    x = load_tile(X, run, 0, True, EVICTION, TILE)
    second = tl.maximum(run.whole, 1)
    following = load_whole(X, run, second, EVICTION, TILE)
    channels = channels_of(run, sizes, TILE)
    near = typical_values(X, channels, sizes, acc)
    # A mask takes as many instructions as the rest, so whole tiles do without. In the layout
    # "columns" two branches would need too many registers.
    if TILE.layout != "columns" and (run.whole == 0) & (run.rest > 0):
        shift, sums = about_its_mean(x, near, run, False, TILE)
    else:
        shift, sums = about_its_mean(x, near, run, True, TILE)
    squares = sums * sums
    for i in range(second, run.rest):
        away = following.to(acc) - shift
        following = load_whole(X, run, i + 1, EVICTION, TILE)
        sums += away
        squares = tl.fma(away, away, squares)
    for i in range(tl.maximum(run.rest, 1), run.tiles):
        away = centre(load_tile(X, run, i, True, EVICTION, TILE), shift, run, i, TILE)
        sums += away
        squares = tl.fma(away, away, squares)
    sums, squares = sum_rows(sums, TILE), sum_rows(squares, TILE)
    count = values_of(run, run.tiles, TILE).to(acc)
    mean = sums / count
    m2 = about_the_mean(squares, sums, mean)
    # From here on means are differences from `near`. It lies close to `shift`, so that little is
    # rounded.
    mean += shift - near

    M2s = Partials + rows_of(sizes, TILE) * sizes.C
    store_moments(Partials, M2s, mean, m2, count, channels, run, sizes, TILE)


@triton.jit
def finish_statistics(
    X, Partials, B, Statistics, RunningMean, RunningVar, NumBatchesTracked, Variances, Arrivals,
    group, groups, momentum, correction, eps, sizes, CUMULATIVE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Merges the partial moments of a group of channels and stores its statistics."""
    acc: tl.constexpr = Statistics.dtype.element_ty
    WIDTH: tl.constexpr = TILE.merge_channels
    factor = averaging_factor(momentum, NumBatchesTracked, CUMULATIVE, acc)
    first = group * (sizes.width // sizes.S)
    end = tl.minimum(first + sizes.width // sizes.S, sizes.C)
    for some in range(first, end, WIDTH):
        c = some + tl.arange(0, WIDTH)[None, :]
        near = typical_values(X, tl.minimum(c, sizes.C - 1), sizes, acc)
        count, mean, m2 = merge_partials(
            Partials, Partials + rows_of(sizes, TILE) * sizes.C, first, end, c, sizes, acc, TILE
        )
        store_statistics(
            count, mean + near, m2, B, Statistics, Variances, RunningMean, RunningVar, factor,
            correction, eps, c, c < end, sizes.C,
        )  # fmt: skip
    finish_batch(
        Statistics, RunningMean, RunningVar, NumBatchesTracked, Variances, momentum, sizes.C,
        group == 0, Arrivals + groups, groups, CUMULATIVE,
    )  # fmt: skip


@triton.jit
def store_output(
    centred, R, Y, Mask, affine, param, run, i, sizes,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Normalises a tile, adds the residual, and stores the activation and the packed signs."""
    z = normalise(centred, affine)
    if R is not None:
        z += load_tile(R, run, i, MASKED, EVICTION, TILE).to(z.dtype)
    y = activate(z, tl.full((), param, z.dtype), ACTIVATION)
    store_tile(Y, y, run, i, MASKED, EVICTION, TILE)
    if Mask is not None:
        positive = is_positive(z, ACTIVATION)
        if MASKED:
            positive = positive & inside(run, i, TILE)
        packed = pack(positive, TILE)
        store_mask(Mask, packed, run, i, sizes, MASKED, EVICTION, TILE)


@triton.jit
def apply_run(
    x, X, R, Y, Mask, affine, param, run, sizes, ACTIVATION: tl.constexpr, EVICTION: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Computes the output of a run; `x` is the first whole tile of its input.

    The next tile's load is in flight while a tile is computed.
    """
    acc: tl.constexpr = affine.mean.dtype
    following = x.to(acc) - affine.mean
    for i in range(run.whole, run.rest):
        centred = following
        following = load_whole(X, run, i + 1, EVICTION, TILE).to(acc) - affine.mean
        store_output(
            centred, R, Y, Mask, affine, param, run, i, sizes, ACTIVATION, False, EVICTION, TILE
        )
    for j in range(0, masked_tiles(run)):
        i = masked_tile(j, run)
        centred = load_tile(X, run, i, True, EVICTION, TILE).to(acc) - affine.mean
        store_output(
            centred, R, Y, Mask, affine, param, run, i, sizes, ACTIVATION, True, EVICTION, TILE
        )


@triton.jit(do_not_specialize=SIZES)
def bn_stats_fwd_kernel(
    X,  # pointer to the input
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias, written
    RunningMean,  # pointer to the running mean, updated, or None
    RunningVar,  # pointer to the running variance, updated, or None
    NumBatchesTracked,  # pointer to num_batches_tracked, incremented, or None
    Variances,  # pointer to (C,), written, or None: then no batch is skipped
    Partials,  # pointer to a (2, rows, C) table of means and sums of squares
    Arrivals,  # pointer to a zero for each group of channels, and one more
    N,
    C,
    S,
    Q,
    width,
    length,
    splits,
    momentum: "fp64",
    correction: "fp64",
    eps: "fp64",
    CUMULATIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program takes the moments of a run; the last to arrive in a group merges the group's."""
    sizes = sizes_of(N, C, S, Q, width, length, splits, TILE)
    acc = Statistics.dtype.element_ty
    group, tile, split = share_of(tl.program_id(0), sizes, TILE)
    run = find_run(group, tile, split, sizes, TILE)
    store_partial_moments(X, Partials, run, sizes, acc, "", TILE)
    if last_to_arrive(Arrivals + group, splits * tiles_of_group(sizes, TILE)):
        finish_statistics(
            X, Partials, B, Statistics, RunningMean, RunningVar, NumBatchesTracked, Variances,
            Arrivals, group, groups_of(sizes), momentum, correction, eps, sizes, CUMULATIVE, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def bn_apply_fwd_kernel(
    X,  # pointer to the input
    R,  # pointer to the residual, or None
    Y,  # pointer to the output
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias that goes with a mean alone, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias; or to a mean alone
    Var,  # pointer to the variance that goes with a mean alone, or None
    N,
    C,
    S,
    Q,
    width,
    length,
    eps: "fp64",
    param: "fp64",
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program computes a run, the last runs first, which the first pass left in the cache."""
    sizes = sizes_of(N, C, S, Q, width, length, 1, TILE)
    acc = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    group, tile, split = share_of(tl.num_programs(0) - 1 - tl.program_id(0), sizes, TILE)
    run = find_run(group, tile, split, sizes, TILE)
    x = load_whole(X, run, run.whole, "", TILE)
    affine = affine_of(Statistics, Var, W, B, eps, channels_of(run, sizes, TILE), C, acc)
    apply_run(x, X, R, Y, Mask, affine, param, run, sizes, ACTIVATION, "", TILE)

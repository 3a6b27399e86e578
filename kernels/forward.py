"""Forward kernels: statistics of the batch, then normalisation.

With M = N * S values x to a channel:

    mean = sum(x) / M
    var  = sum((x - mean)^2) / M
    rstd = 1 / sqrt(var + eps)
    y    = activation((x - mean) * rstd * weight + bias + residual)
    running_mean <- (1 - momentum) * running_mean + momentum * mean
    running_var  <- (1 - momentum) * running_var  + momentum * var * M / (M - 1)
"""

import triton
import triton.language as tl

from .addressing import (
    advance,
    blocks_of,
    corner,
    extents,
    load_tile,
    load_values,
    position,
    store_tile,
    tile_numbers,
    tiles_of_block,
    values_inside,
)
from .epilogue import (
    activate,
    is_positive,
    mask_box,
    mean_and_rstd,
    normalise,
    pack,
    scale_and_bias,
)
from .moments import (
    about_the_mean,
    merge_partials,
    moments_of_planes,
    sum_rows,
    typical_values,
)
from .tickets import last_to_arrive


@triton.jit
def update_running(Running, batch, momentum, c, mask):
    """running <- (1 - momentum) * running + momentum * batch."""
    running = tl.load(Running + c, mask, other=0.0).to(batch.dtype)
    running = (1.0 - momentum) * running + momentum * batch
    tl.store(Running + c, running.to(Running.dtype.element_ty), mask)


@triton.jit
def averaging_factor(momentum, NumBatchesTracked, CUMULATIVE: tl.constexpr, acc: tl.constexpr):
    """Returns the batch's share of the running statistics; if CUMULATIVE, batches share alike."""
    if CUMULATIVE:
        return 1.0 / (tl.load(NumBatchesTracked) + 1).to(acc)
    else:
        return tl.full((), momentum, acc)


@triton.jit
def store_statistics(count, mean, m2, Statistics, RunningMean, RunningVar, factor, eps, c, C):
    """Writes a channel block's statistics, updates the running ones, and returns rstd."""
    rstd = 1.0 / tl.sqrt(m2 / count + tl.full((), eps, mean.dtype))
    tl.store(Statistics + c, mean, c < C)
    tl.store(Statistics + C + c, rstd, c < C)
    if RunningMean is not None:
        update_running(RunningMean, mean, factor, c, c < C)
    if RunningVar is not None:
        update_running(RunningVar, m2 / (count - 1.0), factor, c, c < C)
    return rstd


@triton.jit
def count_batch(NumBatchesTracked, first, Arrivals, readers, CUMULATIVE: tl.constexpr):
    """Increments num_batches_tracked. All its readers call this, and the last one increments."""
    if NumBatchesTracked is not None:
        if CUMULATIVE:
            first = last_to_arrive(Arrivals, readers)
        if first:
            tl.store(NumBatchesTracked, tl.load(NumBatchesTracked) + 1)


@triton.jit
def store_partial_moments(
    X, Partials, N, C, S, block, split, splits, acc: tl.constexpr,
    ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores moments of every splits-th tile of a channel block, about the values that it returns.

    Sums are taken element by element, about the mean of the run's first tile, and reduced at
    the end of the run. Of K tiles the first is a fraction 1 / K, so whatever the data are, its
    mean s satisfies count * (s - mean)^2 <= (K - 1) * m2: what cancels is at most K times what
    remains. Flattened planes are reduced to columns first, and columns to channels.
    """
    c0 = block * BLOCK_C
    n_tile, s_tile = tile_numbers(split, S, BLOCK_S)
    n_step, s_step = tile_numbers(splits, S, BLOCK_S)
    n0, s0 = corner(n_tile, s_tile, BLOCK_N, BLOCK_S)
    x = load_values(X, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
    about = typical_values(X, N, C, S, c0 + tl.arange(0, BLOCK_C), acc)
    near = about
    if ACCESS == "flat":
        channels = tl.arange(0, BLOCK_C * BLOCK_S) // S
        near = tl.gather(about, tl.minimum(channels, BLOCK_C - 1), 0)
    # Take the mean of differences from such a value: sums of large values might overflow, and a
    # constant channel has no differences.
    differences = x.to(acc) - near[None, :, None]
    if ACCESS != "whole":
        inside = values_inside(N, C, S, n0, c0, s0, ACCESS, BLOCK_N, BLOCK_C, BLOCK_S)
        differences = tl.where(inside, differences, 0.0)
    length: tl.constexpr = 1 if ACCESS == "flat" else BLOCK_S
    count = (tl.minimum(N - n0, BLOCK_N) * tl.minimum(S - s0, length)).to(acc)
    size: tl.constexpr = BLOCK_N * length
    shift = near + sum_rows(differences * (1.0 / size)) / (count / size)

    count = tl.cast(0, acc)
    sums = tl.zeros_like(differences)
    squares = tl.zeros_like(differences)
    tiles = tiles_of_block(N, S, BLOCK_N, BLOCK_S)
    for tile in range(split, tiles, splits):
        away = x.to(acc) - shift[None, :, None]
        if ACCESS != "whole":
            inside = values_inside(N, C, S, n0, c0, s0, ACCESS, BLOCK_N, BLOCK_C, BLOCK_S)
            away = tl.where(inside, away, 0.0)
        sums += away
        squares = tl.fma(away, away, squares)
        count += (tl.minimum(N - n0, BLOCK_N) * tl.minimum(S - s0, length)).to(acc)
        n_tile, s_tile = advance(n_tile, s_tile, n_step, s_step, S, BLOCK_S)
        n0, s0 = corner(n_tile, s_tile, BLOCK_N, BLOCK_S)
        if tile + splits < tiles:
            x = load_values(X, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
    sums, squares = sum_rows(sums), sum_rows(squares)
    mean = sums / count
    m2 = about_the_mean(squares, sums, mean)
    # From here on means are differences from `near`. It lies close to `shift`, so that little is
    # rounded.
    mean += shift - near
    if ACCESS == "flat":
        mean, m2 = moments_of_planes(mean, m2, count, S, BLOCK_C, BLOCK_S)
        count *= tl.cast(S, acc)

    c = c0 + tl.arange(0, BLOCK_C)
    M2s = Partials + splits * C
    Counts = M2s + splits * C + block * splits
    tl.store(Partials + split * C + c, mean, c < C)
    tl.store(M2s + split * C + c, m2, c < C)
    tl.store(Counts + split, count)
    return about


@triton.jit
def finish_statistics(
    Partials, about, Statistics, RunningMean, RunningVar, NumBatchesTracked, Arrivals, C, block,
    splits, momentum, eps, CUMULATIVE: tl.constexpr, MERGE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merges the partial moments of a channel block and stores its statistics."""
    acc: tl.constexpr = Statistics.dtype.element_ty
    c0 = block * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    M2s = Partials + splits * C
    Counts = M2s + splits * C + block * splits
    count, mean, m2 = merge_partials(Partials, M2s, Counts, splits, C, c0, MERGE, BLOCK_C)
    factor = averaging_factor(momentum, NumBatchesTracked, CUMULATIVE, acc)
    store_statistics(
        count, mean + about, m2, Statistics, RunningMean, RunningVar, factor, eps, c, C
    )
    blocks = blocks_of(C, BLOCK_C)
    count_batch(NumBatchesTracked, block == 0, Arrivals + blocks, blocks, CUMULATIVE)


@triton.jit
def store_output(
    x, R, Y, Mask, mean, scale, bias, param, N, C, S, n0, c0, s0,
    ACTIVATION: tl.constexpr, ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Normalises a tile, adds the residual, and stores the activation and the packed signs."""
    z = normalise(x, mean, scale, bias)
    if R is not None:
        r = load_tile(R, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
        z += r.to(z.dtype)
    y = activate(z, tl.full((), param, z.dtype), ACTIVATION)
    store_tile(Y, y, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
    if Mask is not None:
        packed = pack(is_positive(z, ACTIVATION), BLOCK_N, BLOCK_C, BLOCK_S)
        start, offsets, inside = mask_box(N, C, S, n0, c0, s0, BLOCK_N, BLOCK_C, BLOCK_S)
        if ACCESS == "whole":
            tl.store(Mask + start + offsets, packed, eviction_policy=EVICTION)
        else:
            tl.store(Mask + start + offsets, packed, inside, eviction_policy=EVICTION)


@triton.jit
def bn_stats_fwd_kernel(
    X,  # pointer to the input
    Statistics,  # pointer to (2, C): mean and 1 / sqrt(var + eps), written
    RunningMean,  # pointer to the running mean, updated, or None
    RunningVar,  # pointer to the running variance, updated, or None
    NumBatchesTracked,  # pointer to num_batches_tracked, incremented, or None
    Partials,  # pointer to (2, splits, C) means and sums of squares, then (blocks, splits) counts
    Arrivals,  # pointer to a zero for each channel block, and one more
    N,
    C,
    S,
    splits,
    momentum: "fp64",
    eps: "fp64",
    ALIGN: tl.constexpr,
    MERGE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (split, channel block) takes the moments of every splits-th tile of the block."""
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = Statistics.dtype.element_ty
    blocks = blocks_of(C, BLOCK_C)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    about = store_partial_moments(
        X, Partials, N, C, S, block, split, splits, acc, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S
    )
    if last_to_arrive(Arrivals + block, splits):
        finish_statistics(
            Partials, about, Statistics, RunningMean, RunningVar, NumBatchesTracked, Arrivals, C,
            block, splits, momentum, eps, CUMULATIVE, MERGE, BLOCK_C,
        )  # fmt: skip


@triton.jit
def bn_apply_fwd_kernel(
    X,  # pointer to the input
    R,  # pointer to the residual, or None
    Y,  # pointer to the output
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (2, C): mean and 1 / sqrt(var + eps); or to a mean alone
    Var,  # pointer to the variance that goes with a mean alone, or None
    N,
    C,
    S,
    eps: "fp64",
    param: "fp64",
    ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program handles one tile, last tiles first: the statistics left those in the cache."""
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    n0, c0, s0 = position(tile, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    mean, rstd = mean_and_rstd(Statistics, Var, eps, c0, C, acc, BLOCK_C, "")
    scale, bias = scale_and_bias(W, B, rstd, c0, C, BLOCK_C)
    x = load_tile(X, N, C, S, n0, c0, s0, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S).to(acc)
    store_output(
        x, R, Y, Mask, mean, scale, bias, param, N, C, S, n0, c0, s0,
        ACTIVATION, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip

"""Backward kernels: two sums a channel, then the input's gradient.

With g = dy * activation'(z) and M values to a channel:

    db = sum(g)
    dw = rstd * sum(g * (x - mean))
    dx = weight * rstd * (g - db / M - (x - mean) * rstd * dw / M)    batch statistics
    dx = weight * rstd * g                                            fixed statistics
    d(residual) = g
"""

import triton
import triton.language as tl

from .addressing import (
    advance,
    blocks_of,
    box,
    corner,
    extents,
    load_tile,
    per_channel,
    position,
    store_tile,
    tile_numbers,
    tiles_of_block,
)
from .epilogue import (
    activation_backward,
    mask_box,
    mean_and_rstd,
    normalise,
    scale_and_bias,
    sign_backward,
    unpack,
)
from .moments import sum_partials, sum_rows
from .tickets import last_to_arrive


@triton.jit
def load_gradient(
    DY, X, R, Mask, mean, scale, bias, param, N, C, S, n0, c0, s0,
    ACTIVATION: tl.constexpr, ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Loads a tile and returns g, the gradient before the activation, and x - mean."""
    acc: tl.constexpr = mean.dtype
    dy = load_tile(DY, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S).to(acc)
    x = load_tile(X, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S).to(acc)
    param = tl.full((), param, acc)
    if Mask is not None:
        start, offsets, inside = mask_box(N, C, S, n0, c0, s0, BLOCK_N, BLOCK_C, BLOCK_S)
        if ACCESS == "whole":
            packed = tl.load(Mask + start + offsets, eviction_policy=EVICTION)
        else:
            packed = tl.load(Mask + start + offsets, inside, other=0, eviction_policy=EVICTION)
        g = sign_backward(dy, unpack(packed, BLOCK_N, BLOCK_C, BLOCK_S), param, ACTIVATION)
    else:
        z = normalise(x, mean, scale, bias)
        if R is not None:
            r = load_tile(R, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
            z += r.to(acc)
        g = activation_backward(dy, z, param, ACTIVATION)
    return g, x - mean


@triton.jit
def store_parameter_gradients(sum_g, sum_gx, rstd, DW, DB, c0, C, BLOCK_C: tl.constexpr):
    """Stores db = sum(g) and dw = rstd * sum(g * (x - mean)), each where it is wanted."""
    c = c0 + tl.arange(0, BLOCK_C)
    if DB is not None:
        tl.store(DB + c, sum_g.to(DB.dtype.element_ty), c < C)
    if DW is not None:
        dw = sum_gx * tl.reshape(rstd, (BLOCK_C,))
        tl.store(DW + c, dw.to(DW.dtype.element_ty), c < C)


@triton.jit
def finish_sums(
    Partials, Sums, rstd, DW, DB, C, c0, splits, MERGE: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Adds up the partial sums of a channel block and stores sums and parameter gradients."""
    c = c0 + tl.arange(0, BLOCK_C)
    sum_g = sum_partials(Partials, splits, C, c0, MERGE, BLOCK_C)
    sum_gx = sum_partials(Partials + splits * C, splits, C, c0, MERGE, BLOCK_C)
    tl.store(Sums + c, sum_g, c < C)
    tl.store(Sums + C + c, sum_gx, c < C)
    store_parameter_gradients(sum_g, sum_gx, rstd, DW, DB, c0, C, BLOCK_C)


@triton.jit
def load_means(Sums, N, S, C, c0, acc: tl.constexpr, BLOCK_C: tl.constexpr, CACHE: tl.constexpr):
    """Loads the sums of a channel block and returns the means of g and of g * (x - mean)."""
    count = (tl.cast(N, tl.int64) * S).to(acc)
    sum_g = per_channel(Sums, c0, C, acc, BLOCK_C, CACHE)
    return sum_g / count, per_channel(Sums + C, c0, C, acc, BLOCK_C, CACHE) / count


@triton.jit
def store_gradients(
    g, centred, rstd, scale, mean_g, mean_gx, DX, DR, N, C, S, n0, c0, s0,
    ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores dx for batch statistics and the residual's gradient, each where it is wanted."""
    if DX is not None:
        # scale * (g - mean_g - centred * rstd^2 * mean_gx), what is alike in a channel first
        constant, slope = -scale * mean_g, -scale * (rstd * (rstd * mean_gx))
        dx = tl.fma(centred, slope, tl.fma(g, scale, constant))
        store_tile(DX, dx, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
    if DR is not None:
        store_tile(DR, g, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)


@triton.jit
def store_partial_sums(
    DY, X, R, Mask, Partials, DX, DR, mean, scale, bias, param, N, C, S, block, split, splits,
    ACTIVATION: tl.constexpr, ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores sums of g and g * (x - mean) over every splits-th tile of a channel block.

    DX and DR, which fixed statistics decide at once, are stored on the way. Pointers that are
    None are not stored to.
    """
    acc: tl.constexpr = mean.dtype
    c0 = block * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    sum_g = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), acc)
    sum_gx = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), acc)
    n_tile, s_tile = tile_numbers(split, S, BLOCK_S)
    n_step, s_step = tile_numbers(splits, S, BLOCK_S)
    for _ in range(split, tiles_of_block(N, S, BLOCK_N, BLOCK_S), splits):
        n0, s0 = corner(n_tile, s_tile, BLOCK_N, BLOCK_S)
        n_tile, s_tile = advance(n_tile, s_tile, n_step, s_step, S, BLOCK_S)
        g, centred = load_gradient(
            DY, X, R, Mask, mean, scale, bias, param, N, C, S, n0, c0, s0,
            ACTIVATION, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S,
        )  # fmt: skip
        if Partials is not None:
            if ACCESS != "whole":
                # Outside the array dy is 0, but where the mean is NaN, g is NaN there too.
                _, _, inside = box(N, C, S, n0, c0, s0, BLOCK_N, BLOCK_C, BLOCK_S)
                g = tl.where(inside, g, 0.0)
                centred = tl.where(inside, centred, 0.0)
            sum_g += g
            sum_gx = tl.fma(g, centred, sum_gx)
        if DX is not None:
            dx = g * scale
            store_tile(DX, dx, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
        if DR is not None:
            store_tile(DR, g, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)
    if Partials is not None:
        tl.store(Partials + split * C + c, sum_rows(sum_g), c < C)
        tl.store(Partials + splits * C + split * C + c, sum_rows(sum_gx), c < C)


@triton.jit
def bn_reduce_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (2, C): mean and 1 / sqrt(var + eps); or to a mean alone
    Var,  # pointer to the variance that goes with a mean alone, or None
    DW,  # pointer to the weight's gradient, or None
    DB,  # pointer to the bias' gradient, or None
    Sums,  # pointer to (2, C): sum(g), sum(g * (x - mean)); None: no sums wanted at all
    DX,  # pointer to the input's gradient with fixed statistics, or None
    DR,  # pointer to the residual's gradient with fixed statistics, or None
    Partials,  # pointer to (2, splits, C) sums, or None
    Arrivals,  # pointer to a zero for each channel block
    N,
    C,
    S,
    splits,
    eps: "fp64",
    param: "fp64",
    ALIGN: tl.constexpr,
    MERGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (split, channel block) sums over every splits-th tile of the block.

    With fixed statistics the gradients of input and residual don't depend on the sums,
    so the same pass stores these gradients.
    """
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    blocks = blocks_of(C, BLOCK_C)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    c0 = block * BLOCK_C
    mean, rstd = mean_and_rstd(Statistics, Var, eps, c0, C, acc, BLOCK_C, "")
    scale, bias = scale_and_bias(W, B, rstd, c0, C, BLOCK_C)
    store_partial_sums(
        DY, X, R, Mask, Partials, DX, DR, mean, scale, bias, param, N, C, S, block, split, splits,
        ACTIVATION, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip
    if Sums is not None:  # noqa: SIM102, `and` would not be decided at compile time
        if last_to_arrive(Arrivals + block, splits):
            finish_sums(Partials, Sums, rstd, DW, DB, C, c0, splits, MERGE, BLOCK_C)


@triton.jit
def bn_apply_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (2, C): mean and 1 / sqrt(var + eps)
    Sums,  # pointer to (2, C): sum(g), sum(g * (x - mean)), if DX is wanted
    DX,  # pointer to the input's gradient, or None
    DR,  # pointer to the residual's gradient, or None
    N,
    C,
    S,
    param: "fp64",
    ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program handles one tile, last tiles first: the sums left those in the cache."""
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = Statistics.dtype.element_ty
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    n0, c0, s0 = position(tile, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    mean, rstd = mean_and_rstd(Statistics, None, 0.0, c0, C, acc, BLOCK_C, "")
    scale, bias = scale_and_bias(W, B, rstd, c0, C, BLOCK_C)
    g, centred = load_gradient(
        DY, X, R, Mask, mean, scale, bias, param, N, C, S, n0, c0, s0,
        ACTIVATION, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip
    mean_g, mean_gx = mean, mean
    if DX is not None:
        mean_g, mean_gx = load_means(Sums, N, S, C, c0, acc, BLOCK_C, "")
    store_gradients(
        g, centred, rstd, scale, mean_g, mean_gx, DX, DR, N, C, S, n0, c0, s0,
        ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip

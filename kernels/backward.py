"""Backward kernels compute two sums for each channel, then the input's gradient.

With g = dy * activation'(z) and M values to a channel:

    db = sum(g)
    dw = rstd * sum(g * (x - mean))
    dx = weight * rstd * (g - db / M - (x - mean) * rstd * dw / M)    batch statistics
    dx = weight * rstd * g                                            fixed statistics
    d(residual) = g
"""

import triton
import triton.language as tl

from .access import (
    centre,
    load_tile,
    per_channel,
    store_tile,
)
from .addressing import (
    SIZES,
    channels_of,
    find_run,
    inside,
    masked_tile,
    masked_tiles,
    share_of,
    sizes_of,
    tiles_of_group,
)
from .epilogue import (
    activation_backward,
    affine_of,
    batch_affine,
    load_mask,
    normalise,
    sign_backward,
    unpack,
)
from .moments import rows_of, store_sums, sum_partials, sum_rows
from .tickets import last_to_arrive


@triton.jit
def gradient_of(
    dy, centred, R, Mask, affine, param, run, i, sizes, ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Returns g, the gradient before the activation, from a tile's dy and x - mean."""
    acc: tl.constexpr = affine.mean.dtype
    param = tl.full((), param, acc)
    if Mask is not None:
        packed = load_mask(Mask, run, i, sizes, MASKED, EVICTION, TILE)
        return sign_backward(dy, unpack(packed, TILE), param, ACTIVATION)
    else:
        z = normalise(centred, affine)
        if R is not None:
            z += load_tile(R, run, i, MASKED, EVICTION, TILE).to(acc)
        return activation_backward(dy, z, param, ACTIVATION)


@triton.jit
def store_parameter_gradients(sum_g, sum_gx, rstd, DW, DB, c, exists):
    """Stores db = sum(g) and dw = rstd * sum(g * (x - mean)), each where it is wanted."""
    if DB is not None:
        tl.store(DB + c, sum_g.to(DB.dtype.element_ty), exists)
    if DW is not None:
        tl.store(DW + c, (sum_gx * rstd).to(DW.dtype.element_ty), exists)


@triton.jit
def finish_sums(
    Partials, Sums, Statistics, Var, DW, DB, eps, group, sizes, acc: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of a group of channels; stores sums and parameter gradients."""
    WIDTH: tl.constexpr = TILE.merge_channels
    first = group * (sizes.width // sizes.S)
    end = tl.minimum(first + sizes.width // sizes.S, sizes.C)
    for some in range(first, end, WIDTH):
        c = some + tl.arange(0, WIDTH)[None, :]
        channels = tl.minimum(c, sizes.C - 1)
        rstd = affine_of(Statistics, Var, None, None, eps, channels, sizes.C, acc).rstd
        sum_g = sum_partials(Partials, first, end, c, sizes, acc, TILE)
        Products = Partials + rows_of(sizes, TILE) * sizes.C
        sum_gx = sum_partials(Products, first, end, c, sizes, acc, TILE)
        tl.store(Sums + c, sum_g, c < end)
        tl.store(Sums + sizes.C + c, sum_gx, c < end)
        store_parameter_gradients(sum_g, sum_gx, rstd, DW, DB, c, c < end)


@triton.jit
def coefficients(sum_g, sum_gx, affine, Count, sizes):
    """Returns a and b of dx = scale * g + a + b * (x - mean), one of each for a channel.

    If the sums are those of several devices, Count points to the number of values of a channel.
    """
    if Count is not None:
        count = tl.load(Count).to(sum_g.dtype)
    else:
        count = (tl.cast(sizes.N, tl.int64) * sizes.S).to(sum_g.dtype)
    constant = -affine.scale * (sum_g / count)
    return constant, -affine.scale * (affine.rstd * (affine.rstd * (sum_gx / count)))


@triton.jit
def load_coefficients(Sums, Count, affine, channels, sizes, CACHE: tl.constexpr):
    """Loads the sums of channels and returns their `coefficients`."""
    acc: tl.constexpr = affine.mean.dtype
    sum_g = per_channel(Sums, channels, acc, CACHE)
    sum_gx = per_channel(Sums + sizes.C, channels, acc, CACHE)
    return coefficients(sum_g, sum_gx, affine, Count, sizes)


@triton.jit
def store_gradients(
    g, centred, affine, constant, slope, DX, DR, run, i, MASKED: tl.constexpr,
    EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores dx for batch statistics and the residual's gradient, each where it is wanted."""
    if DR is not None:
        store_tile(DR, g, run, i, MASKED, EVICTION, TILE)
    if DX is not None:
        dx = tl.fma(centred, slope, tl.fma(g, affine.scale, constant))
        store_tile(DX, dx, run, i, MASKED, EVICTION, TILE)


@triton.jit
def apply_run_backward(
    DY, X, R, Mask, affine, constant, slope, param, DX, DR, run, sizes,
    ACTIVATION: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes dx and the residual's gradient of a run."""
    acc: tl.constexpr = affine.mean.dtype
    for i in range(run.whole, run.rest):
        dy = load_tile(DY, run, i, False, EVICTION, TILE).to(acc)
        centred = load_tile(X, run, i, False, EVICTION, TILE).to(acc) - affine.mean
        g = gradient_of(
            dy, centred, R, Mask, affine, param, run, i, sizes, ACTIVATION, False, EVICTION, TILE
        )
        store_gradients(g, centred, affine, constant, slope, DX, DR, run, i, False, EVICTION, TILE)
    for j in range(0, masked_tiles(run)):
        i = masked_tile(j, run)
        dy = load_tile(DY, run, i, True, EVICTION, TILE).to(acc)
        centred = load_tile(X, run, i, True, EVICTION, TILE).to(acc) - affine.mean
        g = gradient_of(
            dy, centred, R, Mask, affine, param, run, i, sizes, ACTIVATION, True, EVICTION, TILE
        )
        store_gradients(g, centred, affine, constant, slope, DX, DR, run, i, True, EVICTION, TILE)


@triton.jit
def add_sums(
    dy, centred, R, Mask, DX, DR, affine, param, run, i, sizes, sums, products,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds g and g * (x - mean) element by element.

    With fixed statistics dx and dr don't depend on the sums, and are stored here where pointers
    to them are given.
    """
    g = gradient_of(
        dy, centred, R, Mask, affine, param, run, i, sizes, ACTIVATION, MASKED, EVICTION, TILE
    )
    if DX is not None:
        store_tile(DX, g * affine.scale, run, i, MASKED, EVICTION, TILE)
    if DR is not None:
        store_tile(DR, g, run, i, MASKED, EVICTION, TILE)
    if MASKED:
        g = tl.where(inside(run, i, TILE), g, 0.0)
    return sums + g, tl.fma(g, centred, products)


@triton.jit
def store_partial_sums(
    DY, X, R, Mask, Partials, DX, DR, affine, channels, param, run, sizes,
    ACTIVATION: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores a run's sums of g and of g * (x - mean)."""
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_Q: tl.constexpr = TILE.q
    acc: tl.constexpr = affine.mean.dtype
    sums = tl.zeros((BLOCK_N, BLOCK_Q), acc)
    products = tl.zeros((BLOCK_N, BLOCK_Q), acc)
    for i in range(run.whole, run.rest):
        dy = load_tile(DY, run, i, False, EVICTION, TILE).to(acc)
        centred = load_tile(X, run, i, False, EVICTION, TILE).to(acc) - affine.mean
        sums, products = add_sums(
            dy, centred, R, Mask, DX, DR, affine, param, run, i, sizes, sums, products,
            ACTIVATION, False, EVICTION, TILE,
        )  # fmt: skip
    for j in range(0, masked_tiles(run)):
        i = masked_tile(j, run)
        dy = load_tile(DY, run, i, True, EVICTION, TILE).to(acc)
        centred = centre(load_tile(X, run, i, True, EVICTION, TILE), affine.mean, run, i, TILE)
        sums, products = add_sums(
            dy, centred, R, Mask, DX, DR, affine, param, run, i, sizes, sums, products,
            ACTIVATION, True, EVICTION, TILE,
        )  # fmt: skip
    if Partials is not None:
        sums, products = sum_rows(sums, TILE), sum_rows(products, TILE)
        Products = Partials + rows_of(sizes, TILE) * sizes.C
        store_sums(Partials, Products, sums, products, channels, run, sizes, TILE)


@triton.jit(do_not_specialize=SIZES)
def bn_reduce_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias that goes with a mean alone, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias; or to a mean alone
    Var,  # pointer to the variance that goes with a mean alone, or None
    DW,  # pointer to the weight's gradient, or None
    DB,  # pointer to the bias's gradient, or None
    Sums,  # pointer to (2, C): sum(g), sum(g * (x - mean)); or None if no sums are wanted
    DX,  # pointer to the input's gradient with fixed statistics, or None
    DR,  # pointer to the residual's gradient with fixed statistics, or None
    Partials,  # pointer to a (2, rows, C) table of sums, or None
    Arrivals,  # pointer to a zero for each group of channels
    N,
    C,
    S,
    Q,
    width,
    length,
    splits,
    eps: "fp64",
    param: "fp64",
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program takes the sums of a run; the last to arrive in a group adds up the group's.

    With fixed statistics the gradients of input and residual don't depend on the sums,
    so the same pass stores these gradients.
    """
    sizes = sizes_of(N, C, S, Q, width, length, splits, TILE)
    acc = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    group, tile, split = share_of(tl.program_id(0), sizes, TILE)
    run = find_run(group, tile, split, sizes, TILE)
    channels = channels_of(run, sizes, TILE)
    affine = affine_of(Statistics, Var, W, B, eps, channels, C, acc)
    store_partial_sums(
        DY, X, R, Mask, Partials, DX, DR, affine, channels, param, run, sizes,
        ACTIVATION, "", TILE,
    )  # fmt: skip
    if Sums is not None:  # noqa: SIM102, `and` would not be decided at compile time
        if last_to_arrive(Arrivals + group, splits * tiles_of_group(sizes, TILE)):
            finish_sums(Partials, Sums, Statistics, Var, DW, DB, eps, group, sizes, acc, TILE)


@triton.jit(do_not_specialize=SIZES)
def bn_apply_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias
    Sums,  # pointer to (2, C): sum(g), sum(g * (x - mean)), if DX is wanted
    Count,  # pointer to the number of values of a channel in the sums; None: as in the input
    DX,  # pointer to the input's gradient, or None
    DR,  # pointer to the residual's gradient, or None
    N,
    C,
    S,
    Q,
    width,
    length,
    param: "fp64",
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program computes a run, the last runs first, which the first pass left in the cache."""
    sizes = sizes_of(N, C, S, Q, width, length, 1, TILE)
    group, tile, split = share_of(tl.num_programs(0) - 1 - tl.program_id(0), sizes, TILE)
    run = find_run(group, tile, split, sizes, TILE)
    channels = channels_of(run, sizes, TILE)
    affine = batch_affine(Statistics, W, channels, C, "")
    constant, slope = affine.mean, affine.mean
    if DX is not None:
        constant, slope = load_coefficients(Sums, Count, affine, channels, sizes, "")
    apply_run_backward(
        DY, X, R, Mask, affine, constant, slope, param, DX, DR, run, sizes,
        ACTIVATION, "", TILE,
    )  # fmt: skip

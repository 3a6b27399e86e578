"""Resident kernels keep a group of channels in one program's registers between the two passes.

The formulas are those of `forward.py` and `backward.py`; each tensor is read
or written once, in one launch.
"""

import triton
import triton.language as tl

from .access import centre, load_tile
from .addressing import (
    SIZES,
    channels_of,
    find_run,
    inside,
    sizes_of,
)
from .backward import coefficients, gradient_of, store_gradients, store_parameter_gradients
from .epilogue import batch_affine, scaled
from .forward import store_output, store_statistics
from .moments import exist, sum_rows
from .running import averaging_factor, finish_batch


@triton.jit(do_not_specialize=SIZES)
def bn_resident_fwd_kernel(
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
    Arrivals,  # pointer to a zero, if CUMULATIVE or Variances are given, or None
    N,
    C,
    S,
    Q,
    width,
    momentum: "fp64",
    correction: "fp64",
    eps: "fp64",
    param: "fp64",
    ACTIVATION: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program i handles group i, all of whose values are one tile."""
    sizes = sizes_of(N, C, S, Q, width, 1, 1, TILE)
    acc = Statistics.dtype.element_ty
    run = find_run(tl.program_id(0), 0, 0, sizes, TILE)
    channels = channels_of(run, sizes, TILE)
    factor = averaging_factor(momentum, NumBatchesTracked, CUMULATIVE, acc)
    x = load_tile(X, run, 0, True, "", TILE).to(acc)
    count = (tl.cast(N, tl.int64) * S).to(acc)
    # The first mean is rounded; the mean of the differences from it corrects that.
    about = sum_rows(tl.where(inside(run, 0, TILE), x, 0.0) * (1.0 / count), TILE)
    away = centre(x, about, run, 0, TILE)
    rest = sum_rows(away, TILE) / count
    centred = centre(away, rest, run, 0, TILE)
    m2 = sum_rows(centred * centred, TILE)
    mean = about + rest
    rstd, bias = store_statistics(
        count, mean, m2, B, Statistics, Variances, RunningMean, RunningVar, factor, correction,
        eps, channels, exist(run, mean), C,
    )  # fmt: skip
    store_output(
        x - mean, R, Y, Mask, scaled(mean, rstd, bias, W, channels), param, run, 0, sizes,
        ACTIVATION, True, "", TILE,
    )  # fmt: skip
    finish_batch(
        Statistics, RunningMean, RunningVar, NumBatchesTracked, Variances, momentum, C,
        tl.program_id(0) == 0, Arrivals, tl.num_programs(0), CUMULATIVE,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def bn_resident_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    Statistics,  # pointer to (3, C): mean, 1 / sqrt(var + eps) and bias
    DW,  # pointer to the weight's gradient, or None
    DB,  # pointer to the bias's gradient, or None
    DX,  # pointer to the input's gradient, or None
    DR,  # pointer to the residual's gradient, or None
    N,
    C,
    S,
    Q,
    width,
    param: "fp64",
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program i handles group i, all of whose values are one tile."""
    sizes = sizes_of(N, C, S, Q, width, 1, 1, TILE)
    acc = Statistics.dtype.element_ty
    run = find_run(tl.program_id(0), 0, 0, sizes, TILE)
    dy = load_tile(DY, run, 0, True, "", TILE).to(acc)
    x = load_tile(X, run, 0, True, "", TILE).to(acc)
    channels = channels_of(run, sizes, TILE)
    affine = batch_affine(Statistics, W, channels, C, "")
    centred = centre(x, affine.mean, run, 0, TILE)
    g = gradient_of(dy, centred, R, Mask, affine, param, run, 0, sizes, ACTIVATION, True, "", TILE)
    g = tl.where(inside(run, 0, TILE), g, 0.0)
    sum_g, sum_gx = sum_rows(g, TILE), sum_rows(g * centred, TILE)
    exists = exist(run, sum_g)
    store_parameter_gradients(sum_g, sum_gx, affine.rstd, DW, DB, channels, exists)
    constant, slope = coefficients(sum_g, sum_gx, affine, None, sizes)
    store_gradients(g, x - affine.mean, affine, constant, slope, DX, DR, run, 0, True, "", TILE)

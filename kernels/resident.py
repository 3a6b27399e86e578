"""Resident kernels: one program keeps a channel block in registers for statistics and output.

The formulas are those of `forward.py` and `backward.py`; each tensor is read
and written once, in one launch.
"""

import triton
import triton.language as tl

from .addressing import box, extents, load_tile
from .backward import load_gradient, store_gradients, store_parameter_gradients
from .epilogue import mean_and_rstd, scale_and_bias
from .forward import averaging_factor, count_batch, store_output, store_statistics
from .moments import sum_rows, tile_moments


@triton.jit
def bn_resident_fwd_kernel(
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
    Arrivals,  # pointer to a zero, if CUMULATIVE
    N,
    C,
    S,
    momentum: "fp64",
    eps: "fp64",
    param: "fp64",
    ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program i handles channel block i, all of whose values are one tile."""
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = Statistics.dtype.element_ty
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    factor = averaging_factor(momentum, NumBatchesTracked, CUMULATIVE, acc)

    _, _, inside = box(N, C, S, 0, c0, 0, BLOCK_N, BLOCK_C, BLOCK_S)
    x = load_tile(X, N, C, S, 0, c0, 0, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S).to(acc)
    count = (tl.cast(N, tl.int64) * S).to(acc)
    # The first mean is rounded; the mean of the differences from it corrects that.
    about = sum_rows(x * (1.0 / count))
    mean, m2 = tile_moments(x - about[None, :, None], inside, count)
    mean += about
    rstd = store_statistics(count, mean, m2, Statistics, RunningMean, RunningVar, factor, eps, c, C)
    scale, bias = scale_and_bias(W, B, rstd[None, :, None], c0, C, BLOCK_C)
    store_output(
        x, R, Y, Mask, mean[None, :, None], scale, bias, param, N, C, S, 0, c0, 0,
        ACTIVATION, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip
    count_batch(NumBatchesTracked, c0 == 0, Arrivals, tl.num_programs(0), CUMULATIVE)


@triton.jit
def bn_resident_bwd_kernel(
    DY,  # pointer to the output's gradient
    X,  # pointer to the input
    R,  # pointer to the residual, where the activation's gradient needs it, or None
    Mask,  # pointer to the packed signs of the activation's argument, or None
    W,  # pointer to the weight, or None
    B,  # pointer to the bias, or None
    Statistics,  # pointer to (2, C): mean and 1 / sqrt(var + eps)
    DW,  # pointer to the weight's gradient, or None
    DB,  # pointer to the bias' gradient, or None
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
    """Program i handles channel block i, all of whose values are one tile."""
    C, S = extents(C, S, ALIGN, ACCESS, BLOCK_S)
    acc = Statistics.dtype.element_ty
    c0 = tl.program_id(0) * BLOCK_C
    mean, rstd = mean_and_rstd(Statistics, None, 0.0, c0, C, acc, BLOCK_C, "")
    scale, bias = scale_and_bias(W, B, rstd, c0, C, BLOCK_C)
    g, centred = load_gradient(
        DY, X, R, Mask, mean, scale, bias, param, N, C, S, 0, c0, 0,
        ACTIVATION, ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip
    _, _, inside = box(N, C, S, 0, c0, 0, BLOCK_N, BLOCK_C, BLOCK_S)
    sum_g = sum_rows(tl.where(inside, g, 0.0))
    sum_gx = sum_rows(tl.where(inside, g * centred, 0.0))
    store_parameter_gradients(sum_g, sum_gx, rstd, DW, DB, c0, C, BLOCK_C)
    count = (tl.cast(N, tl.int64) * S).to(acc)
    mean_g, mean_gx = sum_g[None, :, None] / count, sum_gx[None, :, None] / count
    store_gradients(
        g, centred, rstd, scale, mean_g, mean_gx, DX, DR, N, C, S, 0, c0, 0,
        ACCESS, "", BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip

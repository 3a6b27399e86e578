"""The epilogue: normalisation, activation, its derivative, and packed signs."""

from typing import NamedTuple

import triton
import triton.language as tl

from .access import per_channel
from .addressing import blocks_of, plane_extent, rows_inside
from .tiling import MASK_BITS

_BITS = tl.constexpr(MASK_BITS)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)


class Affine(NamedTuple):
    """What turns an input into the activation's argument, as blocks of one value a channel.

    Attributes:
        mean: mean.
        rstd: 1 / sqrt(var + eps).
        scale: rstd * weight.
        bias: bias.
    """

    mean: tl.tensor
    rstd: tl.tensor
    scale: tl.tensor
    bias: tl.tensor


@triton.jit
def normalise(centred, affine):
    """Returns (x - mean) * (rstd * weight) + bias from x - mean, for forward and backward alike.

    Folding the mean into the bias would save a subtraction and lose every
    digit where |mean| is much larger than the standard deviation.
    """
    return tl.fma(centred, affine.scale, affine.bias)


@triton.jit
def scaled(mean, rstd, bias, W, channels):
    """Returns an `Affine`; the weight is 1 if its pointer is None."""
    scale = rstd
    if W is not None:
        scale = rstd * per_channel(W, channels, rstd.dtype, "")
    return Affine(mean, rstd, scale, bias)


@triton.jit
def batch_affine(Statistics, W, channels, C, CACHE: tl.constexpr):
    """Loads the `Affine` of a batch's statistics, which have the bias beside them."""
    acc: tl.constexpr = Statistics.dtype.element_ty
    mean = per_channel(Statistics, channels, acc, CACHE)
    rstd = per_channel(Statistics + C, channels, acc, CACHE)
    bias = per_channel(Statistics + C + C, channels, acc, CACHE)
    return scaled(mean, rstd, bias, W, channels)


@triton.jit
def affine_of(Statistics, Var, W, B, eps, channels, C, acc: tl.constexpr):
    """Loads an `Affine`: of a batch's statistics, or of a fixed mean and variance."""
    if Var is None:
        return batch_affine(Statistics, W, channels, C, "")
    else:
        mean = per_channel(Statistics, channels, acc, "")
        rstd = 1.0 / tl.sqrt(per_channel(Var, channels, acc, "") + tl.full((), eps, acc))
        bias = tl.zeros_like(rstd)
        if B is not None:
            bias = per_channel(B, channels, acc, "")
        return scaled(mean, rstd, bias, W, channels)


@triton.jit
def tanh(z):
    """Computes tanh from exp(-2|z|), which can't overflow.

    Near zero that formula cancels. There the Taylor series is used, whose remainder is
    less than the rounding of the result.
    """
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(z < 0, -t, t)
    q = z * z
    series = z * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    near = 0.02 if z.dtype == tl.float64 else 0.3
    return tl.where(tl.abs(z) < near, series, t)


@triton.jit
def sech2(z):
    """Returns tanh'(z) = 1 - tanh(z)^2, without the cancellation where tanh is near 1."""
    e = tl.exp(-2.0 * tl.abs(z))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def expm1(z):
    """Returns exp(z) - 1 for z <= 0, without the cancellation near zero."""
    t = tanh(0.5 * z)
    return 2.0 * t / (1.0 - t)


@triton.jit
def activate(z, param, ACTIVATION: tl.constexpr):
    """Returns the activation. Comparisons are written so that NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z <= 0, z * param, z)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        inner = (z + z * z * z * _GELU_CUBIC) * _SQRT_2_OVER_PI
        z = 0.5 * z * (1.0 + tanh(inner))
    elif ACTIVATION == "hardswish":
        z = z * tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z / 6 + 0.5))
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "elu":
        z = tl.where(z > 0, z, param * expm1(tl.where(z > 0, 0.0, z)))
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        z = tanh(z)
    else:
        tl.static_assert(ACTIVATION == "none")
    return z


@triton.jit
def activation_backward(dy, z, param, ACTIVATION: tl.constexpr):
    """Returns dy times the activation's derivative at z.

    At a kink the derivative is PyTorch's: 0 at 0 (ReLU, ReLU6), the negative slope
    at 0 (leaky ReLU), and 0 at 6 (ReLU6). For activations with kinks the derivative at
    NaN is 1, or the negative slope for leaky ReLU.
    """
    g = dy
    if ACTIVATION == "relu":
        g = tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(z > 0, dy, dy * param)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        g = dy * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    elif ACTIVATION == "gelu":
        # d/dz z P(z) = P(z) + z p(z), with the normal distribution's P and p.
        density = tl.exp(-0.5 * z * z) * (0.5 * _SQRT_2_OVER_PI)
        g = dy * (0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * density)
    elif ACTIVATION == "gelu_tanh":
        inner = (z + z * z * z * _GELU_CUBIC) * _SQRT_2_OVER_PI
        slope = (1.0 + z * z * (3.0 * _GELU_CUBIC)) * _SQRT_2_OVER_PI
        g = dy * (0.5 * (1.0 + tanh(inner)) + 0.5 * z * sech2(inner) * slope)
    elif ACTIVATION == "hardswish":
        g = tl.where(z <= -3, 0.0, tl.where(z < 3, dy * (z / 3 + 0.5), dy))
    elif ACTIVATION == "relu6":
        g = tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACTIVATION == "elu":
        g = tl.where(z <= 0, dy * param * tl.exp(tl.where(z <= 0, z, 0.0)), dy)
    elif ACTIVATION == "sigmoid":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        g = dy * sigmoid * (1.0 - sigmoid)
    elif ACTIVATION == "tanh":
        g = dy * sech2(z)
    else:
        tl.static_assert(ACTIVATION == "none")
    return g


@triton.jit
def sign_backward(dy, positive, param, ACTIVATION: tl.constexpr):
    """Does what `activation_backward` does, for activations whose derivative the sign decides."""
    if ACTIVATION == "relu":
        return tl.where(positive, dy, 0.0)
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        return tl.where(positive, dy, dy * param)


@triton.jit
def is_positive(z, ACTIVATION: tl.constexpr):
    """Says whether `sign_backward` takes z for positive; NaN is on the side that PyTorch takes."""
    if ACTIVATION == "relu":
        return (z > 0) | (z != z)
    else:
        return z > 0


@triton.jit
def pack(positive, TILE: tl.constexpr):
    """Packs a tile of booleans, eight neighbouring columns to a byte."""
    BLOCK_N: tl.constexpr = TILE.n
    BYTES: tl.constexpr = TILE.q // _BITS
    bits = tl.reshape(positive.to(tl.int32), (BLOCK_N * BYTES, _BITS))
    packed = tl.sum(bits << tl.arange(0, _BITS)[None, :], axis=1).to(tl.uint8)
    return tl.reshape(packed, (BLOCK_N, BYTES))


@triton.jit
def unpack(packed, TILE: tl.constexpr):
    """Undoes `pack`."""
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_Q: tl.constexpr = TILE.q
    column = tl.reshape(packed.to(tl.int32), (BLOCK_N * BLOCK_Q // _BITS, 1))
    bits = (column >> tl.arange(0, _BITS)[None, :]) & 1
    return tl.reshape(bits, (BLOCK_N, BLOCK_Q)) != 0


@triton.jit
def mask_at(run, i, sizes, TILE: tl.constexpr):
    """Returns where the packed signs of the run's i-th tile lie, and which are inside the array.

    A row of the input, or in the layouts of one channel a plane, begins with a new byte.
    """
    BLOCK_N: tl.constexpr = TILE.n
    BYTES: tl.constexpr = TILE.q // _BITS
    n, byte = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BYTES)[None, :]
    if TILE.layout == "planes" or TILE.layout == "flat":
        plane = blocks_of(plane_extent(sizes, TILE), _BITS)
        row = sizes.C * plane
        # One image may have a mask of more than 2^31 bytes; tiles then have one row.
        start = run.first_row * sizes.C * plane + tl.cast(run.group, tl.int64) * plane
        start += run.first_column // _BITS + i * BYTES
        columns = run.columns - i * TILE.q
    else:
        row = blocks_of(sizes.Q, _BITS)
        start = (run.first_row + i * BLOCK_N) * row + run.first_column // _BITS
        columns = run.columns
    if TILE.layout == "flat":
        n, byte = n // run.pieces, n % run.pieces + byte
    return start + (n * row + byte), rows_inside(run, i, TILE) & (byte < blocks_of(columns, _BITS))


@triton.jit
def load_mask(
    Mask, run, i, sizes, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr
):
    """Loads the packed signs of the run's i-th tile."""
    at, inside = mask_at(run, i, sizes, TILE)
    if MASKED:
        return tl.load(Mask + at, inside, other=0, eviction_policy=EVICTION)
    else:
        return tl.load(Mask + at, eviction_policy=EVICTION)


@triton.jit
def store_mask(
    Mask, packed, run, i, sizes, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr
):
    """Stores the packed signs of the run's i-th tile."""
    at, inside = mask_at(run, i, sizes, TILE)
    if MASKED:
        tl.store(Mask + at, packed, inside, eviction_policy=EVICTION)
    else:
        tl.store(Mask + at, packed, eviction_policy=EVICTION)

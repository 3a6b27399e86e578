"""The epilogue: normalisation, activation, its derivative, and packed signs."""

import triton
import triton.language as tl

from .addressing import blocks_of, box, per_channel
from .tiling import MASK_BITS

_BITS = tl.constexpr(MASK_BITS)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def normalise(x, mean, scale, bias):
    """Returns (x - mean) * (rstd * weight) + bias, in forward and backward alike.

    Folding the mean into the bias would save a subtraction and lose every
    digit where |mean| is much larger than the standard deviation.
    """
    return tl.fma(x - mean, scale, bias)


@triton.jit
def mean_and_rstd(
    Statistics, Var, eps, c0, C, acc: tl.constexpr, BLOCK_C: tl.constexpr, CACHE: tl.constexpr
):
    """Loads a batch's mean and rstd, or a fixed mean and var with rstd = 1 / sqrt(var + eps)."""
    mean = per_channel(Statistics, c0, C, acc, BLOCK_C, CACHE)
    if Var is None:
        rstd = per_channel(Statistics + C, c0, C, acc, BLOCK_C, CACHE)
    else:
        rstd = 1.0 / tl.sqrt(per_channel(Var, c0, C, acc, BLOCK_C, CACHE) + tl.full((), eps, acc))
    return mean, rstd


@triton.jit
def scale_and_bias(W, B, rstd, c0, C, BLOCK_C: tl.constexpr):
    """Returns rstd * weight and bias; a pointer that is None stands for 1 or 0."""
    scale = rstd
    bias = tl.zeros_like(rstd)
    if W is not None:
        scale *= per_channel(W, c0, C, rstd.dtype, BLOCK_C, "")
    if B is not None:
        bias += per_channel(B, c0, C, rstd.dtype, BLOCK_C, "")
    return scale, bias


@triton.jit
def tanh(z):
    """Computes tanh from exp(-2|z|), which can't overflow.

    Near zero that formula cancels. There the Taylor series serves, whose remainder is
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
    at 0 (leaky ReLU), and 0 at 6 (ReLU6). Where z is NaN it is 1, or the negative
    slope for leaky ReLU.
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
    """Says which side of 0 `sign_backward` takes z to be on; NaN goes to PyTorch's side."""
    if ACTIVATION == "relu":
        return (z > 0) | (z != z)
    else:
        return z > 0


@triton.jit
def pack(positive, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Packs a tile of booleans, eight neighbours along the contiguous axis to a byte."""
    bits = tl.reshape(positive.to(tl.int32), (BLOCK_N * BLOCK_C * BLOCK_S // _BITS, _BITS))
    packed = tl.sum(bits << tl.arange(0, _BITS)[None, :], axis=1).to(tl.uint8)
    if BLOCK_S == 1:
        return tl.reshape(packed, (BLOCK_N, BLOCK_C // _BITS, 1))
    else:
        return tl.reshape(packed, (BLOCK_N, BLOCK_C, BLOCK_S // _BITS))


@triton.jit
def unpack(packed, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Undoes `pack`."""
    column = tl.reshape(packed.to(tl.int32), (BLOCK_N * BLOCK_C * BLOCK_S // _BITS, 1))
    bits = (column >> tl.arange(0, _BITS)[None, :]) & 1
    return tl.reshape(bits, (BLOCK_N, BLOCK_C, BLOCK_S)) != 0


@triton.jit
def mask_box(
    N, C, S, n0, c0, s0, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Returns the `box` of the packed mask's bytes that belong to a tile of the input."""
    if BLOCK_S == 1:
        return box(
            N, blocks_of(C, _BITS), 1, n0, c0 // _BITS, s0, BLOCK_N, BLOCK_C // _BITS, BLOCK_S
        )
    else:
        return box(
            N, C, blocks_of(S, _BITS), n0, c0, s0 // _BITS, BLOCK_N, BLOCK_C, BLOCK_S // _BITS
        )

"""Mean and variance, and sums over programs, combined in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def sum_rows(x):
    """Sums a (BLOCK_N, BLOCK_C, BLOCK_S) tile to its channels."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def tile_moments(x, mask, count):
    """Returns mean and centred sum of squares of a tile, by two passes over registers."""
    mean = sum_rows(tl.where(mask, x, 0.0)) / count
    centred = tl.where(mask, x - mean[None, :, None], 0.0)
    return mean, sum_rows(centred * centred)


@triton.jit
def about_the_mean(squares, total, mean):
    """Returns the sum of squares about the mean, from sums about another value.

    Rounding may leave less than 0 where the squares are nearly all the mean's. Where they
    overflow, the result is infinite, as the variance is in PyTorch; NaN stays NaN.
    """
    centred = tl.maximum(squares - total * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(squares == float("inf"), squares, centred)


@triton.jit
def typical_values(X, N, C, S, c, acc: tl.constexpr):
    """Loads for each channel of a block the median of its first, middle and last value.

    It is the same in every program, and partial means are stored about it: they lose no digits
    if it is anywhere near the other values, and of three values one may be an outlier.
    """
    inside = c < C
    at = tl.cast(c, tl.int64) * S
    row = tl.cast(C, tl.int64) * S
    first = tl.load(X + at, inside, other=0.0).to(acc)
    middle = tl.load(X + (N // 2) * row + at + S // 2, inside, other=0.0).to(acc)
    last = tl.load(X + (N - 1) * row + at + (S - 1), inside, other=0.0).to(acc)
    lower, upper = tl.minimum(first, last), tl.maximum(first, last)
    return tl.maximum(lower, tl.minimum(upper, middle))


@triton.jit
def moments_of_planes(means, m2s, count, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Merges the moments of flattened planes' columns, which have equal counts, to channels."""
    WIDTH: tl.constexpr = BLOCK_C * BLOCK_S
    column = tl.arange(0, WIDTH)
    order = tl.minimum(column // BLOCK_S * S + column % BLOCK_S, WIDTH - 1)
    inside = tl.arange(0, BLOCK_S)[None, :] < S
    means = tl.reshape(tl.gather(means, order, 0), (BLOCK_C, BLOCK_S))
    m2s = tl.reshape(tl.gather(m2s, order, 0), (BLOCK_C, BLOCK_S))
    mean = tl.sum(tl.where(inside, means, 0.0), axis=1) / S.to(means.dtype)
    centred = tl.where(inside, means - mean[:, None], 0.0)
    return mean, tl.sum(tl.where(inside, m2s, 0.0) + count * (centred * centred), axis=1)


@triton.jit
def load_partials(P, first, splits, C, c0, MERGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads MERGE rows of a (splits, C) table of partial results; returns them and their mask."""
    row = first + tl.arange(0, MERGE)[:, None]
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < splits) & (c < C)
    # The load passes by the first-level cache, which may hold older values than other
    # multiprocessors have stored.
    return tl.load(P + row * C + c, mask, other=0.0, cache_modifier=".cg"), mask


@triton.jit
def sum_partials(P, splits, C, c0, MERGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the column sums of a (splits, C) table."""
    total = tl.zeros((MERGE, BLOCK_C), P.dtype.element_ty)
    for first in range(0, splits, MERGE):
        part, _ = load_partials(P, first, splits, C, c0, MERGE, BLOCK_C)
        total += part
    return tl.sum(total, axis=0)


@triton.jit
def merge_partials(Means, M2s, Counts, splits, C, c0, MERGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merges many sets at once (Chan, Golub and LeVeque, 1983), about the mean of the first ones.

    With d_i = mean_i - about, and sums over all sets:

    mean = about + sum(count_i * d_i) / count
    m2   = sum(m2_i) + sum(count_i * d_i^2) - sum(count_i * d_i)^2 / count

    The first MERGE of so many sets are at least a fraction MERGE / splits of all values, so
    whatever the data are, sum(count_i * d_i^2) is at most splits / MERGE times m2 and cancels
    no more digits than that.
    """
    rows = tl.arange(0, MERGE)
    counts = tl.load(Counts + rows, rows < splits, other=0.0, cache_modifier=".cg")
    means, _ = load_partials(Means, 0, splits, C, c0, MERGE, BLOCK_C)
    shares = counts / tl.sum(counts, axis=0)
    about = tl.sum(shares[:, None] * means, axis=0)
    count = tl.zeros((MERGE,), Means.dtype.element_ty)
    weighted = tl.zeros((MERGE, BLOCK_C), Means.dtype.element_ty)
    squares = tl.zeros((MERGE, BLOCK_C), Means.dtype.element_ty)
    m2 = tl.zeros((MERGE, BLOCK_C), Means.dtype.element_ty)
    for first in range(0, splits, MERGE):
        row = first + rows
        counts = tl.load(Counts + row, row < splits, other=0.0, cache_modifier=".cg")
        means, _ = load_partials(Means, first, splits, C, c0, MERGE, BLOCK_C)
        m2s, _ = load_partials(M2s, first, splits, C, c0, MERGE, BLOCK_C)
        away = means - about[None, :]
        count += counts
        weighted += counts[:, None] * away
        squares = tl.fma(counts[:, None] * away, away, squares)
        m2 += m2s
    total = tl.sum(count, axis=0)
    sum_away = tl.sum(weighted, axis=0)
    between = about_the_mean(tl.sum(squares, axis=0), sum_away, sum_away / total)
    return total, about + sum_away / total, tl.sum(m2, axis=0) + between

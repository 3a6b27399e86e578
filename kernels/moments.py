"""Mean and variance, and sums over programs, combined in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def sum_rows(x):
    """Sums a (BLOCK_N, BLOCK_C, BLOCK_S) tile to its channels."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def tile_moments(x, mask, count):
    """Mean and centred sum of squares of a tile, two passes over registers."""
    mean = sum_rows(tl.where(mask, x, 0.0)) / count
    centred = tl.where(mask, x - mean[None, :, None], 0.0)
    return mean, sum_rows(centred * centred)


@triton.jit
def sample_mean(
    X, N, C, S, c0, acc: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Trimmed mean of a few values at the start of each channel, the same in every program.

    Moments are taken about it: the nearer it lies to the mean, the fewer digits
    cancel. Among three values or more the smallest and the largest, which may be
    outliers, don't count. No value of M lies more than sqrt(M) standard deviations
    from the mean (Samuelson), so that even a bad sample leaves digits.
    """
    n = tl.arange(0, BLOCK_N)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    few = (n < N) & (s < S)
    # 64 bits: these rows are not a tile, whose reach the planner has checked.
    offsets = (n.to(tl.int64) * C + c0 + c) * S + s
    x = tl.load(X + offsets, few & (c < C - c0), other=0.0).to(acc)
    # Sums of sixteenths, which are exact but for denormals, don't overflow where the mean doesn't.
    x *= 0.0625
    smallest = tl.min(tl.min(tl.where(few, x, float("inf")), axis=2), axis=0)
    largest = tl.max(tl.max(tl.where(few, x, float("-inf")), axis=2), axis=0)
    count = tl.minimum(N, BLOCK_N) * tl.minimum(S, BLOCK_S)
    trimmed = tl.where(count > 2, smallest + largest, 0.0)
    sixteenths = (count - tl.where(count > 2, 2, 0)).to(acc) * 0.0625
    mean = (sum_rows(x) - trimmed) / sixteenths
    if BLOCK_C == 1:
        # By way of a scalar: to bring a vector into the tile's layout, Triton 3.6
        # stores it a thousand times to shared memory.
        mean = tl.full((1,), tl.sum(mean, axis=0), acc)
    return mean


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Chan, Golub and LeVeque (1983), eq. 2.1: the moments of two sets' union."""
    count = count_a + count_b
    delta = mean_b - mean_a
    mean = mean_a + delta * (count_b / count)
    # In this order, so that where count_a is 0 no square overflows.
    m2 = m2_a + m2_b + delta * (delta * (count_a * (count_b / count)))
    return count, mean, m2


@triton.jit
def load_partials(P, first, splits, C, c0, MERGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """MERGE rows of a (splits, C) table of partial results, and their mask."""
    row = first + tl.arange(0, MERGE)[:, None]
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < splits) & (c < C)
    # Past the first-level cache, which other multiprocessors don't write to.
    return tl.load(P + row * C + c, mask, other=0.0, cache_modifier=".cg"), mask


@triton.jit
def sum_partials(P, splits, C, c0, MERGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Column sums of a (splits, C) table."""
    total = tl.zeros((BLOCK_C,), P.dtype.element_ty)
    for first in range(0, splits, MERGE):
        part, _ = load_partials(P, first, splits, C, c0, MERGE, BLOCK_C)
        total += tl.sum(part, axis=0)
    return total


@triton.jit
def merge_partials(Means, M2s, Counts, splits, C, c0, MERGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Chan's formula for many sets at once.

    mean = sum(count_i * mean_i) / count
    m2   = sum(m2_i + count_i * (mean_i - mean)^2)
    """
    count = tl.sum(tl.zeros((MERGE,), Means.dtype.element_ty), axis=0)
    weighted = tl.zeros((BLOCK_C,), Means.dtype.element_ty)
    for first in range(0, splits, MERGE):
        row = first + tl.arange(0, MERGE)
        counts = tl.load(Counts + row, row < splits, other=0.0, cache_modifier=".cg")
        means, _ = load_partials(Means, first, splits, C, c0, MERGE, BLOCK_C)
        count += tl.sum(counts, axis=0)
        weighted += tl.sum(counts[:, None] * means, axis=0)
    mean = weighted / count
    m2 = tl.zeros((BLOCK_C,), Means.dtype.element_ty)
    for first in range(0, splits, MERGE):
        row = first + tl.arange(0, MERGE)
        counts = tl.load(Counts + row, row < splits, other=0.0, cache_modifier=".cg")
        means, _ = load_partials(Means, first, splits, C, c0, MERGE, BLOCK_C)
        m2s, mask = load_partials(M2s, first, splits, C, c0, MERGE, BLOCK_C)
        centred = tl.where(mask, means - mean[None, :], 0.0)
        # No term is larger than m2 itself: each set has values.
        m2 += tl.sum(m2s + counts[:, None] * centred * centred, axis=0)
    return count, mean, m2

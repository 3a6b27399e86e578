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
def sample_mean(
    X, N, C, S, c0, acc: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Returns a trimmed mean of a few values at the start of each channel.

    It is the same in every program. Moments are taken about it, and the nearer it lies
    to the mean, the fewer digits cancel. Among three values or more the smallest and the
    largest, which may be outliers, don't count. None of M values lies more than sqrt(M)
    standard deviations from the mean (Samuelson), so even a bad sample leaves digits.
    """
    n = tl.arange(0, BLOCK_N)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    few = (n < N) & (s < S)
    # Offsets take 64 bits, because these rows are no tile whose reach the planner has limited.
    offsets = (n.to(tl.int64) * C + c0 + c) * S + s
    x = tl.load(X + offsets, few & (c < C - c0), other=0.0).to(acc)
    # Sum sixteenths, which are exact except for denormals: where the mean doesn't overflow,
    # neither does their sum.
    x *= 0.0625
    smallest = tl.min(tl.min(tl.where(few, x, float("inf")), axis=2), axis=0)
    largest = tl.max(tl.max(tl.where(few, x, float("-inf")), axis=2), axis=0)
    count = tl.minimum(N, BLOCK_N) * tl.minimum(S, BLOCK_S)
    trimmed = tl.where(count > 2, smallest + largest, 0.0)
    sixteenths = (count - tl.where(count > 2, 2, 0)).to(acc) * 0.0625
    mean = (sum_rows(x) - trimmed) / sixteenths
    if BLOCK_C == 1:
        # Go by way of a scalar: to bring a vector into the tile's layout, Triton 3.6 would
        # store it to shared memory a thousand times.
        mean = tl.full((1,), tl.sum(mean, axis=0), acc)
    return mean


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Returns the moments of two sets' union (Chan, Golub and LeVeque, 1983, eq. 2.1)."""
    count = count_a + count_b
    delta = mean_b - mean_a
    mean = mean_a + delta * (count_b / count)
    # Multiply in this order, so that no square overflows where count_a is 0.
    m2 = m2_a + m2_b + delta * (delta * (count_a * (count_b / count)))
    return count, mean, m2


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
    total = tl.zeros((BLOCK_C,), P.dtype.element_ty)
    for first in range(0, splits, MERGE):
        part, _ = load_partials(P, first, splits, C, c0, MERGE, BLOCK_C)
        total += tl.sum(part, axis=0)
    return total


@triton.jit
def merge_partials(Means, M2s, Counts, splits, C, c0, MERGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merges many sets at once by Chan's formula.

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
        # No term overflows where m2 doesn't, since each set has values and no term exceeds m2.
        m2 += tl.sum(m2s + counts[:, None] * centred * centred, axis=0)
    return count, mean, m2

"""Moments and sums of runs, and how these partial results are combined in a fixed order.

A run leaves one row of partial results for each of its channels. The number of the row says which
run it is, and in the layout "columns" also which of the tiles that a channel's plane is cut into.
"""

import triton
import triton.language as tl

from .access import per_channel
from .addressing import lead_of, runs_of_plane
from .tiling import MERGES_AHEAD

# In the layout "columns", columns are summed up to so many channels at a time.
_CHANNELS = tl.constexpr(4)
_AHEAD = tl.constexpr(MERGES_AHEAD)


@triton.jit
def sum_rows(x, TILE: tl.constexpr):
    """Sums a tile to its columns, or in the layouts of one channel to a single value."""
    total = tl.sum(x, axis=0, keep_dims=True)
    if TILE.layout == "planes" or TILE.layout == "flat":
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def about_the_mean(squares, total, mean):
    """Returns the sum of squares about the mean, from sums about another value.

    The result is at least 0, even where the rounded difference would be less. Where only the
    squares overflow, the result is infinite, as the variance is in PyTorch; where the total is
    infinite, the result is NaN.
    """
    centred = tl.maximum(squares - total * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    overflows = (squares == float("inf")) & (tl.abs(total) < float("inf"))
    return tl.where(overflows, squares, centred)


@triton.jit
def typical_values(X, channels, sizes, acc: tl.constexpr):
    """Loads for each channel the median of its first, middle and last value.

    Every program finds the same value, and partial means are stored as differences from it. They
    lose no digits if it is anywhere near the other values, as the median is despite one outlier.
    """
    at = tl.cast(channels, tl.int64) * sizes.S
    row = tl.cast(sizes.Q, tl.int64)
    first = per_channel(X, at, acc, "")
    middle = per_channel(X, (sizes.N // 2) * row + at + sizes.S // 2, acc, "")
    last = per_channel(X, (sizes.N - 1) * row + at + (sizes.S - 1), acc, "")
    lower, upper = tl.minimum(first, last), tl.maximum(first, last)
    return tl.maximum(lower, tl.minimum(upper, middle))


@triton.jit
def pieces_of_plane(sizes, TILE: tl.constexpr):
    """Returns into how many tiles of the layout "columns" a plane may be cut, at most."""
    return (sizes.S + TILE.q - 2) // TILE.q + 1 if TILE.layout == "columns" else 1


@triton.jit
def columns_of_piece(piece, channel, sizes, TILE: tl.constexpr):
    """Returns how many columns a piece of a channel's plane has: 0 if there is no such piece."""
    first = channel * sizes.S
    begin = (first // TILE.q + piece) * TILE.q
    end = tl.minimum(first + sizes.S, begin + TILE.q)
    return tl.maximum(end - tl.maximum(first, begin), 0)


@triton.jit
def rows_of(sizes, TILE: tl.constexpr):
    """Returns how many rows a table of partial results has."""
    return sizes.splits * pieces_of_plane(sizes, TILE)


@triton.jit
def channels_of_columns(run, sizes, TILE: tl.constexpr):
    """Returns the first and the last channel of a tile in the layout "columns", in their group."""
    first = run.tile * TILE.q
    last = first + tl.minimum(run.columns, TILE.q).to(tl.int32) - 1
    return first // sizes.S, last // sizes.S


@triton.jit
def columns_of_channels(run, first, sizes, TILE: tl.constexpr):
    """Returns which columns of a tile belong to some channels, from `first` on, how many these are,
    and where the partial results are stored: in the row of the split and the plane's piece.
    """
    BLOCK_Q: tl.constexpr = TILE.q
    begin = run.tile * BLOCK_Q
    c = first + tl.arange(0, _CHANNELS)[:, None]
    low = tl.maximum(c * sizes.S - begin, 0)
    high = tl.minimum((c + 1) * sizes.S - begin, tl.minimum(run.columns, BLOCK_Q).to(tl.int32))
    q = tl.arange(0, BLOCK_Q)[None, :]
    row = run.split * pieces_of_plane(sizes, TILE) + run.tile - c * sizes.S // BLOCK_Q
    at = row * sizes.C + run.group * (sizes.width // sizes.S) + c
    return (q >= low) & (q < high), high - low, at


@triton.jit
def store_moments(Means, M2s, mean, m2, count, channels, run, sizes, TILE: tl.constexpr):
    """Stores a run's moments; those of columns, of `count` values each, are merged to channels."""
    if TILE.layout == "columns":
        first, last = channels_of_columns(run, sizes, TILE)
        for some in range(first, last + 1, _CHANNELS):
            own, columns, at = columns_of_channels(run, some, sizes, TILE)
            mean_c = tl.sum(tl.where(own, mean, 0.0), axis=1, keep_dims=True) / columns
            away = mean - mean_c
            m2_c = tl.sum(tl.where(own, m2 + count * away * away, 0.0), axis=1, keep_dims=True)
            tl.store(Means + at, mean_c, columns > 0)
            tl.store(M2s + at, m2_c, columns > 0)
    else:
        at = run.split * sizes.C + channels
        tl.store(Means + at, mean, exist(run, mean))
        tl.store(M2s + at, m2, exist(run, mean))


@triton.jit
def store_sums(P, Products, sums, products, channels, run, sizes, TILE: tl.constexpr):
    """Stores two sums of a run; those of columns are added up to channels."""
    if TILE.layout == "columns":
        first, last = channels_of_columns(run, sizes, TILE)
        for some in range(first, last + 1, _CHANNELS):
            own, columns, at = columns_of_channels(run, some, sizes, TILE)
            total = tl.sum(tl.where(own, sums, 0.0), axis=1, keep_dims=True)
            tl.store(P + at, total, columns > 0)
            total = tl.sum(tl.where(own, products, 0.0), axis=1, keep_dims=True)
            tl.store(Products + at, total, columns > 0)
    else:
        at = run.split * sizes.C + channels
        tl.store(P + at, sums, exist(run, sums))
        tl.store(Products + at, products, exist(run, sums))


@triton.jit
def exist(run, values):
    """Says which of a run's values, one a column or a single one, belong to existing channels.

    The channel of a plane exists, even if the run has none of its columns.
    """
    return tl.arange(0, values.shape[1])[None, :] < tl.maximum(run.columns, 1)


@triton.jit
def values_of_split(split, channel, sizes, TILE: tl.constexpr):
    """Returns how many values the run of a split has in a column, or of its one channel."""
    if TILE.layout == "planes":
        runs = runs_of_plane(sizes, TILE)
        rows = tl.minimum(sizes.N - tl.cast(split // runs, tl.int64) * TILE.n, TILE.n)
        lead = lead_of(channel, sizes, TILE).to(tl.int64)
        size = tl.cast(sizes.length, tl.int64) * TILE.q
        first = tl.cast(split % runs, tl.int64) * size
        columns = tl.minimum(sizes.S + lead, first + size) - tl.maximum(first, lead)
        return rows * tl.maximum(columns, 0)
    else:
        first = tl.cast(split, tl.int64) * sizes.length * TILE.n
        return tl.minimum(sizes.N - first, tl.cast(sizes.length, tl.int64) * TILE.n)


@triton.jit
def values_of_row(row, c, first, sizes, acc: tl.constexpr, TILE: tl.constexpr):
    """Returns how many values a row of partial results has of the channels c, 0 if none.

    `first` is the first channel of their group.
    """
    pieces = pieces_of_plane(sizes, TILE)
    count = values_of_split(row // pieces, c, sizes, TILE).to(acc)
    if TILE.layout == "columns":
        count = count * columns_of_piece(row % pieces, c - first, sizes, TILE).to(acc)
    return count


@triton.jit
def merge_partials(Means, M2s, first, end, c, sizes, acc: tl.constexpr, TILE: tl.constexpr):
    """Merges all sets of moments (Chan, Golub and LeVeque, 1983) about the mean of the first ones.

    With d_i = mean_i - about, and sums over all sets:

    mean = about + sum(count_i * d_i) / count
    m2   = sum(m2_i) + sum(count_i * d_i^2) - sum(count_i * d_i)^2 / count

    The first MERGE sets have at least a fraction MERGE / rows of all values, so whatever the
    data are, sum(count_i * d_i^2) is at most rows / MERGE times m2 and cancels
    no more digits than that.
    """
    MERGE: tl.constexpr = TILE.merge_rows
    WIDTH: tl.constexpr = TILE.merge_channels
    rows = rows_of(sizes, TILE)
    row = tl.arange(0, MERGE)[:, None]
    counts = tl.where(row < rows, values_of_row(row, c, first, sizes, acc, TILE), 0.0)
    means = load_partials(Means, row, c, (counts > 0) & (c < end), sizes)
    shares = counts / tl.sum(counts, axis=0, keep_dims=True)
    about = tl.sum(shares * means, axis=0, keep_dims=True)
    weighted = tl.zeros((MERGE, WIDTH), acc)
    squares = tl.zeros((MERGE, WIDTH), acc)
    m2 = tl.zeros((MERGE, WIDTH), acc)
    AHEAD: tl.constexpr = _AHEAD[0] if TILE.layout == "channels" else 1
    for some in range(0, rows, AHEAD * MERGE):
        for ahead in tl.static_range(AHEAD):
            row = some + ahead * MERGE + tl.arange(0, MERGE)[:, None]
            counts = tl.where(row < rows, values_of_row(row, c, first, sizes, acc, TILE), 0.0)
            stored = (counts > 0) & (c < end)
            away = load_partials(Means, row, c, stored, sizes) - about
            weighted += counts * away
            squares = tl.fma(counts * away, away, squares)
            m2 += load_partials(M2s, row, c, stored, sizes)
    count = (tl.cast(sizes.N, tl.int64) * sizes.S).to(acc)
    sum_away = tl.sum(weighted, axis=0, keep_dims=True)
    squares = tl.sum(squares, axis=0, keep_dims=True)
    between = about_the_mean(squares, sum_away, sum_away / count)
    return count, about + sum_away / count, tl.sum(m2, axis=0, keep_dims=True) + between


@triton.jit
def sum_partials(P, first, end, c, sizes, acc: tl.constexpr, TILE: tl.constexpr):
    """Returns for each channel the sum of its partial results."""
    MERGE: tl.constexpr = TILE.merge_rows
    WIDTH: tl.constexpr = TILE.merge_channels
    total, rows = tl.zeros((MERGE, WIDTH), acc), rows_of(sizes, TILE)
    AHEAD: tl.constexpr = _AHEAD[1] if TILE.layout == "channels" else 1
    for some in range(0, rows, AHEAD * MERGE):
        for ahead in tl.static_range(AHEAD):
            row = some + ahead * MERGE + tl.arange(0, MERGE)[:, None]
            stored = (row < rows) & (c < end)
            if TILE.layout == "columns":
                piece = row % pieces_of_plane(sizes, TILE)
                stored = stored & (columns_of_piece(piece, c - first, sizes, TILE) > 0)
            total += load_partials(P, row, c, stored, sizes)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def load_partials(P, row, c, stored, sizes):
    """Loads partial results, zero where there are none.

    The load bypasses the first-level cache, which may hold older values than other
    multiprocessors have stored.
    """
    return tl.load(P + row * sizes.C + c, stored, other=0.0, cache_modifier=".cg")

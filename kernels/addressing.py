"""Address arithmetic, which says where tiles lie in memory and to which channels they belong.

The input is an array of N rows and Q = C * S columns. Column q belongs to channel q // S, and
a group of channels to one counter. A program handles a run of tiles of one group. TILE.layout
says how tiles lie:

    "channels"  S is 1, so that each column is a channel. A run goes down the rows.
    "columns"   Channels lie side by side, and a tile may begin and end in the middle of a
                plane. A run goes down the rows.
    "planes"    A tile has pieces of planes of one channel. A run goes along the planes.

Only the last tile of a run, or all tiles of the last columns of a group, may reach over the
edge of the array. Those are masked, and the other ones, which come first, need no mask.

What is alike in a channel is a block that broadcasts against a tile: a value for each column,
or in the layout "planes" a single one.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Triton shall not compile anew for sizes that are 1 or a multiple of 16.
SIZES = ("N", "C", "S", "Q", "width", "length", "splits", "slice_groups")


class Sizes(NamedTuple):
    """Sizes of the input.

    Attributes:
        N: number of rows.
        C: number of channels.
        S: number of columns of a channel.
        Q: number of columns.
        width: number of columns of a group of channels.
        length: number of tiles of a run, at most.
        splits: number of runs that share a column of tiles, or a plane.
    """

    N: tl.tensor
    C: tl.tensor
    S: tl.tensor
    Q: tl.tensor
    width: tl.tensor
    length: tl.tensor
    splits: tl.tensor


class Run(NamedTuple):
    """A program's run of tiles.

    Attributes:
        group: number of the group of channels.
        split: number of the run among those that share a channel.
        tile: number of the column of tiles in the group; 0 in the layout "planes".
        first_row: the first row.
        first_column: the first column; in the layout "planes" it counts from the beginning of
            the plane.
        start: where the run begins in memory.
        rows, columns: how many rows and columns are inside the array.
        tiles: number of tiles.
        whole: how many of them, the first ones, are inside the array.
        step: from one tile to the next in memory.
        offsets: of a tile's elements from its start.
    """

    group: tl.tensor
    split: tl.tensor
    tile: tl.tensor
    first_row: tl.tensor
    first_column: tl.tensor
    start: tl.tensor
    rows: tl.tensor
    columns: tl.tensor
    tiles: tl.tensor
    whole: tl.tensor
    step: tl.tensor
    offsets: tl.tensor


@triton.jit
def sizes_of(N, C, S, Q, width, length, splits, TILE: tl.constexpr):
    """Returns the sizes. Q and width are passed in units of TILE.align.

    The compiler then knows that they are multiples of it, and so makes accesses up to 16 bytes
    wide.
    """
    return Sizes(N, C, S, Q * TILE.align, width * TILE.align, length, splits)


@triton.jit
def blocks_of(extent, BLOCK):
    """Returns how many blocks cover an extent; `tl.cdiv` would overflow just below 2^31."""
    return (extent - 1) // BLOCK + 1


@triton.jit
def tiles_of_group(sizes, TILE: tl.constexpr):
    """Returns how many runs lie side by side in a group of channels."""
    return blocks_of(sizes.width, TILE.q) if TILE.layout == "columns" else 1


@triton.jit
def groups_of(sizes):
    """Returns how many groups the channels have."""
    return blocks_of(sizes.Q, sizes.width)


@triton.jit
def share_of(program, sizes, TILE: tl.constexpr):
    """Returns group, column of tiles and split of a program; neighbours lie side by side."""
    tiles = tiles_of_group(sizes, TILE)
    abreast = groups_of(sizes) * tiles
    column = program % abreast
    return column // tiles, column % tiles, program // abreast


@triton.jit
def find_run(group, tile, split, sizes, TILE: tl.constexpr):
    """Returns the run that a split has of a group's column of tiles."""
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_Q: tl.constexpr = TILE.q
    q = tl.arange(0, BLOCK_Q)[None, :]
    offsets = tl.arange(0, BLOCK_N)[:, None] * sizes.Q + q
    if TILE.layout == "planes":
        pieces = blocks_of(blocks_of(sizes.S, BLOCK_Q), sizes.length)
        row = tl.cast(split // pieces, tl.int64) * BLOCK_N
        first = tl.cast(split % pieces, tl.int64) * sizes.length * BLOCK_Q
        rows, columns = sizes.N - row, sizes.width - first
        tiles = tl.minimum(sizes.length, blocks_of(columns, BLOCK_Q)).to(tl.int32)
        whole = tl.minimum(tiles, columns // BLOCK_Q).to(tl.int32)
        whole = tl.where(rows < BLOCK_N, 0, whole)
        start = row * sizes.Q + tl.cast(group, tl.int64) * sizes.width + first
        step = tl.cast(BLOCK_Q, tl.int64)
    else:
        row = tl.cast(split, tl.int64) * sizes.length * BLOCK_N
        first = tl.cast(group, tl.int64) * sizes.width + tile * BLOCK_Q
        rows = sizes.N - row
        columns = tl.minimum(sizes.Q - first, sizes.width - tile * BLOCK_Q)
        tiles = tl.minimum(sizes.length, blocks_of(rows, BLOCK_N)).to(tl.int32)
        whole = tl.minimum(tiles, rows // BLOCK_N).to(tl.int32)
        whole = tl.where(columns < BLOCK_Q, 0, whole)
        start = row * sizes.Q + first
        step = tl.cast(sizes.Q, tl.int64) * BLOCK_N
    return Run(group, split, tile, row, first, start, rows, columns, tiles, whole, step, offsets)


@triton.jit
def inside(run, i, TILE: tl.constexpr):
    """Says which elements of the run's i-th tile are inside the array."""
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_Q: tl.constexpr = TILE.q
    q = tl.arange(0, BLOCK_Q)[None, :]
    n = tl.arange(0, BLOCK_N)[:, None]
    if TILE.layout == "planes":
        return (n < run.rows) & (q < run.columns - i * BLOCK_Q)
    else:
        return (n < run.rows - i * BLOCK_N) & (q < run.columns)


@triton.jit
def values_of(run, tiles, TILE: tl.constexpr):
    """Returns how many values the first tiles of a run have in a column, or in a plane."""
    if TILE.layout == "planes":
        rows = tl.minimum(run.rows, TILE.n)
        return rows * tl.minimum(run.columns, tl.cast(tiles, tl.int64) * TILE.q)
    else:
        return tl.minimum(run.rows, tl.cast(tiles, tl.int64) * TILE.n)


@triton.jit
def load_tile(P, run, i, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Loads the run's i-th tile, zero outside the array."""
    at = P + (run.start + i * run.step) + run.offsets
    if MASKED:
        return tl.load(at, inside(run, i, TILE), other=0.0, eviction_policy=EVICTION)
    else:
        return tl.load(at, eviction_policy=EVICTION)


@triton.jit
def load_whole(P, run, i, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Loads the run's i-th tile, if it is one that needs no mask; else nothing is loaded.

    The load has one predicate for all elements, and no branch, over which the compiler would
    move nothing.
    """
    at = P + (run.start + i * run.step) + run.offsets
    return tl.load(at, tl.full(at.shape, i < run.whole, tl.int1), eviction_policy=EVICTION)


@triton.jit
def store_tile(P, x, run, i, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Stores a tile where `load_tile` would load it."""
    at = P + (run.start + i * run.step) + run.offsets
    x = x.to(P.dtype.element_ty)
    if MASKED:
        tl.store(at, x, inside(run, i, TILE), eviction_policy=EVICTION)
    else:
        tl.store(at, x, eviction_policy=EVICTION)


@triton.jit
def centre(x, about, run, i, TILE: tl.constexpr):
    """Returns x - about of the run's i-th tile, zero outside the array."""
    return tl.where(inside(run, i, TILE), x.to(about.dtype) - about, 0.0)


@triton.jit
def plane_of(columns, S):
    """Returns columns // S, as quickly as a multiplication.

    A group has so few columns that half a column is more than the rounding error.
    """
    return ((columns.to(tl.float32) + 0.5) * (1.0 / S)).to(tl.int32)


@triton.jit
def channels_of(run, sizes, TILE: tl.constexpr):
    """Returns the channels of a run's columns, as a block that broadcasts against a tile.

    Columns outside the array are given channels that exist.
    """
    BLOCK_Q: tl.constexpr = TILE.q
    q = tl.arange(0, BLOCK_Q)[None, :]
    if TILE.layout == "planes":
        return tl.full((1, 1), run.group, tl.int32)
    elif TILE.layout == "channels":
        return tl.minimum(run.group * sizes.width + q, sizes.C - 1)
    else:
        first = run.group * (sizes.width // sizes.S)
        return tl.minimum(first + plane_of(run.tile * BLOCK_Q + q, sizes.S), sizes.C - 1)


@triton.jit
def per_channel(P, channels, acc: tl.constexpr, CACHE: tl.constexpr):
    """Loads one value a channel.

    With CACHE ".cg" the load passes by the first-level cache, as it must for values that
    other multiprocessors stored in this launch.
    """
    return tl.load(P + channels, cache_modifier=CACHE).to(acc)

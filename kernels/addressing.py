"""Address arithmetic, which says where tiles lie in memory and to which channels they belong.

The input is an array of N rows and Q = C * S columns. Column q belongs to channel q // S, and
a group of channels to one counter. A program handles a run of tiles of one group. TILE.layout
says how tiles lie:

    "channels"  S is 1, so that each column is a channel. A run goes down the rows.
    "columns"   Channels lie side by side, and a tile may begin and end in the middle of a
                plane. A run goes down the rows.
    "planes"    A tile has pieces of planes of one channel. A run goes along the planes.
    "flat"      A tile has all values of a channel, for resident kernels: plane after plane, in
                pieces of eight.

Tiles begin where a thread may access TILE.align elements at once. In the layouts of one channel,
"planes" and "flat", the first tile hence begins with some columns of the channel before, and some
columns of another channel may follow after the plane. Such columns are loaded but don't count.

Only the first and the last tile of a run, or all tiles of the last rows or of the last columns of
a group, may reach beyond the run's own elements. These tiles are masked. The tiles between them are
whole and need no mask.

Values of channels are blocks that broadcast against a tile: a value for each column, or in the
layouts of one channel a single value.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Triton must not compile anew for sizes that are 1 or a multiple of 16.
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
        splits: number of runs that share a column of tiles, or in the layout "planes" a channel.
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
        tile: number of the column of tiles in the group; 0 except in the layout "columns".
        first_row: the first row.
        first_column: the first column; in the layouts of one channel it counts from where the
            plane's first tile begins.
        start: where the run begins in memory.
        rows: how many rows are inside the array.
        lead, columns: columns from `lead` up to `columns` are the run's own.
        tiles: number of tiles.
        whole, rest: tiles from `whole` up to `rest` are whole.
        step: the distance in memory from one tile to the next.
        offsets: the distances of a tile's elements from the tile's start.
        pieces: number of pieces of eight columns in a plane, in the layout "flat"; else 0.
    """

    group: tl.tensor
    split: tl.tensor
    tile: tl.tensor
    first_row: tl.tensor
    first_column: tl.tensor
    start: tl.tensor
    rows: tl.tensor
    lead: tl.tensor
    columns: tl.tensor
    tiles: tl.tensor
    whole: tl.tensor
    rest: tl.tensor
    step: tl.tensor
    offsets: tl.tensor
    pieces: tl.tensor


@triton.jit
def sizes_of(N, C, S, Q, width, length, splits, TILE: tl.constexpr):
    """Returns the sizes, and lets the compiler know which are multiples of TILE.align.

    The compiler then makes accesses up to 16 bytes wide.
    """
    if TILE.layout == "channels" or TILE.layout == "columns":
        width = aligned(width, TILE)
    return Sizes(N, C, S, aligned(Q, TILE), width, length, splits)


@triton.jit
def aligned(columns, TILE: tl.constexpr):
    """Rounds down to a multiple of TILE.align."""
    return columns // TILE.align * TILE.align


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
    """Returns group, column of tiles and split of a program; consecutive ones lie side by side."""
    tiles = tiles_of_group(sizes, TILE)
    abreast = groups_of(sizes) * tiles
    column = program % abreast
    return column // tiles, column % tiles, program // abreast


@triton.jit
def lead_of(channel, sizes, TILE: tl.constexpr):
    """Returns how many columns of the channel before are in the first tile of a plane."""
    return (channel % TILE.align) * (sizes.S % TILE.align).to(tl.int32) % TILE.align


@triton.jit
def plane_extent(sizes, TILE: tl.constexpr):
    """Returns the columns of a plane and the most that `lead_of` may be."""
    # The lowest bit that is set is the largest power of two that divides S.
    return sizes.S + (TILE.align - tl.minimum(sizes.S & -sizes.S, TILE.align))


@triton.jit
def runs_of_plane(sizes, TILE: tl.constexpr):
    """Returns how many runs share a plane in the layout "planes"."""
    return blocks_of(blocks_of(plane_extent(sizes, TILE), TILE.q), sizes.length)


@triton.jit
def find_run(group, tile, split, sizes, TILE: tl.constexpr):
    """Returns the run that is a split of a column of tiles of a group.

    In the layout "planes" some channels may end before the last run, which then has no columns.
    """
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_Q: tl.constexpr = TILE.q
    n, q = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_Q)[None, :]
    offsets, pieces = n * sizes.Q + q, 0
    row = tl.cast(split, tl.int64) * 0
    lead = 0
    if TILE.layout == "channels" or TILE.layout == "columns":
        row = tl.cast(split, tl.int64) * sizes.length * BLOCK_N
        first = tl.cast(group, tl.int64) * sizes.width + tile * BLOCK_Q
        start, step = row * sizes.Q + first, tl.cast(sizes.Q, tl.int64) * BLOCK_N
        rows = sizes.N - row
        columns = tl.minimum(sizes.Q - first, sizes.width - tile * BLOCK_Q)
        tiles = tl.minimum(sizes.length, blocks_of(rows, BLOCK_N)).to(tl.int32)
        whole = tl.zeros_like(tiles)
        rest = tl.where(columns < BLOCK_Q, 0, tl.minimum(tiles, rows // BLOCK_N)).to(tl.int32)
    else:
        lead = lead_of(group, sizes, TILE)
        plane = aligned(tl.cast(group, tl.int64) * sizes.S, TILE)
        step = tl.cast(BLOCK_Q, tl.int64)
        if TILE.layout == "planes":
            runs = runs_of_plane(sizes, TILE)
            row = tl.cast(split // runs, tl.int64) * BLOCK_N
            first = tl.cast(split % runs, tl.int64) * sizes.length * BLOCK_Q
        else:
            first = row
            pieces = blocks_of(plane_extent(sizes, TILE), BLOCK_Q)
            offsets = n // pieces * sizes.Q + (n % pieces) * BLOCK_Q + q
        rows, columns = sizes.N - row, sizes.S + lead - first
        start, lead = row * sizes.Q + plane + first, tl.where(first == 0, lead, 0)
        tiles = tl.minimum(sizes.length, blocks_of(columns, BLOCK_Q)).to(tl.int32)
        whole = tl.where(lead > 0, 1, 0)
        rest = tl.minimum(tiles, columns // BLOCK_Q).to(tl.int32)
        rest = tl.where(rows < BLOCK_N, whole, tl.maximum(rest, whole))
    return Run(
        group, split, tile, row, first, start, rows, lead, columns, tiles, whole, rest, step,
        offsets, pieces,
    )  # fmt: skip


@triton.jit
def masked_tile(j, run):
    """Returns the index of a run's j-th tile that is not whole."""
    return tl.where(j < run.whole, j, j + (run.rest - run.whole))


@triton.jit
def masked_tiles(run):
    """Returns how many tiles of a run are not whole."""
    return run.tiles - (run.rest - run.whole)


@triton.jit
def rows_inside(run, i, TILE: tl.constexpr):
    """Says which rows of the run's i-th tile are inside the array."""
    n = tl.arange(0, TILE.n)[:, None]
    if TILE.layout == "flat":
        return n < run.rows.to(tl.int32) * run.pieces
    elif TILE.layout == "planes":
        return n < tl.minimum(run.rows, TILE.n).to(tl.int32)
    else:
        return n < tl.minimum(run.rows - i * TILE.n, TILE.n).to(tl.int32)


@triton.jit
def columns_of(run, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Returns columns of a tile, or in the layout "flat" of a plane, in units of UNIT columns."""
    q = tl.arange(0, TILE.q)[None, :] // UNIT
    if TILE.layout == "flat":
        return tl.arange(0, TILE.n)[:, None] % run.pieces * (TILE.q // UNIT) + q
    else:
        return q


@triton.jit
def columns_inside(run, i, TILE: tl.constexpr):
    """Returns where the columns of the run's i-th tile end that are its own.

    The result has 32 bits, as comparisons with each column should have.
    """
    if TILE.layout == "planes":
        columns = run.columns - i * TILE.q
        return tl.minimum(tl.maximum(columns, 0), TILE.q).to(tl.int32)
    elif TILE.layout == "flat":
        return run.columns.to(tl.int32)
    else:
        return tl.minimum(run.columns, TILE.q).to(tl.int32)


@triton.jit
def inside(run, i, TILE: tl.constexpr):
    """Says which elements of the run's i-th tile are its own."""
    q = columns_of(run, 1, TILE)
    own = q < columns_inside(run, i, TILE)
    if TILE.layout == "planes":
        own = own & (q >= tl.where(i == 0, run.lead, 0))
    elif TILE.layout == "flat":
        own = own & (q >= run.lead)
    return own & rows_inside(run, i, TILE)


@triton.jit
def accessible(run, i, TILE: tl.constexpr):
    """Says which elements of the run's i-th tile are loaded: what a thread accesses at once is
    loaded as a whole or not at all.
    """
    end = (columns_inside(run, i, TILE) + (TILE.align - 1)) // TILE.align
    return (columns_of(run, TILE.align, TILE) < end) & rows_inside(run, i, TILE)


@triton.jit
def values_of(run, tiles, TILE: tl.constexpr):
    """Returns how many values the first tiles of a run have in a column, or of the one channel."""
    tiles = tl.cast(tiles, tl.int64)
    if TILE.layout == "planes":
        columns = tl.minimum(run.columns, tiles * TILE.q) - run.lead
        return tl.minimum(run.rows, TILE.n) * tl.maximum(columns, 0)
    else:
        return tl.minimum(run.rows, tiles * TILE.n)


@triton.jit
def plane_of(columns, S):
    """Returns columns // S, computed by a multiplication.

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
    if TILE.layout == "planes" or TILE.layout == "flat":
        return tl.full((1, 1), run.group, tl.int32)
    elif TILE.layout == "channels":
        return tl.minimum(run.group * sizes.width + q, sizes.C - 1)
    else:
        first = run.group * (sizes.width // sizes.S)
        return tl.minimum(first + plane_of(run.tile * BLOCK_Q + q, sizes.S), sizes.C - 1)

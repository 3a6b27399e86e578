"""Kernels that ask memory and cache what fastbn's kernels ask of them, and compute nothing.

Tensors hold 32-bit integers, of which sums are exact in any order. Each program
reads one tile, as large as one of fastbn's, and writes its sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbn.kernels.addressing import sizes_of
from fastbn.kernels.moments import merge_partials
from fastbn.kernels.tickets import draw_ticket, raise_flag, wait_for_flag
from fastbn.kernels.tiling import Tile

ITEMSIZE = 4
TILE_BYTES = 8192
TILE = TILE_BYTES // ITEMSIZE

# Of the matrix that slices are read from.
ROW_BYTES = 8192

# Nothing to fuse, but Triton warns of launches that don't say.
_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _read_slices_kernel(
    X,  # pointer to a matrix of COLUMNS columns
    Sums,  # pointer to a sum for each program
    row_blocks,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One slice of columns after the other, from the first again after the last."""
    program = tl.program_id(0)
    c0 = program // row_blocks % (COLUMNS // WIDTH) * WIDTH
    row = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = c0 + tl.arange(0, WIDTH)
    offsets = tl.cast(row, tl.int64)[:, None] * COLUMNS + column[None, :]
    # Past the first-level cache, which is not asked.
    x = tl.load(X + offsets, cache_modifier=".cg")
    tl.store(Sums + program, tl.sum(tl.sum(x, 1), 0))


def read_slices(matrix: Tensor, width_bytes: int, visits: int = 1) -> Tensor:
    """Reads all of a matrix so many times, in slices of columns; sums, slice by slice."""
    rows, columns = matrix.shape
    width = width_bytes // ITEMSIZE
    block_rows = TILE // width
    programs = visits * matrix.numel() // TILE
    sums = torch.empty(programs, dtype=torch.int32, device=matrix.device)
    _read_slices_kernel[(programs,)](
        matrix, sums, rows // block_rows,
        COLUMNS=columns, WIDTH=width, BLOCK_ROWS=block_rows, **_OPTIONS,
    )  # fmt: skip
    return sums


@triton.jit
def _copy_slices_kernel(
    X,  # pointer to the source
    Y,  # pointer to the target
    Sums,  # pointer to a sum for each program
    slice_tiles,
    READS: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,  # hint to the cache for what is read again
    LAST: tl.constexpr,  # hint for what is not
):
    """One slice after the other, each read READS times and written the last time."""
    program = tl.program_id(0)
    read = program // slice_tiles % READS
    tile = program // slice_tiles // READS * slice_tiles + program % slice_tiles
    offsets = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
    if read == READS - 1:
        x = tl.load(X + offsets, eviction_policy=LAST)
        tl.store(Y + offsets, x, eviction_policy=LAST)
    else:
        x = tl.load(X + offsets, eviction_policy=FIRST)
    tl.store(Sums + program, tl.sum(x, 0))


def copy_slices(
    source: Tensor, target: Tensor, slice_bytes: int, reads: int, hints: bool = True
) -> Tensor:
    """Copies as the ticketed kernels do: a slice is read so many times before the next one.

    Args:
        hints: tell the cache what is read again and what is not, as these kernels do.

    Returns:
        Sums, slice by slice, of each reading.
    """
    programs = reads * source.numel() // TILE
    sums = torch.empty(programs, dtype=torch.int32, device=source.device)
    first, last = ("evict_last", "evict_first") if hints else ("", "")
    _copy_slices_kernel[(programs,)](
        source, target, sums, slice_bytes // TILE_BYTES,
        READS=reads, TILE=TILE, FIRST=first, LAST=last, **_OPTIONS,
    )  # fmt: skip
    return sums


@triton.jit
def _touch_kernel(P):
    tl.store(P + tl.program_id(0), 1)


def touch(flags: Tensor) -> None:
    """Next to nothing: sets each element, one a program."""
    _touch_kernel[(flags.numel(),)](flags, **_OPTIONS)


@triton.jit
def _draw_kernel(Tickets, Drawn, DRAW: tl.constexpr):
    ticket = tl.program_id(0)
    if DRAW:
        ticket, _ = draw_ticket(Tickets, 0)
    tl.store(Drawn + ticket, 1)


def draw(tickets: Tensor, drawn: Tensor, atomic: bool) -> None:
    """Starts a program for each element of `drawn`, which draws a ticket or takes its number."""
    _draw_kernel[(drawn.numel(),)](tickets, drawn, DRAW=atomic, **_OPTIONS)


@triton.jit
def _relay_kernel(Tickets, Flags):
    ticket, generation = draw_ticket(Tickets, 0)
    if ticket > 0:
        wait_for_flag(Flags + ticket - 1, generation)
    raise_flag(Flags + ticket, generation)


def relay(tickets: Tensor, flags: Tensor) -> None:
    """Raises one flag after the other, each by a program that waited for the one before."""
    _relay_kernel[(flags.numel(),)](tickets, flags, **_OPTIONS)


@triton.jit
def _chase_kernel(Next, End, steps):
    place = tl.load(Next, cache_modifier=".cg")
    for _ in range(steps):
        place = tl.load(Next + place, cache_modifier=".cg")
    tl.store(End, place)


def chase(next: Tensor, end: Tensor, steps: int) -> None:
    """Follows a list of places from the first one, each of which says where the next one is."""
    _chase_kernel[(1,)](next, end, steps, **_OPTIONS)


@triton.jit
def _merge_kernel(Means, M2s, Out, rows, TILE: tl.constexpr):
    C: tl.constexpr = TILE.q
    sizes = sizes_of(rows * TILE.n, C, 1, C, C, 1, rows, TILE)
    c = tl.arange(0, C)[None, :]
    count, mean, m2 = merge_partials(Means, M2s, 0, C, c, sizes, tl.float32, TILE)
    tl.store(Out + c, mean)
    tl.store(Out + C + c, m2 / count)


def merge(means: Tensor, m2s: Tensor, count: int, at_once: int) -> Tensor:
    """Merges (splits, C) partial results of `count` values each in one program.

    Returns:
        (2, C) mean and variance.
    """
    rows, channels = means.shape
    merged = means.new_empty(2, channels)
    tile = Tile(count, channels, "channels", 1, merge_rows=at_once, merge_channels=channels)
    _merge_kernel[(1,)](means, m2s, merged, rows, tile, **_OPTIONS)
    return merged

"""Kernels that access memory and cache as fastbn's kernels do, and compute next to nothing.

Tensors hold 32-bit integers, whose sums are exact in any order. A program that reads a tile, which
is as large as one of fastbn's, writes its sum.
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

# The bytes of a row of the matrix from which slices are read.
ROW_BYTES = 8192

# There is nothing to fuse, but Triton warns of launches without this option.
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
    """Reads one slice of columns after the other, and begins again after the last one."""
    program = tl.program_id(0)
    c0 = program // row_blocks % (COLUMNS // WIDTH) * WIDTH
    row = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = c0 + tl.arange(0, WIDTH)
    offsets = tl.cast(row, tl.int64)[:, None] * COLUMNS + column[None, :]
    # The loads bypass the first-level cache, which is not measured.
    x = tl.load(X + offsets, cache_modifier=".cg")
    tl.store(Sums + program, tl.sum(tl.sum(x, 1), 0))


def read_slices(matrix: Tensor, width_bytes: int, visits: int = 1) -> Tensor:
    """Reads a matrix so many times in slices of columns, and returns the sums of all tiles."""
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
    """Reads each slice READS times before the next one, and writes it at the last time."""
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
        source: the tensor to copy.
        target: where the copy goes.
        slice_bytes: size of a slice.
        reads: how often each slice is read.
        hints: whether to tell the cache what is read again and what is not, as these kernels do.

    Returns:
        The sums of all tiles, for each reading of each slice.
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
    """Starts a program for each element, which sets it to 1 and does nothing else."""
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
    """Follows a linked list from its first place; each place holds the index of the next one."""
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

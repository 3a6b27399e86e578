"""The problem as the planner sees it, and the shapes of the tiles that cut it up.

The kernels see both memory layouts as one array of N rows and Q = C * S columns, in which
column q belongs to channel q // S. A channels-first input has a row for each image, and a
channels-last input or a matrix has one for each pixel, and S = 1. `addressing.py` says how
tiles lie in that array.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from .device import Device

# Two warps read a tile of 4 KiB in four accesses of 16 bytes a thread. Each thread repeats what a
# run does once, so a program has few threads. A thread has 32 elements of a bfloat16 tile, enough
# to compute while further loads are in flight. A forward loads the next tile while it computes one,
# and a backward loads two tensors, so that four programs have 16 to 32 KiB in flight. An H100's
# multiprocessor needs about 18 KB, the product of its latency and bandwidth.
WARPS = 2
PROGRAMS_PER_SM = 4
ACCESS_BYTES = 16

# Kernels are compiled with a limit of the registers of a thread (`registers_of`). Without one the
# compiler makes room for more programs than the planner counts on, and sometimes spills a scalar.
REGISTERS = 65536  # of a multiprocessor
MAX_REGISTERS = 255  # of a thread

# A tile that is read by narrow accesses needs registers for more addresses and masks. If a thread
# had more than eight accesses to a tile, PROGRAMS_PER_SM programs would not fit a multiprocessor.
MAX_ACCESSES = 8

# A resident program holds a whole group of channels in registers, 16 values a thread: with 32,
# kernels for odd sizes would spill. There are only two sizes of tiles, so that ever new sizes of
# problems don't compile ever new kernels. With channels last, a row of a tile is one memory sector;
# with channels first, a tile has one channel.
RESIDENT_ELEMENTS = (2048, 8192)
RESIDENT_THREAD_ELEMENTS = 16
SECTOR_BYTES = 32

# A row of a tile should be at least this long in memory: four 128-byte lines. Where the input has
# few rows, a tile of the layout "planes" has a single one.
ROW_BYTES = 512
FEW_ROWS = 8

# Planes that are no longer than four rows of a tile lie side by side in tiles, if the input has at
# least this many rows. With fewer rows, runs would be too short to outweigh what a run does once.
MANY_ROWS = 64

# A run loads parameters, reduces and stores results once. That takes as many instructions as so
# many of its tiles do, by the tiles' layout.
FIXED_TILES = {"channels": 4, "columns": 6, "planes": 3}

# The forward packs eight signs into a byte along the contiguous axis.
MASK_BITS = 8

# A program merges so many float32 partial results at a time, in the layout "columns" of so many
# channels. With channels last there are many partial results of each channel. There a forward loads
# as many as it merges before it waits for them, and a backward four times as many.
MERGE_ELEMENTS = 1024
MERGE_CHANNELS = 64
MERGES_AHEAD = (1, 4)

# In the layout "columns" a group is widened until its tiles reach beyond it by no more than this
# fraction of its columns. `plane_of` in `addressing.py` is exact for up to MAX_WIDTH columns.
WASTE = 1 / 64
MAX_WIDTH = 2**20


@dataclass(frozen=True)
class Problem:
    """The properties of a batch norm call on which launches depend.

    Attributes:
        n, c, s: the input's sizes, seen as (N, C, S) with S contiguous.
        itemsize: bytes of one element of the input.
        training: whether the statistics are the batch's own, and not fixed.
        residual: whether another tensor is added before the activation.
        saves: what the backward keeps of the activation's argument. With None it
            recomputes the argument from the input, with "residual" from input and
            residual; with "mask" it keeps the argument's sign, one bit an element.
    """

    n: int
    c: int
    s: int
    itemsize: int
    training: bool = True
    residual: bool = False
    saves: str | None = None

    @property
    def layout(self) -> str:
        return "channels-last" if self.s == 1 else "channels-first"

    @property
    def tensor_bytes(self) -> int:
        """Returns the bytes of one unit of traffic, which is a tensor read or written once."""
        return self.n * self.c * self.s * self.itemsize


@dataclass(frozen=True)
class Tile:
    """What one program handles at once, and how it does so; kernels take it as one constant.

    Attributes:
        n, q: rows and columns of the tile, powers of two.
        layout: "channels", "columns", "planes" or "flat", of which `addressing.py` says how tiles
            lie.
        align: every row of a tile begins at a multiple of this.
        merge_rows, merge_channels: how many partial results are merged at a time.
    """

    n: int
    q: int
    layout: str
    align: int
    merge_rows: int
    merge_channels: int

    @property
    def elements(self) -> int:
        return self.n * self.q

    def access_bytes(self, itemsize: int) -> int:
        """Returns the bytes that a thread moves at once, fewer than 16 for odd sizes."""
        return min(ACCESS_BYTES, self.align * itemsize)


@lru_cache(maxsize=4096)
def choose_tile(problem: Problem, device: Device, row_bytes: int = ROW_BYTES) -> Tile:
    """Returns the tile of a pass, for which sizes of images hardly count: few tiles, few kernels.

    Args:
        problem: the problem to cut up.
        device: the device, which says how many bytes a tile has.
        row_bytes: length of a tile's rows in memory, if channels are last.
    """
    align = alignment(problem)
    elements = _elements(problem, device, align)
    row = ROW_BYTES // problem.itemsize
    if problem.s == 1:
        layout = "channels"
        wanted = max(MASK_BITS, row_bytes // problem.itemsize)
        q = min(wanted, max(MASK_BITS, power_of_2(problem.c)))
    else:
        layout = "columns" if planes_side_by_side(problem) else "planes"
        q = row
        if problem.n < FEW_ROWS:
            # In "columns" a thread has parameters for each column, and too few registers for 32.
            q = elements if layout == "planes" else elements // 2
    q = min(q, elements)
    n = elements // q
    # Kernels count a tile's offsets in 32 bits.
    while n > 1 and n * problem.c * problem.s >= 2**31:
        n //= 2
    # Sums of float64 take twice as many registers.
    merged = MERGE_ELEMENTS * 4 // max(4, problem.itemsize)
    channels = {"channels": q, "columns": MERGE_CHANNELS, "planes": 1}[layout]
    channels = min(channels, power_of_2(problem.c))
    return Tile(n, q, layout, align, max(1, merged // channels), channels)


def alignment(problem: Problem) -> int:
    """Returns how many elements a thread may move at once.

    Where rows begin aligned, tiles do too: in the layout "planes" a plane's first tile may begin
    with elements before the plane.
    """
    full = ACCESS_BYTES // problem.itemsize
    columns = problem.c * problem.s
    if columns >= 2**31:
        # Kernels multiply by the alignment in 32-bit arithmetic.
        return 1
    align = min(full, columns & -columns)
    # With channels last the number of channels decides. With channels first sizes of images would
    # decide too and lead to many kernels, so there only two values are used.
    return align if problem.s == 1 or align == full else 1


def planes_side_by_side(problem: Problem) -> bool:
    """Says whether the layout is "columns", for small planes and rows of whole bytes of a mask.

    With fixed statistics a run does little once, so that few rows are enough. But a packed mask
    must have the same layout with fixed statistics and with a batch's.
    """
    many = problem.n >= MANY_ROWS or not (problem.training or problem.saves == "mask")
    small = 1 < problem.s <= 4 * ROW_BYTES // problem.itemsize
    return many and small and problem.c * problem.s % MASK_BITS == 0


def mask_by_rows(problem: Problem) -> bool:
    """Says whether the bits of a packed mask run along rows and not along planes."""
    return problem.s == 1 or planes_side_by_side(replace(problem, saves="mask"))


def plane_extent(problem: Problem) -> int:
    """Returns the elements of a plane plus the most that lie before it in its first tile."""
    align = alignment(problem)
    # The lowest bit that is set is the largest power of two that divides S. `gcd` would turn a
    # symbolic size into a number, and PyTorch's compiler would compile anew for each.
    return problem.s + align - min(problem.s & -problem.s, align)


@lru_cache(maxsize=4096)
def group_width(problem: Problem, tile: Tile, most: int = MAX_WIDTH) -> int:
    """Returns the columns of a group of channels, no more than `most` if that is possible."""
    if tile.layout == "channels":
        return tile.q
    if tile.layout in ("planes", "flat"):
        return problem.s
    # A group ends where a channel, an access and a byte of the mask end.
    step = problem.s * MASK_BITS // gcd(problem.s, MASK_BITS)
    best, least = step, _waste(step, tile.q)
    for width in range(2 * step, min(problem.c * problem.s, most) + 1, step):
        if least <= WASTE:
            break
        if _waste(width, tile.q) < least:
            best, least = width, _waste(width, tile.q)
    return best


def _waste(width: int, q: int) -> float:
    return -(-width // q) * q / width - 1


def resident_tile(problem: Problem) -> Tile | None:
    """Returns a tile of all values of one channel, or of a sector of channels if these are last.

    Returns None where no program can hold so many values in its registers, or where channels
    would share bytes of a packed mask. Values in float64 would take twice the registers there are.
    """
    if problem.itemsize == 8:
        return None
    if problem.saves == "mask" and planes_side_by_side(problem) and problem.s % MASK_BITS:
        return None
    if problem.s == 1:
        layout, q, pieces = "channels", max(MASK_BITS, SECTOR_BYTES // problem.itemsize), 1
    else:
        layout, q, pieces = "flat", MASK_BITS, -(-plane_extent(problem) // MASK_BITS)
    for elements in RESIDENT_ELEMENTS:
        tile = Tile(elements // q, q, layout, alignment(problem), 1, 1)
        if problem.n * pieces <= tile.n and -(-tile.n // pieces) * problem.c * problem.s < 2**31:
            return tile
    return None


def warps_of(tile: Tile, strategy: str) -> int:
    """Returns the warps of a program."""
    if strategy != "resident":
        return WARPS
    return min(16, max(4, tile.elements // (32 * RESIDENT_THREAD_ELEMENTS)))


def registers_of(warps: int, strategy: str) -> int:
    """Returns how many registers a thread may have, so that programs fit as planned."""
    programs = 1 if strategy == "resident" else PROGRAMS_PER_SM
    return min(MAX_REGISTERS, REGISTERS // (32 * warps * programs))


def _elements(problem: Problem, device: Device, align: int) -> int:
    """Returns the elements of a tile; float64 takes so many registers that it gets half."""
    most = device.tile_bytes // problem.itemsize // (2 if problem.itemsize == 8 else 1)
    return min(most, MAX_ACCESSES * 32 * WARPS * align)


def power_of_2(n: int) -> int:
    """Returns the smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()

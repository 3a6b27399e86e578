"""The problem as the planner sees it, and the shapes of the tiles that cut it up.

The kernels see both memory layouts as one array of N rows and Q = C * S columns, in which
column q belongs to channel q // S. A channels-first input has a row for each image, and a
channels-last input or a matrix has one for each pixel, and S = 1. `addressing.py` says how
tiles lie in that array.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from .device import Device

# Two warps read a tile of 4 KiB in four accesses of 16 bytes a thread. What a run does once for
# each thread weighs less the fewer threads there are; a thread has 32 elements of a tile, enough
# to work on while others are under way. While a forward computes a tile it loads the next one,
# and a backward loads two tensors: four programs have 16 to 32 KiB under way, more than the
# product of latency and bandwidth of an H100's multiprocessor.
WARPS = 2
PROGRAMS_PER_SM = 4
ACCESS_BYTES = 16

# The kernels set the registers of a thread as a limit. Without one the compiler aims at more
# programs than the planner counts on, and spills a scalar now and then.
REGISTERS = 65536  # of a multiprocessor
MAX_REGISTERS = 255  # of a thread

# Narrow accesses need registers for more addresses and masks. With more than eight accesses a
# thread the programs would no longer fit.
MAX_ACCESSES = 8

# A resident program holds a whole group of channels in registers, 16 values a thread: with 32,
# odd sizes would spill. Channels last, its rows have one memory sector; else it holds one channel.
RESIDENT_ELEMENTS = 8192
RESIDENT_THREAD_ELEMENTS = 16
SECTOR_BYTES = 32

# A row of a tile should be at least this long in memory: four 128-byte lines.
ROW_BYTES = 512

# What a run does once, to load parameters, to reduce and to store, takes as many instructions
# as this many of its tiles, by the tiles' layout.
FIXED_TILES = {"channels": 4, "columns": 6, "planes": 3}

# Tiles of a run, if there are so many one after the other, by which layouts are compared.
TYPICAL_RUN = 8

# The forward packs eight signs into a byte along the contiguous axis.
MASK_BITS = 8

# Elements of a table of partial results that are merged at a time, and the most channels.
MERGE_ELEMENTS = 1024
MERGE_CHANNELS = 64

# In the layout "columns" a group is widened until no more than this part of its tiles is waste,
# and has fewer columns than kernels can divide by multiplication.
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
        layout: "channels", "columns" or "planes", of which `addressing.py` says how tiles lie.
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
    """Returns the tile that takes the fewest instructions.

    Args:
        problem: the problem to cut up.
        device: the device, which says how many bytes a tile has.
        row_bytes: length of a tile's rows in memory, if channels are last.
    """
    if problem.s == 1:
        align = _align(problem.c, problem.itemsize)
        elements = _elements(problem, device, align)
        wanted = max(MASK_BITS, row_bytes // problem.itemsize)
        q = min(wanted, max(MASK_BITS, power_of_2(problem.c)), elements)
        return _make(problem, "channels", elements // q, q, align)
    candidates = []
    row = ROW_BYTES // problem.itemsize
    if _planes_serve(problem):
        # A thread moves 16 bytes at once or one element: few alignments make few kernels.
        align = _align(problem.s, problem.itemsize) if problem.c * problem.s < 2**31 else 1
        align = align if align * problem.itemsize == ACCESS_BYTES else 1
        elements = _elements(problem, device, align)
        longest = max(MASK_BITS, min(elements, power_of_2(problem.s)))
        rows = {longest, min(longest, 4 * row), min(longest, row)}
        candidates += [
            _make(problem, "planes", elements // q, q, align) for q in sorted(rows, reverse=True)
        ]
    if _columns_serve(problem):
        align = _align(problem.c * problem.s, problem.itemsize)
        elements = _elements(problem, device, align)
        q = min(elements, row if problem.n * row >= elements else 4 * row)
        candidates.append(_make(problem, "columns", elements // q, q, align))
    return min(candidates, key=lambda tile: _instructions(problem, tile))


def _columns_serve(problem: Problem) -> bool:
    """Says whether rows begin aligned, and a packed mask may run along them."""
    planes_of_bits = problem.saves == "mask" and not mask_by_rows(problem)
    return _whole_bytes(problem) and not planes_of_bits


def _planes_serve(problem: Problem) -> bool:
    """Says whether there is no packed mask that must run along whole rows."""
    return problem.saves != "mask" or problem.s % MASK_BITS == 0 or not mask_by_rows(problem)


def mask_by_rows(problem: Problem) -> bool:
    """Says whether the bits of a packed mask run along rows and not along planes.

    If planes are whole bytes, the two are the same. The resident kernels need planes.
    """
    return _whole_bytes(problem) and not resident_fits(problem)


def _whole_bytes(problem: Problem) -> bool:
    """Says whether groups of channels are whole bytes of a mask, and not too wide."""
    return problem.c * problem.s % MASK_BITS == 0 and problem.s <= MAX_WIDTH // MASK_BITS


def _make(problem: Problem, layout: str, n: int, q: int, align: int) -> Tile:
    """Returns a tile whose offsets kernels can count in 32 bits."""
    while n > 1 and n * problem.c * problem.s >= 2**31:
        n //= 2
    # Sums of float64 take twice as many registers.
    elements = MERGE_ELEMENTS * 4 // max(4, problem.itemsize)
    channels = {"channels": q, "columns": MERGE_CHANNELS, "planes": 1}[layout]
    channels = min(channels, power_of_2(problem.c))
    return Tile(max(1, n), q, layout, align, max(1, elements // channels), channels)


def _instructions(problem: Problem, tile: Tile) -> float:
    """Returns how many instructions a run of tiles takes for each element, in arbitrary units."""
    if tile.layout == "planes":
        across, along = -(-problem.n // tile.n), -(-problem.s // tile.q)
        lanes = across * along * tile.elements / (problem.n * problem.s)
    else:
        along = -(-problem.n // tile.n)
        width = group_width(problem, tile)
        lanes = along * tile.n / problem.n * -(-width // tile.q) * tile.q / width
    # A tile with narrow accesses has more instructions of its own.
    narrow = ACCESS_BYTES / tile.access_bytes(problem.itemsize)
    return lanes * (narrow + FIXED_TILES[tile.layout] / min(along, TYPICAL_RUN))


@lru_cache(maxsize=4096)
def group_width(problem: Problem, tile: Tile, most: int = MAX_WIDTH) -> int:
    """Returns the columns of a group of channels, no more than `most` if that is possible."""
    if tile.layout == "channels":
        return tile.q
    if tile.layout == "planes":
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


def resident_tile(problem: Problem) -> Tile:
    """Returns a tile of all values of one channel, or if channels are last of a sector's."""
    if problem.s == 1:
        layout, q = "channels", max(MASK_BITS, SECTOR_BYTES // problem.itemsize)
        align = _align(problem.c, problem.itemsize)
    else:
        layout, q = "planes", max(MASK_BITS, power_of_2(problem.s))
        align = _align(problem.s, problem.itemsize)
    return Tile(power_of_2(problem.n), q, layout, align, merge_rows=1, merge_channels=1)


def resident_fits(problem: Problem) -> bool:
    """Says whether a program can hold a group of channels in its registers.

    Float64 takes twice as many registers, which a thread does not have.
    """
    if problem.itemsize == 8 or problem.n * problem.s > RESIDENT_ELEMENTS:
        return False
    tile = resident_tile(problem)
    reach = (tile.n - 1) * problem.c * problem.s + tile.q
    return tile.elements <= RESIDENT_ELEMENTS and reach < 2**31


def warps_of(tile: Tile, strategy: str) -> int:
    """Returns the warps of a program."""
    if strategy != "resident":
        return WARPS
    return min(16, max(4, tile.elements // (32 * RESIDENT_THREAD_ELEMENTS)))


def registers_of(warps: int, strategy: str) -> int:
    """Returns how many registers a thread may have for programs to fit as planned."""
    programs = 1 if strategy == "resident" else PROGRAMS_PER_SM
    return min(MAX_REGISTERS, REGISTERS // (32 * warps * programs))


def _align(extent: int, itemsize: int) -> int:
    """Returns the elements that are accessed at once where rows have this length."""
    # Kernels multiply the extent by its alignment in 32-bit arithmetic.
    return min(ACCESS_BYTES // itemsize, extent & -extent) if extent < 2**31 else 1


def _elements(problem: Problem, device: Device, align: int) -> int:
    """Returns the elements of a tile; float64 takes so many registers that it gets half."""
    most = device.tile_bytes // problem.itemsize // (2 if problem.itemsize == 8 else 1)
    return min(most, MAX_ACCESSES * 32 * WARPS * align)


def power_of_2(n: int) -> int:
    """Returns the smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()

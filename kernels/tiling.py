"""The problem as the planner sees it, and the shapes of the tiles that cut it up.

Both memory layouts are one array (N, C, S) with S contiguous: a channels-first
input is (batch, channels, positions); a channels-last input, or a matrix, is
(rows, channels, 1). A tile is a box of that array, so one kernel serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .device import Device

# Bytes of each input that one program reads at a time. 128 threads then have
# four 16-byte loads in flight each, and four programs a multiprocessor have
# 32 KiB, twice what latency times bandwidth asks for on an H100.
TILE_BYTES = 8192
WARPS = 4
PROGRAMS_PER_SM = 4

# Of an NVIDIA multiprocessor's registers, those that a thread may use for these
# programs to fit. Left to itself the compiler uses fewer, for programs that
# nothing counts on: it spills a scalar now and then, and has fewer loads in flight.
REGISTERS = 65536 // (PROGRAMS_PER_SM * WARPS * 32)

# Where an odd size narrows the accesses there are more of them, each with its
# address and mask in registers: past eight a thread, the programs no longer fit.
MAX_ACCESSES = 8

# A resident program holds a whole channel block in registers, in rows of a
# memory sector at least: 32 values to a thread, in 8 warps at most (in 16 a
# thread has but 128 registers, and odd sizes spill).
RESIDENT_ELEMENTS = 8192
RESIDENT_THREAD_ELEMENTS = 32
RESIDENT_REGISTERS = 255  # as many as a thread can have
SECTOR_BYTES = 32

# A row of a tile should be at least this long in memory: four 128-byte lines.
ROW_BYTES = 512

ACCESS_BYTES = 16

# Planes of odd sizes are flattened where their accesses would be narrower than this.
NARROW_BYTES = 8

# The forward packs eight signs into a byte along the contiguous axis.
MASK_BITS = 8


@dataclass(frozen=True)
class Problem:
    """What a batch norm call asks for, as far as a launch depends on it.

    Attributes:
        n, c, s: the input's sizes, seen as (N, C, S) with S contiguous.
        itemsize: bytes of one element of the input.
        training: statistics are those of the batch, not given ones.
        residual: another tensor is added before the activation.
        saves: what the backward needs to know of the activation's argument:
            None (it is recomputed from the input), "mask" (one bit an
            element) or "residual" (recomputed from input and residual).
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
        """Bytes of one unit of traffic: a tensor read or written once."""
        return self.n * self.c * self.s * self.itemsize


@dataclass(frozen=True)
class Tile:
    """The box (n, c, s) that one program handles at once, its warps, and its threads' registers.

    Attributes:
        align: elements of the contiguous extent come in multiples of this; if
            flat, channels do.
        flat: whole planes, those of neighbouring channels loaded and stored as
            one stretch of memory, so that odd planes have wide accesses too.
    """

    n: int
    c: int
    s: int
    align: int = 1
    flat: bool = False
    warps: int = WARPS
    registers: int = REGISTERS

    @property
    def elements(self) -> int:
        return self.n * self.c * self.s

    def access_bytes(self, itemsize: int) -> int:
        """Bytes a thread moves at once; less than 16 where an odd size is padded by mask."""
        return min(ACCESS_BYTES, self.align * itemsize)

    def grid(self, problem: Problem) -> tuple[int, int, int]:
        """How many tiles cover the problem along each axis."""
        return (-(-problem.n // self.n), -(-problem.c // self.c), -(-problem.s // self.s))

    def programs(self, problem: Problem) -> int:
        """Returns how many programs cover the problem with one tile each."""
        return prod(self.grid(problem))


def reduce_tile(problem: Problem, device: Device, reads: int, row_bytes: int = 128) -> Tile:
    """A few channels and as many rows of them as fit, for `reads` tensors side by side.

    Args:
        row_bytes: length of a row in memory, if channels are last.
    """
    align, flat = _alignment(problem, reads)
    elements = _elements(problem, device, reads)
    if problem.s == 1:
        s, c = 1, _clamp(row_bytes // problem.itemsize, problem.c, elements)
    else:
        s = _clamp(elements, problem.s, elements)
        row = max(1, ROW_BYTES // (problem.s * problem.itemsize), align if flat else 1)
        c = min(power_of_2(row), power_of_2(problem.c), elements // s)
    return _within_int32(problem, elements, c, s, align, flat)


def apply_tile(problem: Problem, device: Device, reads: int) -> Tile:
    """A stretch of memory as contiguous as can be."""
    align, flat = _alignment(problem, reads)
    elements = _elements(problem, device, reads)
    if problem.s == 1:
        s, c = 1, _clamp(256, problem.c, elements)
    else:
        s = _clamp(elements, problem.s, elements)
        # Of flattened planes no more than it takes: a thread has values of many
        # channels there, and loads the parameters of each.
        c = align if flat else min(elements // s, power_of_2(problem.c))
    return _within_int32(problem, elements, c, s, align, flat)


def resident_tile(problem: Problem) -> Tile:
    """All values of as few channels as make rows of a memory sector."""
    sector = SECTOR_BYTES // problem.itemsize
    if problem.s == 1:
        s, c = 1, max(MASK_BITS, sector)
    else:
        s = max(MASK_BITS, power_of_2(problem.s))
        c = max(1, sector // s)
    n = power_of_2(problem.n)
    warps = n * c * s // (32 * RESIDENT_THREAD_ELEMENTS)
    warps = min(8, max(WARPS, warps))
    return Tile(n, c, s, _contiguous_align(problem), warps=warps, registers=RESIDENT_REGISTERS)


def resident_fits(problem: Problem) -> bool:
    """Whether a program can hold a channel block; twice the registers for float64 are not there."""
    tile = resident_tile(problem)
    reach = tile.n * problem.c * problem.s
    return tile.elements <= RESIDENT_ELEMENTS and reach < 2**31 and problem.itemsize < 8


def _contiguous_align(problem: Problem) -> int:
    contiguous = problem.c if problem.s == 1 else problem.s
    # Kernels multiply the extent by its alignment in 32 bits.
    return min(16, contiguous & -contiguous) if contiguous < 2**31 else 1


def _alignment(problem: Problem, reads: int) -> tuple[int, bool]:
    """Of the contiguous extent, unless that is narrow and flattening planes widens it."""
    align, planes = _contiguous_align(problem), _flat_planes(problem)
    flat = (
        problem.s > 1
        and align * problem.itemsize < NARROW_BYTES
        and problem.c % (ACCESS_BYTES // problem.itemsize) == 0
        and planes <= TILE_BYTES // problem.itemsize // reads
    )
    return (ACCESS_BYTES // problem.itemsize, True) if flat else (align, False)


def _flat_planes(problem: Problem) -> int:
    """Elements of the fewest padded planes that together are aligned."""
    return ACCESS_BYTES // problem.itemsize * max(MASK_BITS, power_of_2(problem.s))


def _elements(problem: Problem, device: Device, reads: int) -> int:
    """Elements of a tile, when a program reads this many tensors side by side.

    Small problems get small tiles, two for each program that fits the device,
    down to one access a thread.
    """
    threads = 32 * WARPS
    align, flat = _alignment(problem, reads)
    most = min(TILE_BYTES // problem.itemsize // reads, MAX_ACCESSES * threads * align)
    least = _flat_planes(problem) if flat else threads * ACCESS_BYTES // problem.itemsize
    if flat and problem.residual and reads == 1:
        # A residual is rearranged as well, which takes as many registers again.
        most = max(least, most // 2)
    share = problem.n * problem.c * problem.s // (2 * PROGRAMS_PER_SM * device.sm_count)
    return min(most, max(least, 1 << share.bit_length() >> 1))


def _within_int32(problem: Problem, elements: int, c: int, s: int, align: int, flat: bool) -> Tile:
    """As many rows as fit; kernels count from a tile's first element in 32 bits."""
    n = min(elements // (c * s), power_of_2(problem.n))
    while n > 1 and n * problem.c * problem.s >= 2**31:
        n //= 2
    while c > 1 and c * problem.s >= 2**31:
        c //= 2
    return Tile(n, c, s, align, flat)


def _clamp(wanted: int, extent: int, most: int) -> int:
    """A power of two that holds whole mask bytes and is no longer than needed."""
    return max(MASK_BITS, min(power_of_2(extent), wanted, most))


def power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()

"""The problem as the planner sees it, and the shapes of the tiles that cut it up.

The kernels see both memory layouts as one array (N, C, S) with S contiguous: a
channels-first input is (batch, channels, positions), and a channels-last input or a
matrix is (rows, channels, 1). A tile is a box of that array, so one kernel serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .device import Device

# One program reads this many bytes of each input at a time. Each of its 128 threads then
# has four 16-byte loads in flight. Four programs have 32 KiB in flight on a multiprocessor,
# twice the product of latency and bandwidth on an H100.
TILE_BYTES = 8192
WARPS = 4
PROGRAMS_PER_SM = 4

# A thread may use this many registers if these programs are to fit an NVIDIA multiprocessor.
# The kernels set the number as a limit. Without one the compiler aims at more programs than
# the planner counts on, uses fewer registers, spills a scalar now and then, and keeps fewer
# loads in flight.
REGISTERS = 65536 // (PROGRAMS_PER_SM * WARPS * 32)

# An odd size narrows the accesses, so a tile takes more of them, and each needs registers
# for its address and mask. With more than eight a thread the programs would no longer fit.
MAX_ACCESSES = 8

# A resident program holds a whole channel block in registers, 32 values a thread, in rows
# of at least one memory sector. It has at most 8 warps: with 16, a thread could have only
# 128 registers, and odd sizes would spill.
RESIDENT_ELEMENTS = 8192
RESIDENT_THREAD_ELEMENTS = 32
RESIDENT_REGISTERS = 255  # the most that a thread can have
SECTOR_BYTES = 32

# A row of a tile should be at least this long in memory: four 128-byte lines.
ROW_BYTES = 512

ACCESS_BYTES = 16

# Planes of odd sizes are flattened if their accesses would be narrower than this.
NARROW_BYTES = 8

# The forward packs eight signs into a byte along the contiguous axis.
MASK_BITS = 8


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
    """The box (n, c, s) that one program handles at once, and how it does so.

    Attributes:
        n, c, s: sizes of the box, powers of two.
        align: the problem's contiguous extent is a multiple of this; if flat, its
            number of channels is.
        flat: whether the box holds whole planes, and planes of neighbouring channels
            are loaded and stored as one stretch of memory, so that odd planes have
            wide accesses too.
        warps: number of warps of a program.
        registers: the limit of registers of a thread.
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
        """Returns the bytes that a thread moves at once, fewer than 16 for odd sizes."""
        return min(ACCESS_BYTES, self.align * itemsize)

    def grid(self, problem: Problem) -> tuple[int, int, int]:
        """Returns how many tiles cover the problem along each axis."""
        return (-(-problem.n // self.n), -(-problem.c // self.c), -(-problem.s // self.s))

    def access(self, problem: Problem) -> str:
        """Says how kernels access tiles: "whole" if tiles divide the problem, "masked", "flat"."""
        divides = not (problem.n % self.n or problem.c % self.c or problem.s % self.s)
        return "flat" if self.flat else "whole" if divides else "masked"

    def programs(self, problem: Problem) -> int:
        """Returns how many programs cover the problem with one tile each."""
        return prod(self.grid(problem))


def reduce_tile(problem: Problem, device: Device, reads: int, row_bytes: int = 128) -> Tile:
    """Returns a tile of a few channels and as many of their rows as fit.

    Args:
        problem: the problem to cut up.
        device: the device to fill.
        reads: how many tensors a program reads side by side.
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
    """Returns a tile that is as contiguous in memory as possible."""
    align, flat = _alignment(problem, reads)
    elements = _elements(problem, device, reads)
    if problem.s == 1:
        s, c = 1, _clamp(256, problem.c, elements)
    else:
        s = _clamp(elements, problem.s, elements)
        # Take as few flattened planes as are aligned: a thread has values of many
        # channels there, and loads the parameters of each.
        c = align if flat else min(elements // s, power_of_2(problem.c))
    return _within_int32(problem, elements, c, s, align, flat)


def resident_tile(problem: Problem) -> Tile:
    """Returns a tile of all values of as few channels as fill a memory sector."""
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
    """Says whether a program can hold a channel block in its registers.

    Float64 takes twice as many registers, which a thread does not have.
    """
    tile = resident_tile(problem)
    reach = tile.n * problem.c * problem.s
    return tile.elements <= RESIDENT_ELEMENTS and reach < 2**31 and problem.itemsize < 8


def _contiguous_align(problem: Problem) -> int:
    contiguous = problem.c if problem.s == 1 else problem.s
    # Kernels multiply the extent by its alignment in 32-bit arithmetic.
    return min(16, contiguous & -contiguous) if contiguous < 2**31 else 1


def _alignment(problem: Problem, reads: int) -> tuple[int, bool]:
    """Returns the alignment, and whether planes are flattened because that widens accesses."""
    align, planes = _contiguous_align(problem), _flat_planes(problem)
    flat = (
        problem.s > 1
        and align * problem.itemsize < NARROW_BYTES
        and problem.c % (ACCESS_BYTES // problem.itemsize) == 0
        and planes <= TILE_BYTES // problem.itemsize // reads
    )
    return (ACCESS_BYTES // problem.itemsize, True) if flat else (align, False)


def _flat_planes(problem: Problem) -> int:
    """Returns the elements of the fewest padded planes that together are aligned."""
    return ACCESS_BYTES // problem.itemsize * max(MASK_BITS, power_of_2(problem.s))


def _elements(problem: Problem, device: Device, reads: int) -> int:
    """Returns the elements of a tile if a program reads this many tensors side by side.

    A small problem gets small tiles, so that there are two for each program that fits
    the device, but a thread always has at least one full access.
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
    """Returns a tile of as many rows as fit, and whose offsets kernels can count in 32 bits."""
    n = min(elements // (c * s), power_of_2(problem.n))
    while n > 1 and n * problem.c * problem.s >= 2**31:
        n //= 2
    while c > 1 and c * problem.s >= 2**31:
        c //= 2
    return Tile(n, c, s, align, flat)


def _clamp(wanted: int, extent: int, most: int) -> int:
    """Returns a power of two that holds whole bytes of mask and is no longer than needed."""
    return max(MASK_BITS, min(power_of_2(extent), wanted, most))


def power_of_2(n: int) -> int:
    """Returns the smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()

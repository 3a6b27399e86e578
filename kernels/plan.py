"""Every launch decision, made before a launch and held in a frozen plan.

Both memory layouts are one array (N, C, S) with S contiguous: a channels-first
input is (batch, channels, positions); a channels-last input, or a matrix, is
(rows, channels, 1). A tile is a box of that array, so one kernel serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .device import Device

# Bytes of each input that one program reads at a time. 128 threads then have
# four 16-byte loads in flight each, and four programs a multiprocessor have
# 32 KiB, twice what latency times bandwidth asks for on an H100.
TILE_BYTES = 8192
WARPS = 4
PROGRAMS_PER_SM = 4

# Where an odd size narrows the accesses there are more of them, each with its
# address and mask in registers: past eight a thread, three programs no longer fit.
MAX_ACCESSES = 8

# A program may hold a whole channel block in registers, in rows of a memory
# sector at least: 32 values to a thread, in 8 warps at most (in 16 a thread has
# but 128 registers, and odd sizes spill).
RESIDENT_ELEMENTS = 8192
RESIDENT_THREAD_ELEMENTS = 32
SECTOR_BYTES = 32

# A row of a tile should be at least this long in memory: four 128-byte lines.
ROW_BYTES = 512

# The last program to arrive merges one partial result a split, alone.
MAX_SPLITS = 1024
MERGE_ELEMENTS = 2048

ACCESS_BYTES = 16

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
    """The box (n, c, s) that one program handles at once, and its warps."""

    n: int
    c: int
    s: int
    warps: int = WARPS

    @property
    def elements(self) -> int:
        return self.n * self.c * self.s

    def grid(self, problem: Problem) -> tuple[int, int, int]:
        """How many tiles cover the problem along each axis."""
        return (-(-problem.n // self.n), -(-problem.c // self.c), -(-problem.s // self.s))


@dataclass(frozen=True)
class Pass:
    """One pass over the data in one direction: a tile, and programs to a channel block."""

    tile: Tile
    splits: int
    merge: int


@dataclass(frozen=True)
class Plan:
    """All launch decisions of one forward and its backward.

    Attributes:
        problem: what is planned for.
        strategy: "two-pass" (statistics, then normalisation), "resident" (one
            program keeps a channel block in registers in between) or "frozen"
            (given statistics: nothing to wait for).
        align: elements of the contiguous axis come in multiples of this.
        access_bytes: bytes a thread moves at once; less than 16 where the
            contiguous axis has an odd size, whose tiles are padded by mask.
        forward_reduce, backward_reduce: the passes that reduce to a channel;
            the latter is the only pass of a frozen backward. Resident kernels
            have none, nor has a frozen forward: theirs are unused.
        forward_apply, backward_apply: the tiles of the elementwise passes, or
            of the only one, but for a frozen backward.
        forward_launches, backward_launches: kernels launched, not counting
            the fill of a few counters.
        forward_units, backward_units: tensors read or written, packed masks
            counted as the fraction of a tensor that they are.
    """

    problem: Problem
    strategy: str
    align: int
    access_bytes: int
    forward_reduce: Pass
    forward_apply: Tile
    backward_reduce: Pass
    backward_apply: Tile
    forward_launches: int
    backward_launches: int
    forward_units: float
    backward_units: float


@lru_cache(maxsize=4096)
def make_plan(problem: Problem, device: Device) -> Plan:
    """Plans both directions of a problem on a device."""
    contiguous = problem.c if problem.s == 1 else problem.s
    # Kernels multiply the extent by its alignment in 32 bits.
    align = min(16, contiguous & -contiguous) if contiguous < 2**31 else 1
    forward = _elements(problem, device, align, reads=1)
    backward = _elements(problem, device, align, reads=2)
    strategy = choose_strategy(problem)
    passes = 2 if strategy == "two-pass" else 1
    forward_units, backward_units = _units(problem, passes)
    resident = _resident_tile(problem) if strategy == "resident" else None
    return Plan(
        problem=problem,
        strategy=strategy,
        align=align,
        access_bytes=min(ACCESS_BYTES, align * problem.itemsize),
        forward_reduce=_reduce(problem, device, forward),
        forward_apply=resident or _apply_tile(problem, forward),
        backward_reduce=_reduce(problem, device, backward),
        backward_apply=resident or _apply_tile(problem, backward),
        forward_launches=passes,
        backward_launches=passes,
        forward_units=forward_units,
        backward_units=backward_units,
    )


def choose_strategy(problem: Problem) -> str:
    """Frozen if the statistics are given, resident if a channel block fits registers."""
    if not problem.training:
        return "frozen"
    tile = _resident_tile(problem)
    reach = tile.n * problem.c * problem.s
    # Twice the registers that float64 takes are not there.
    fits = tile.elements <= RESIDENT_ELEMENTS and reach < 2**31 and problem.itemsize < 8
    return "resident" if fits else "two-pass"


def _resident_tile(problem: Problem) -> Tile:
    """All values of as few channels as make rows of a memory sector."""
    sector = SECTOR_BYTES // problem.itemsize
    if problem.s == 1:
        s, c = 1, max(MASK_BITS, sector)
    else:
        s = max(MASK_BITS, _power_of_2(problem.s))
        c = max(1, sector // s)
    n = _power_of_2(problem.n)
    warps = n * c * s // (32 * RESIDENT_THREAD_ELEMENTS)
    return Tile(n, c, s, warps=min(8, max(WARPS, warps)))


def _units(problem: Problem, passes: int) -> tuple[float, float]:
    mask = 1 / (MASK_BITS * problem.itemsize) if problem.saves == "mask" else 0
    forward = passes + 1 + problem.residual + mask
    reads = 2 + (problem.saves == "residual") + mask
    backward = passes * reads + 1 + (problem.saves is not None)
    return forward, backward


def _elements(problem: Problem, device: Device, align: int, reads: int) -> int:
    """Elements of a tile, when a program reads this many tensors side by side.

    Small problems get small tiles, two for each program that fits the device,
    down to one access a thread.
    """
    threads = 32 * WARPS
    most = min(TILE_BYTES // problem.itemsize // reads, MAX_ACCESSES * threads * align)
    least = min(threads * ACCESS_BYTES // problem.itemsize, most)
    share = problem.n * problem.c * problem.s // (2 * PROGRAMS_PER_SM * device.sm_count)
    return min(most, max(least, 1 << share.bit_length() >> 1))


def _reduce(problem: Problem, device: Device, elements: int) -> Pass:
    """Splits the rows of each channel block over enough programs to fill the device."""
    tile = _reduce_tile(problem, elements)
    n_tiles, channel_blocks, s_tiles = tile.grid(problem)
    tiles = n_tiles * s_tiles
    wanted = -(-PROGRAMS_PER_SM * device.sm_count // channel_blocks)
    splits = min(tiles, wanted, MAX_SPLITS)
    # Even shares: with 600 tiles, 300 programs of two each end sooner than
    # 528 programs, most of one and some of two.
    splits = -(-tiles // -(-tiles // splits))
    return Pass(tile, splits, merge=min(_power_of_2(splits), max(1, MERGE_ELEMENTS // tile.c)))


def _reduce_tile(problem: Problem, elements: int) -> Tile:
    """A few channels and as many rows of them as fit."""
    if problem.s == 1:
        s = 1
        c = _clamp(ACCESS_BYTES * MASK_BITS // problem.itemsize, problem.c, elements)
    else:
        s = _clamp(elements, problem.s, elements)
        row = max(1, ROW_BYTES // (problem.s * problem.itemsize))
        c = min(_power_of_2(row), _power_of_2(problem.c), elements // s)
    n = min(elements // (c * s), _power_of_2(problem.n))
    return _within_int32(problem, n, c, s)


def _apply_tile(problem: Problem, elements: int) -> Tile:
    """A stretch of memory as contiguous as can be."""
    if problem.s == 1:
        s = 1
        c = _clamp(256, problem.c, elements)
    else:
        s = _clamp(elements, problem.s, elements)
        c = min(elements // s, _power_of_2(problem.c))
    n = min(elements // (c * s), _power_of_2(problem.n))
    return _within_int32(problem, n, c, s)


def _within_int32(problem: Problem, n: int, c: int, s: int) -> Tile:
    """Kernels count from a tile's first element in 32 bits: it must not reach further."""
    while n > 1 and n * problem.c * problem.s >= 2**31:
        n //= 2
    while c > 1 and c * problem.s >= 2**31:
        c //= 2
    return Tile(n, c, s)


def _clamp(wanted: int, extent: int, most: int) -> int:
    """A power of two that holds whole mask bytes and is no longer than needed."""
    return max(MASK_BITS, min(_power_of_2(extent), wanted, most))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()

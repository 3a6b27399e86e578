"""Cuts a pass over the data into runs of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .device import Device
from .tiling import (
    FIXED_TILES,
    MERGES_AHEAD,
    PROGRAMS_PER_SM,
    Problem,
    Tile,
    group_width,
    plane_extent,
)

# The last program to arrive merges all partial results of a group alone, in at most so many turns.
# 31 bits must be able to count all partial results. A partial result has two float32 numbers.
MAX_MERGES = 32
MAX_PARTIALS = 2**31 - 1
PARTIAL_BYTES = 8

# Partial results are written and read once more, so their bytes may be at most this fraction
# of the bytes that they sum up.
PARTIALS_SHARE = 1 / 32

# Rounding errors of moments grow with the tiles of a run, at worst in proportion.
LONGEST_RUN = 256

# Programs may run in up to so many waves, if that makes the waves more even.
MAX_WAVES = 8


@dataclass(frozen=True)
class Pass:
    """One pass over the data.

    Attributes:
        tile: the tile that a program handles at once.
        width: number of columns of a group of channels.
        length: number of tiles of a run.
        splits: number of runs that share a column of tiles, or in the layout "planes" a channel.
    """

    tile: Tile
    width: int
    length: int
    splits: int

    def groups(self, problem: Problem) -> int:
        """Returns the number of groups of channels, each of which has a counter."""
        return -(-problem.c * problem.s // self.width)

    def tiles(self) -> int:
        """Returns how many runs lie side by side in a group."""
        return -(-self.width // self.tile.q) if self.tile.layout == "columns" else 1

    def programs(self, problem: Problem) -> int:
        """Returns the number of runs."""
        return self.groups(problem) * self.tiles() * self.splits

    def rows(self, problem: Problem) -> int:
        """Returns how many partial results each channel has at most."""
        if self.tile.layout != "columns":
            return self.splits
        return self.splits * ((problem.s + self.tile.q - 2) // self.tile.q + 1)

    def merge_seconds(self, problem: Problem, device: Device, backward: bool) -> float:
        """Returns how long the last program to arrive merges the partial results of a group.

        The program merges one part of the channels after the other, and waits for each load of
        results. In a forward the first load is of those about whose mean it merges. In a backward
        it merges two tables of sums, one after the other.
        """
        channels = 1 if self.tile.layout == "planes" else -(-self.width // problem.s)
        parts = -(-min(channels, problem.c) // self.tile.merge_channels)
        ahead = MERGES_AHEAD[backward] if self.tile.layout == "channels" else 1
        turns = -(-self.rows(problem) // (self.tile.merge_rows * ahead))
        waits = 2 * turns if backward else 1 + turns
        return parts * waits * device.cache_latency


def filling_pass(problem: Problem, device: Device, tile: Tile, least: int = 1) -> Pass:
    """Returns the pass whose runs take the least time, in few and even waves of programs.

    Runs have at least `least` tiles, as far as there are so many.
    """
    width = group_width(problem, tile)
    at_once = PROGRAMS_PER_SM * device.sm_count
    along = tiles_along(problem, tile)
    side_by_side = make_pass(problem, tile, width, along).programs(problem)
    fewest = -(-along // LONGEST_RUN)
    # For each number of waves, this is how many runs fill them.
    splits = {min(along, waves * at_once // side_by_side) for waves in range(1, MAX_WAVES + 1)}
    lengths = sorted({max(least, -(-along // max(fewest, split))) for split in splits})

    def time(found: Pass) -> int:
        waves = -(-found.programs(problem) // at_once)
        return waves * (found.length + FIXED_TILES[tile.layout])

    return min((make_pass(problem, tile, width, length) for length in lengths), key=time)


def tiles_along(problem: Problem, tile: Tile) -> int:
    """Returns how many tiles lie one after the other in the direction of a run."""
    if tile.layout == "planes":
        return -(-plane_extent(problem) // tile.q)
    return -(-problem.n // tile.n)


def least_length(problem: Problem, tile: Tile, reads: float) -> int:
    """Returns how many tiles a run needs for few enough partial results of `reads` tensors."""
    along = tiles_along(problem, tile)
    channels = min(tile.q, problem.c) if tile.layout == "channels" else 1
    summed = tile.elements * problem.itemsize * reads
    share = ceil(PARTIAL_BYTES * channels / (summed * PARTIALS_SHARE))
    across = make_pass(problem, tile, group_width(problem, tile), along).rows(problem)
    splits = max(1, min(MAX_MERGES * tile.merge_rows, MAX_PARTIALS // problem.c) // across)
    return min(along, max(share, ceil(along / splits)))


def make_pass(problem: Problem, tile: Tile, width: int, length: int) -> Pass:
    """Returns a pass whose runs have up to `length` tiles and are as even as possible."""
    along = tiles_along(problem, tile)
    splits = ceil(along / length)
    length = ceil(along / splits)
    if tile.layout == "planes":
        splits *= -(-problem.n // tile.n)
    return Pass(tile, width, length, splits)

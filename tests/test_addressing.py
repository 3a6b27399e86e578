"""Where runs of tiles lie, also past 2^31 elements, against Python's integers."""

import pytest
import torch
import triton
import triton.language as tl

from fastbn.kernels.addressing import (
    channels_of,
    find_run,
    groups_of,
    inside,
    plane_of,
    share_of,
    sizes_of,
    tiles_of_group,
)
from fastbn.kernels.tiling import MASK_BITS, MAX_WIDTH, Tile

from . import gpu_checks


@triton.jit
def locate(
    Out, Channels, Numbers, N, C, S, Q, width, length, group, tile, split, TILE: tl.constexpr
):
    """Writes each element's offset, or -1 outside the array; channels; and numbers of tiles."""
    n = tl.arange(0, TILE.n)[:, None]
    q = tl.arange(0, TILE.q)[None, :]
    sizes = sizes_of(N, C, S, Q, width, length, 1, TILE)
    run = find_run(group, tile, split, sizes, TILE)
    for i in range(0, run.tiles):
        at = run.start + i * run.step + run.offsets
        out = Out + (i * TILE.n + n) * TILE.q + q
        tl.store(out, tl.where(inside(run, i, TILE), at, -1))
    tl.store(Channels + q, channels_of(run, sizes, TILE) + 0 * q)
    tl.store(Numbers, run.tiles)
    tl.store(Numbers + 1, run.whole)
    tl.store(Numbers + 2, groups_of(sizes))
    tl.store(Numbers + 3, tiles_of_group(sizes, TILE))


def expected(n, c, s, width, length, group, tile, split, tiling):
    """The same in plain Python: offsets of the run's tiles, and channels of its columns."""
    columns = c * s
    if tiling.layout == "planes":
        along = -(-s // tiling.q)
        pieces = -(-along // length)
        row, first = split // pieces * tiling.n, split % pieces * length
        tiles = range(first, min(first + length, along))
        corners = [(row, group * s + t * tiling.q, (group + 1) * s) for t in tiles]
    else:
        along = -(-n // tiling.n)
        tiles = range(split * length, min((split + 1) * length, along))
        end = min((group + 1) * width, columns)
        corners = [(t * tiling.n, group * width + tile * tiling.q, end) for t in tiles]
    offsets = [
        [
            [i * columns + j if i < n and j < end else -1 for j in range(q0, q0 + tiling.q)]
            for i in range(n0, n0 + tiling.n)
        ]
        for n0, q0, end in corners
    ]
    first = corners[0][1]
    end = corners[0][2]
    channels = [j // s for j in range(first, min(first + tiling.q, end))]
    return offsets, channels


# (N, C, S, width of a group, tile)
CASES = [
    (3, 5, 1, 16, Tile(2, 16, "channels", 1, 1, 1)),
    (70_000, 64, 1, 16, Tile(4, 16, "channels", 8, 1, 1)),
    (2**31 + 5, 24, 1, 16, Tile(4, 16, "channels", 8, 1, 1)),
    (5, 16, 9, 72, Tile(2, 32, "columns", 8, 1, 1)),
    (5, 24, 1, 8, Tile(2, 8, "channels", 8, 1, 1)),
    (9, 40, 49, 392, Tile(4, 64, "columns", 8, 1, 1)),
    (70_000, 64, 1025, 8200, Tile(4, 32, "columns", 8, 1, 1)),
    (9, 8, MAX_WIDTH // 8 - 1, MAX_WIDTH - 8, Tile(2, 64, "columns", 8, 1, 1)),
    (3, 5, 9, 9, Tile(2, 16, "planes", 1, 1, 1)),
    (5, 3, 64, 64, Tile(1, 16, "planes", 8, 1, 1)),
    (3, 5, 2**30 + 8, 2**30 + 8, Tile(1, 64, "planes", 1, 1, 1)),
    (1, 1, 2**32 + 16, 2**32 + 16, Tile(1, 64, "planes", 1, 1, 1)),
    (5, 300_000, 12_345, 12_345, Tile(1, 64, "planes", 1, 1, 1)),
    (1, 2, 2**30 - 16, 2**30 - 16, Tile(1, 64, "planes", 8, 1, 1)),
]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(("n", "c", "s", "width", "tile"), CASES)
def test_runs(n, c, s, width, tile, length, device):
    groups = -(-c * s // width)
    columns = -(-width // tile.q) if tile.layout == "columns" else 1
    along = -(-s // tile.q) if tile.layout == "planes" else -(-n // tile.n)
    splits = -(-along // length) * (-(-n // tile.n) if tile.layout == "planes" else 1)
    for group, column, split in {
        (0, 0, 0),
        (groups // 2, columns // 2, splits // 3),
        (groups - 1, 0, splits - 1),
        (groups - 1, (c * s - (groups - 1) * width - 1) // tile.q % columns, splits - 1),
    }:
        out = torch.full((length, tile.n, tile.q), -2, dtype=torch.int64, device=device)
        channels = torch.full((tile.q,), -2, dtype=torch.int64, device=device)
        numbers = torch.full((4,), -2, dtype=torch.int64, device=device)
        locate[(1,)](
            out, channels, numbers, n, c, s, c * s // tile.align, width // tile.align, length,
            group, column, split, tile,
        )  # fmt: skip
        offsets, found = expected(n, c, s, width, length, group, column, split, tile)
        assert out[: len(offsets)].tolist() == offsets
        assert channels[: len(found)].tolist() == found
        assert channels.max() < c
        whole = sum(all(-1 not in row for row in rows) for rows in offsets)
        assert numbers.tolist() == [len(offsets), whole, groups, columns]


@triton.jit
def divide(Out, Columns, Sizes, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + i, plane_of(tl.load(Columns + i), tl.load(Sizes + i)))


def test_columns_are_divided_exactly(device):
    """The first and the last column of planes of all sizes, as far as a group may reach."""
    sizes = torch.cat([torch.arange(1, 3000), torch.arange(3000, MAX_WIDTH // 8, 101)]).int()
    last = MAX_WIDTH // sizes
    planes = torch.stack([last * 0 + 1, last // 2, last - 1, last])
    columns = torch.stack([planes * sizes - 1, planes * sizes]).clamp(max=MAX_WIDTH - 1)
    sizes = sizes.expand_as(columns)
    padding = -columns.numel() % 4096
    columns = torch.nn.functional.pad(columns.flatten(), (0, padding)).int().to(device)
    sizes = torch.nn.functional.pad(sizes.flatten(), (0, padding), value=1).int().to(device)
    out = torch.full_like(columns, -1)
    divide[(out.numel() // 4096,)](out, columns, sizes, BLOCK=4096)
    assert out.equal(columns // sizes)


@triton.jit
def share(Out, program, C, S, Q, width, TILE: tl.constexpr):
    group, tile, split = share_of(program, sizes_of(1, C, S, Q, width, 1, 1, TILE), TILE)
    tl.store(Out, group)
    tl.store(Out + 1, tile)
    tl.store(Out + 2, split)


def test_every_run_has_a_program(device):
    """Neighbouring programs lie side by side in memory."""
    found = []
    for program in range(3 * 4 * 2):
        out = torch.full((3,), -1, dtype=torch.int64, device=device)
        tile = Tile(2, 32, "columns", 8, 1, 1)
        share[(1,)](out, program, 40, 9, 360 // 8, 120 // 8, tile)
        found.append(tuple(out.tolist()))
    assert found == [(g, t, s) for s in range(2) for g in range(3) for t in range(4)]


def test_mask_bits_are_a_byte():
    assert torch.iinfo(torch.uint8).bits == MASK_BITS


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_more_than_2_31_elements(channels_last):
    gpu_checks.past_2_31(channels_last)

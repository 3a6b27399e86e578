"""Runs of tiles lie where plain Python computes that they do, also past 2^31 elements."""

import pytest
import torch
import triton
import triton.language as tl

from fastbn.kernels.addressing import (
    accessible,
    channels_of,
    find_run,
    groups_of,
    inside,
    plane_of,
    share_of,
    sizes_of,
    tiles_of_group,
    values_of,
)
from fastbn.kernels.moments import values_of_split
from fastbn.kernels.tiling import MASK_BITS, MAX_WIDTH, Tile

from . import gpu_checks


@triton.jit
def locate(
    Out, Loaded, Channels, Numbers, N, C, S, Q, width, length, group, tile, split,
    TILE: tl.constexpr,
):  # fmt: skip
    """Writes what the kernels compute of one run.

    `Out` gets the offsets of the elements that belong to the run and `Loaded` those of the elements
    that are loaded, with -1 for all others; `Channels` gets the channels of the run's columns, and
    `Numbers` the numbers of tiles and values.
    """
    n = tl.arange(0, TILE.n)[:, None]
    q = tl.arange(0, TILE.q)[None, :]
    sizes = sizes_of(N, C, S, Q, width, length, 1, TILE)
    run = find_run(group, tile, split, sizes, TILE)
    for i in range(0, run.tiles):
        at = run.start + i * run.step + run.offsets
        to = (i * TILE.n + n) * TILE.q + q
        tl.store(Out + to, tl.where(inside(run, i, TILE), at, -1))
        tl.store(Loaded + to, tl.where(accessible(run, i, TILE), at, -1))
    tl.store(Channels + q, channels_of(run, sizes, TILE) + 0 * q)
    tl.store(Numbers, run.tiles)
    tl.store(Numbers + 1, run.whole)
    tl.store(Numbers + 2, run.rest)
    tl.store(Numbers + 3, groups_of(sizes))
    tl.store(Numbers + 4, tiles_of_group(sizes, TILE))
    if TILE.layout != "flat":
        tl.store(Numbers + 5, values_of(run, run.tiles, TILE))
        tl.store(Numbers + 6, values_of_split(split, group, sizes, TILE))


def leads(n, c, s, tile):
    """Returns how many columns of the first tile lie before the plane, for up to eight channels."""
    return [g * s % tile.align for g in range(min(c, 8))]


def expected(n, c, s, width, length, group, tile, split, tiling):
    """Returns, by plain Python, the offsets of a run's tiles and the channels of its columns."""
    columns, size = c * s, tiling.q
    if tiling.layout in ("planes", "flat"):
        begin, end = group * s, (group + 1) * s
        first = begin - begin % tiling.align
        along = -(-(s + max(leads(n, c, s, tiling))) // size)
        # A corner is the row and the first column of each row of a tile.
        if tiling.layout == "flat":
            corners = [[(k // along, first + k % along * size) for k in range(tiling.n)]]
        else:
            pieces = -(-along // length)
            row, piece = split // pieces * tiling.n, split % pieces * length
            starts = range(first + piece * size, min(first + (piece + length) * size, end), size)
            corners = [[(row + i, start) for i in range(tiling.n)] for start in starts]
    else:
        along = -(-n // tiling.n)
        tiles = range(split * length, min((split + 1) * length, along))
        begin = group * width + tile * size
        end = min((group + 1) * width, columns)
        corners = [[(t * tiling.n + i, begin) for i in range(tiling.n)] for t in tiles]
    offsets = [
        [
            [i * columns + j if i < n and begin <= j < end else -1 for j in range(j0, j0 + size)]
            for i, j0 in rows
        ]
        for rows in corners
    ]
    channels = [group] if tiling.layout in ("planes", "flat") else []
    channels = channels or [j // s for j in range(begin, min(begin + size, end))]
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
    (5, 8, 49, 49, Tile(2, 16, "planes", 8, 1, 1)),
    (4, 16, 60, 60, Tile(2, 32, "planes", 8, 1, 1)),
    # Here some planes reach into a third tile, and others do not.
    (5, 8, 63, 63, Tile(2, 32, "planes", 8, 1, 1)),
    (2, 12, 13, 13, Tile(1, 8, "planes", 4, 1, 1)),
    (5, 3, 64, 64, Tile(1, 16, "planes", 8, 1, 1)),
    (3, 5, 2**30 + 8, 2**30 + 8, Tile(1, 64, "planes", 1, 1, 1)),
    (1, 8, 2**28 - 1, 2**28 - 1, Tile(1, 64, "planes", 8, 1, 1)),
    (1, 1, 2**32 + 16, 2**32 + 16, Tile(1, 64, "planes", 1, 1, 1)),
    (5, 300_000, 12_345, 12_345, Tile(1, 64, "planes", 1, 1, 1)),
    (70_000, 8, 12_345, 12_345, Tile(2, 64, "planes", 8, 1, 1)),
    (1, 2, 2**30 - 16, 2**30 - 16, Tile(1, 64, "planes", 8, 1, 1)),
    (3, 8, 49, 49, Tile(32, 8, "flat", 8, 1, 1)),
    (5, 16, 8, 8, Tile(8, 8, "flat", 8, 1, 1)),
    (4, 4, 7, 7, Tile(16, 8, "flat", 4, 1, 1)),
    (3, 5, 9, 9, Tile(8, 8, "flat", 1, 1, 1)),
]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(("n", "c", "s", "width", "tile"), CASES)
def test_runs_have_the_offsets_of_plain_python(n, c, s, width, tile, length, device):
    length = 1 if tile.layout == "flat" else length
    groups = -(-c * s // width)
    columns = -(-width // tile.q) if tile.layout == "columns" else 1
    splits = -(-n // (tile.n * length))
    if tile.layout == "planes":
        along = -(-(s + max(leads(n, c, s, tile))) // tile.q)
        splits = -(-along // length) * -(-n // tile.n)
    elif tile.layout == "flat":
        splits = 1
    for group, column, split in {
        (0, 0, 0),
        (min(1, groups - 1), 0, min(1, splits - 1)),
        (groups // 2, columns // 2, splits // 3),
        (groups - 1, 0, splits - 1),
        (groups - 1, (c * s - (groups - 1) * width - 1) // tile.q % columns, splits - 1),
    }:
        out = torch.full((length, tile.n, tile.q), -2, dtype=torch.int64, device=device)
        loaded = out.clone()
        channels = torch.full((tile.q,), -2, dtype=torch.int64, device=device)
        numbers = torch.full((7,), -2, dtype=torch.int64, device=device)
        locate[(1,)](
            out, loaded, channels, numbers, n, c, s, c * s, width, length, group, column, split,
            tile,
        )  # fmt: skip
        offsets, found = expected(n, c, s, width, length, group, column, split, tile)
        tiles, first, rest, *others = numbers.tolist()
        # A run may begin behind the end of its plane: it has at most one tile, with nothing inside.
        offsets += [[[-1] * tile.q] * tile.n] * (tiles - len(offsets))
        assert out[:tiles].tolist() == offsets
        assert channels[: len(found)].tolist() == found
        assert channels.max() < c
        assert others[:2] == [groups, columns]
        whole = [all(-1 not in row for row in rows) for rows in offsets]
        assert whole == [first <= i < rest for i in range(tiles)]
        if tile.layout != "flat":
            values = sum(at >= 0 for rows in offsets for row in rows for at in row)
            each = len({at % (c * s) for rows in offsets for row in rows for at in row if at >= 0})
            each = 1 if tile.layout == "planes" else max(each, 1)
            assert others[2:] == [values // each] * 2
        # All that is inside is loaded, in whole accesses, none of which reaches past the array.
        own, loaded = out[:tiles], loaded[:tiles]
        assert ((loaded == own) | (own == -1)).all()
        assert ((loaded >= -1) & (loaded < n * c * s)).all()
        pieces = loaded.view(-1, tile.align)
        assert ((pieces >= 0).all(1) | (pieces == -1).all(1)).all()
        assert (pieces[:, 0][pieces[:, 0] >= 0] % tile.align == 0).all()


@triton.jit
def divide(Out, Columns, Sizes, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + i, plane_of(tl.load(Columns + i), tl.load(Sizes + i)))


def test_columns_are_divided_exactly(device):
    """Looks at the first and the last column of planes, up to the widest group that there is."""
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
    """Checks the order too: neighbouring programs read neighbouring memory."""
    found = []
    for program in range(3 * 4 * 2):
        out = torch.full((3,), -1, dtype=torch.int64, device=device)
        tile = Tile(2, 32, "columns", 8, 1, 1)
        share[(1,)](out, program, 40, 9, 360, 120, tile)
        found.append(tuple(out.tolist()))
    assert found == [(g, t, s) for s in range(2) for g in range(3) for t in range(4)]


def test_mask_bits_are_a_byte():
    assert torch.iinfo(torch.uint8).bits == MASK_BITS


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_tensors_of_more_than_2_31_elements_are_right(channels_last):
    gpu_checks.past_2_31(channels_last)

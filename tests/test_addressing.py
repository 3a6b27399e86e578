"""Addresses, also past 2^31 elements, against Python's integers."""

import pytest
import torch
import triton
import triton.language as tl

from fastbn.kernels.addressing import box, extents, position
from fastbn.kernels.device import H100
from fastbn.kernels.tiling import MASK_BITS, Problem, apply_tile

from . import gpu_checks


@triton.jit
def locate(
    Out, N, C, S, tile, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes each element's offset, or -1 outside the array."""
    C, S = extents(C, S, ALIGN, False, BLOCK_S)
    n0, c0, s0 = position(tile, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    start, offsets, mask = box(N, C, S, n0, c0, s0, BLOCK_N, BLOCK_C, BLOCK_S)
    n = tl.arange(0, BLOCK_N)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    tl.store(Out + (n * BLOCK_C + c) * BLOCK_S + s, tl.where(mask, start + offsets, -1))


def expected(n, c, s, tile, block):
    """The same in plain Python."""
    bn, bc, bs = block
    s_tiles, c_tiles = -(-s // bs), -(-c // bc)
    n0, c0 = tile // (s_tiles * c_tiles) * bn, tile // s_tiles % c_tiles * bc
    s0 = tile % s_tiles * bs
    return [
        [
            [(i * c + j) * s + k if i < n and j < c and k < s else -1 for k in range(s0, s0 + bs)]
            for j in range(c0, c0 + bc)
        ]
        for i in range(n0, n0 + bn)
    ]


@pytest.mark.parametrize(
    ("n", "c", "s"),
    [
        (3, 5, 9),
        (2, 4, 16),
        (70_000, 64, 1024),
        (3, 5, 2**30 + 8),
        (2**31 // 40, 7, 24),
        (1, 1, 2**32 + 16),
        (5, 300_000, 12_345),
        (1, 2, 2**31 - 16),
    ],
)
def test_offsets(n, c, s, device):
    # Elements of 64 bytes, for small tiles: the planner shapes them by reach all the same.
    tiled = apply_tile(Problem(n, c, s, itemsize=64), H100, reads=1)
    block = bn, bc, bs = (tiled.n, tiled.c, tiled.s)
    tiles = -(-n // bn) * -(-c // bc) * -(-s // bs)
    align = tiled.align
    for tile in {0, tiles // 3, tiles // 2, max(0, tiles - 2), tiles - 1}:
        out = torch.full(block, -2, dtype=torch.int64, device=device)
        locate[(1,)](out, n, c, s // align, tile, align, *block)
        assert out.tolist() == expected(n, c, s, tile, block), tile


def test_mask_bits_are_a_byte():
    assert torch.iinfo(torch.uint8).bits == MASK_BITS


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_more_than_2_31_elements(channels_last):
    gpu_checks.past_2_31(channels_last)

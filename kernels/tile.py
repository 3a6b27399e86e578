"""Address arithmetic: where a tile of the (N, C, S) array lies in memory."""

import triton
import triton.language as tl


@triton.jit
def extents(C, S, ALIGN: tl.constexpr, BLOCK_S: tl.constexpr):
    """C and S, of which the contiguous one was passed in units of ALIGN.

    The compiler then knows the extent to be a multiple of ALIGN, and with it
    that rows start aligned: that is what makes accesses 16 bytes wide.
    """
    if BLOCK_S == 1:
        return C * ALIGN, S
    else:
        return C, S * ALIGN


@triton.jit
def blocks_of(extent, BLOCK: tl.constexpr):
    """How many blocks cover an extent; `tl.cdiv` overflows just below 2^31."""
    return (extent - 1) // BLOCK + 1


@triton.jit
def box(N, C, S, n0, c0, s0, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The tile whose first element is (n0, c0, s0).

    Returns its start as a 64-bit scalar, the offsets from there as a
    (BLOCK_N, BLOCK_C, BLOCK_S) block of 32 bits (the planner sees to it that
    they fit), and the mask of the elements inside the array.
    """
    start = (tl.cast(n0, tl.int64) * C + c0) * S + s0
    n = tl.arange(0, BLOCK_N)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    offsets = (n * C + c) * S + s
    mask = (n < N - n0) & (c < C - c0) & (s < S - s0)
    return start, offsets, mask


@triton.jit
def position(tile, N, C, S, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """First element (n0, c0, s0) of a tile, tiles numbered in the order of memory."""
    s_tiles = blocks_of(S, BLOCK_S)
    c_tiles = blocks_of(C, BLOCK_C)
    n0 = tl.cast(tile // (s_tiles * c_tiles), tl.int64) * BLOCK_N
    c0 = tile // s_tiles % c_tiles * BLOCK_C
    s0 = tl.cast(tile % s_tiles, tl.int64) * BLOCK_S
    return n0, c0, s0


@triton.jit
def per_channel(P, c0, C, acc: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads one value a channel, shaped to broadcast against a tile."""
    c = c0 + tl.arange(0, BLOCK_C)
    return tl.load(P + c, c < C, other=0.0).to(acc)[None, :, None]

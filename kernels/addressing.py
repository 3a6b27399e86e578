"""Address arithmetic, which says where a tile of the (N, C, S) array lies in memory."""

import triton
import triton.language as tl


@triton.jit
def extents(C, S, ALIGN: tl.constexpr, ACCESS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns C and S. C, if S is 1 or planes are flat, or else S is passed in units of ALIGN.

    The compiler then knows that the extent is a multiple of ALIGN and that rows start
    aligned, and so makes accesses up to 16 bytes wide.
    """
    if BLOCK_S == 1 or ACCESS == "flat":
        return C * ALIGN, S
    else:
        return C, S * ALIGN


@triton.jit
def blocks_of(extent, BLOCK):
    """Returns how many blocks cover an extent; `tl.cdiv` would overflow just below 2^31."""
    return (extent - 1) // BLOCK + 1


@triton.jit
def box(N, C, S, n0, c0, s0, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Locates the tile whose first element is (n0, c0, s0).

    Returns the start of the tile as a 64-bit scalar, the offsets from the start as a
    (BLOCK_N, BLOCK_C, BLOCK_S) block of 32 bits, and the mask of the elements inside the
    array. The planner makes tiles small enough for 32 bits.
    """
    start = (tl.cast(n0, tl.int64) * C + c0) * S + s0
    n = tl.arange(0, BLOCK_N)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    offsets = (n * C + c) * S + s
    mask = (n < N - n0) & (c < C - c0) & (s < S - s0)
    return start, offsets, mask


@triton.jit
def flat_box(N, C, S, n0, c0, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Locates whole planes as they lie in memory, with neighbouring channels back to back.

    Returns what `box` returns, but offsets and mask are (BLOCK_N, BLOCK_C * BLOCK_S)
    blocks, of which no more than BLOCK_C * S columns are inside.
    """
    start = (tl.cast(n0, tl.int64) * C + c0) * S
    n = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_C * BLOCK_S)[None, :]
    mask = (n < N - n0) & (column < tl.minimum(BLOCK_C, C - c0) * S)
    return start, n * C * S + column, mask


@triton.jit
def rearrange(x, columns, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Reorders each row of a (BLOCK_N, WIDTH) block: column columns[j] becomes column j.

    The block is gathered as one vector. To gather within single rows, Triton would shuffle
    between threads, 32 steps for each value; through shared memory it takes one step.
    """
    rows = tl.arange(0, BLOCK_N)[:, None] * WIDTH
    index = tl.reshape(rows + columns[None, :], (BLOCK_N * WIDTH,))
    return tl.gather(tl.reshape(x, (BLOCK_N * WIDTH,)), index, 0)


@triton.jit
def load_tile(
    P, N, C, S, n0, c0, s0, ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Loads the tile at (n0, c0, s0), zero outside the array.

    ACCESS says how: "whole" tiles divide the array and need no mask, "masked" ones may reach
    over its edge, and "flat" ones hold whole planes, so that s0 is 0 and BLOCK_S >= S.
    """
    if ACCESS == "flat":
        WIDTH: tl.constexpr = BLOCK_C * BLOCK_S
        start, offsets, inside = flat_box(N, C, S, n0, c0, BLOCK_N, BLOCK_C, BLOCK_S)
        flat = tl.load(P + start + offsets, inside, other=0.0, eviction_policy=EVICTION)
        column = tl.arange(0, WIDTH)
        padded = rearrange(flat, column // BLOCK_S * S + column % BLOCK_S, BLOCK_N, WIDTH)
        x = tl.reshape(padded, (BLOCK_N, BLOCK_C, BLOCK_S))
        return tl.where(tl.arange(0, BLOCK_S)[None, None, :] < S, x, 0.0)
    start, offsets, inside = box(N, C, S, n0, c0, s0, BLOCK_N, BLOCK_C, BLOCK_S)
    if ACCESS == "whole":
        return tl.load(P + start + offsets, eviction_policy=EVICTION)
    return tl.load(P + start + offsets, inside, other=0.0, eviction_policy=EVICTION)


@triton.jit
def load_values(
    P, N, C, S, n0, c0, s0, ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Does what `load_tile` does, but leaves flattened planes as (BLOCK_N, columns, 1) blocks."""
    if ACCESS == "flat":
        start, offsets, inside = flat_box(N, C, S, n0, c0, BLOCK_N, BLOCK_C, BLOCK_S)
        x = tl.load(P + start + offsets, inside, other=0.0, eviction_policy=EVICTION)
        return tl.reshape(x, (BLOCK_N, BLOCK_C * BLOCK_S, 1))
    else:
        return load_tile(P, N, C, S, n0, c0, s0, ACCESS, EVICTION, BLOCK_N, BLOCK_C, BLOCK_S)


@triton.jit
def values_inside(
    N, C, S, n0, c0, s0, ACCESS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Says which elements of a block that `load_values` returns are inside the array."""
    if ACCESS == "flat":
        _, _, inside = flat_box(N, C, S, n0, c0, BLOCK_N, BLOCK_C, BLOCK_S)
        return tl.reshape(inside, (BLOCK_N, BLOCK_C * BLOCK_S, 1))
    else:
        _, _, inside = box(N, C, S, n0, c0, s0, BLOCK_N, BLOCK_C, BLOCK_S)
        return inside


@triton.jit
def store_tile(
    P, x, N, C, S, n0, c0, s0, ACCESS: tl.constexpr, EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores a tile where `load_tile` would load it."""
    x = x.to(P.dtype.element_ty)
    if ACCESS == "flat":
        WIDTH: tl.constexpr = BLOCK_C * BLOCK_S
        start, offsets, inside = flat_box(N, C, S, n0, c0, BLOCK_N, BLOCK_C, BLOCK_S)
        column = tl.arange(0, WIDTH)
        source = tl.minimum(column // S * BLOCK_S + column % S, WIDTH - 1)
        flat = rearrange(x, source, BLOCK_N, WIDTH)
        flat = tl.reshape(flat, (BLOCK_N, WIDTH))
        tl.store(P + start + offsets, flat, inside, eviction_policy=EVICTION)
    else:
        start, offsets, inside = box(N, C, S, n0, c0, s0, BLOCK_N, BLOCK_C, BLOCK_S)
        if ACCESS == "whole":
            tl.store(P + start + offsets, x, eviction_policy=EVICTION)
        else:
            tl.store(P + start + offsets, x, inside, eviction_policy=EVICTION)


@triton.jit
def position(tile, N, C, S, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns a tile's first element (n0, c0, s0); tiles are numbered in the order of memory."""
    s_tiles = blocks_of(S, BLOCK_S)
    c_tiles = blocks_of(C, BLOCK_C)
    n0 = tl.cast(tile // (s_tiles * c_tiles), tl.int64) * BLOCK_N
    c0 = tile // s_tiles % c_tiles * BLOCK_C
    s0 = tl.cast(tile % s_tiles, tl.int64) * BLOCK_S
    return n0, c0, s0


@triton.jit
def tiles_of_block(N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns how many tiles a channel block has."""
    return blocks_of(N, BLOCK_N) * blocks_of(S, BLOCK_S)


@triton.jit
def tile_numbers(tile, S, BLOCK_S: tl.constexpr):
    """Splits the number of a channel block's tile into its numbers along N and along S.

    A number of tiles to advance by is split in the same way.
    """
    if BLOCK_S == 1:
        # S is 1 too. With the constant 0 the compiler still knows how rows are aligned.
        return tile, 0
    else:
        s_tiles = blocks_of(S, BLOCK_S)
        return tile // s_tiles, tile % s_tiles


@triton.jit
def advance(n_tile, s_tile, n_step, s_step, S, BLOCK_S: tl.constexpr):
    """Returns the numbers of the tile that lies a step further on, without a division."""
    if BLOCK_S == 1:
        return n_tile + n_step, 0
    else:
        s_tiles = blocks_of(S, BLOCK_S)
        s_tile += s_step
        wraps = s_tile >= s_tiles
        return n_tile + n_step + wraps.to(tl.int32), tl.where(wraps, s_tile - s_tiles, s_tile)


@triton.jit
def corner(n_tile, s_tile, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns (n0, s0), where a tile of these numbers begins."""
    return tl.cast(n_tile, tl.int64) * BLOCK_N, tl.cast(s_tile, tl.int64) * BLOCK_S


@triton.jit
def per_channel(P, c0, C, acc: tl.constexpr, BLOCK_C: tl.constexpr, CACHE: tl.constexpr):
    """Loads one value a channel, shaped to broadcast against a tile.

    With CACHE ".cg" the load passes by the first-level cache, as it must for values that
    other multiprocessors stored in this launch.
    """
    c = c0 + tl.arange(0, BLOCK_C)
    return tl.load(P + c, c < C, other=0.0, cache_modifier=CACHE).to(acc)[None, :, None]

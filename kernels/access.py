"""Loads and stores tiles, and loads values of channels.

`addressing.py` says where tiles lie, and which elements are a tile's own.
"""

import triton
import triton.language as tl

from .addressing import accessible, inside


@triton.jit
def address_of(P, run, i, TILE: tl.constexpr):
    """Returns where the elements of the run's i-th tile lie."""
    if TILE.layout == "channels" or TILE.layout == "columns":
        # The compiler moves the sum in the inner parentheses out of a loop over tiles.
        return (P + (run.start + run.offsets)) + i * run.step
    else:
        # Here the step is a constant, and sums moved out would take registers.
        return P + (run.start + i * run.step) + run.offsets


@triton.jit
def load_tile(P, run, i, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Loads the run's i-th tile; what is not its own is zero or another channel's value."""
    at = address_of(P, run, i, TILE)
    if MASKED:
        return tl.load(at, accessible(run, i, TILE), other=0.0, eviction_policy=EVICTION)
    else:
        return tl.load(at, eviction_policy=EVICTION)


@triton.jit
def load_whole(P, run, i, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Loads the run's i-th tile, or nothing if the whole tiles end before it.

    The load has one predicate for all elements instead of a branch, across which the compiler
    would not move it.
    """
    at = address_of(P, run, i, TILE)
    return tl.load(at, tl.full(at.shape, i < run.rest, tl.int1), eviction_policy=EVICTION)


@triton.jit
def store_tile(P, x, run, i, MASKED: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Stores the elements of the run's i-th tile that are its own."""
    at = address_of(P, run, i, TILE)
    x = x.to(P.dtype.element_ty)
    if MASKED:
        if TILE.layout == "channels" or TILE.layout == "columns":
            tl.store(at, x, accessible(run, i, TILE), eviction_policy=EVICTION)
        else:
            # If a thread's access may reach into another channel, store element by element. There
            # are two `if`s, since the compiler would make one narrow store of `if` and `else`.
            beyond = (run.lead | run.columns) % TILE.align
            if beyond == 0:
                tl.store(at, x, accessible(run, i, TILE), eviction_policy=EVICTION)
            if beyond != 0:
                tl.store(at, x, inside(run, i, TILE), eviction_policy=EVICTION)
    else:
        tl.store(at, x, eviction_policy=EVICTION)


@triton.jit
def centre(x, about, run, i, TILE: tl.constexpr):
    """Returns x - about of the run's i-th tile, and zero for elements that are not its own."""
    return tl.where(inside(run, i, TILE), x.to(about.dtype) - about, 0.0)


@triton.jit
def per_channel(P, channels, acc: tl.constexpr, CACHE: tl.constexpr):
    """Loads one value a channel.

    With CACHE ".cg" the load bypasses the first-level cache, as it must for values that
    other multiprocessors stored in this launch.
    """
    return tl.load(P + channels, cache_modifier=CACHE).to(acc)

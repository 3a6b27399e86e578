"""Tickets are how programs of one launch hand work to each other.

A ticketed launch has as many programs as the device holds at once, and each draws tickets
until there are no more. Channels are cut into slices that fit the L2 cache, and tickets are
ordered so that two slices are in the cache at a time:

    reduce(0)  reduce(1) apply(0)  reduce(2) apply(1)  ...  apply(last)

where reduce(i) and apply(i) are one ticket for each run of slice i. A ticket to apply waits for the
flag of its group of channels. The last of the group's tickets to reduce raises the flag.

Invariant: a ticket waits only for lower ones. Numbers are drawn from a counter
by programs that already run, so whatever a ticket waits for is done or held by a running
program. The lowest unfinished ticket hence never waits, and finishes: there is
no deadlock, however few programs the device holds at once and in whatever order
it starts them.

No counter has to be reset between launches. At the end each program draws a ticket without work.
The last one to do so sets the counter of tickets to the next generation, and the last program to
arrive sets the counter of arrivals to zero. A flag is raised if it holds the generation of this
launch, so flags of earlier launches don't count.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import current_target


@triton.jit
def draw_ticket(Tickets, total):
    """Draws the next ticket; returns it and the launch's generation, halves of a 64-bit word."""
    word = tl.atomic_add(Tickets, 1, sem="relaxed")
    ticket = tl.cast(word & 0xFFFFFFFF, tl.int32)
    generation = (word >> 32) + 1
    if ticket == total + tl.num_programs(0) - 1:
        tl.store(Tickets, generation << 32)
    return ticket, tl.cast(generation, tl.int32)


@triton.jit
def work_of(ticket, slices, slice_groups, tiles, splits):
    """Returns whether a ticket applies, and its group, column of tiles and split.

    Neighbouring tickets go to neighbouring groups. The last slice may have fewer groups
    than the others, and some of its tickets then get a group past the last one.
    """
    phase = slice_groups * tiles * splits
    step = ticket // phase
    rest = ticket - step * phase
    applies = (step > 0) & ((step % 2 == 0) | (step == 2 * slices - 1))
    slice = (step + 1) // 2 - applies
    column = rest // slice_groups
    split = column // tiles
    group = slice * slice_groups + rest - column * slice_groups
    return applies, group, column - split * tiles, split


@triton.constexpr_function
def store_wait():
    """Returns AMD's instruction by which a wave waits for its own stores; elsewhere None.

    The tests compile it for gfx942 only.
    """
    target = current_target()
    if knobs.runtime.interpret or target is None or target.backend != "hip":
        return None
    if target.arch.startswith("gfx9"):
        return "s_waitcnt vmcnt(0)"
    return "s_wait_storecnt 0x0" if target.arch.startswith("gfx12") else "s_waitcnt_vscnt null, 0x0"


@triton.jit
def wait_for_own_stores():
    """Makes each wave wait for its own stores, if another wave's release does not cover them."""
    wait: tl.constexpr = store_wait()
    if wait is not None:
        assembly: tl.constexpr = wait + "\nv_mov_b32 $0, $1"  # Triton demands a result, so move one
        lanes = tl.arange(0, 64)
        tl.inline_asm_elementwise(assembly, "=v,v", [lanes], tl.int32, is_pure=False, pack=1)


@triton.jit
def last_to_arrive(Arrivals, programs):
    """Says whether this program is the last of so many to arrive.

    All threads' stores come before the barrier, and the barrier comes before the release.
    So the program that arrives last, and acquires, sees every partial result.
    """
    wait_for_own_stores()
    tl.debug_barrier()
    last = tl.atomic_add(Arrivals, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(Arrivals, 0)
    return last


@triton.jit
def raise_flag(Flag, generation):
    """Raises the flag after all threads' stores."""
    wait_for_own_stores()
    tl.debug_barrier()
    tl.atomic_xchg(Flag, tl.cast(generation, tl.int64), sem="release")


@triton.jit
def wait_for_flag(Flag, generation):
    """Waits; a program that returns from here sees what was stored before the flag was raised."""
    while tl.cast(tl.atomic_add(Flag, 0, sem="acquire"), tl.int32) != generation:
        pass

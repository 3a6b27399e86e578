"""The instructions that the kernels execute, as counted in machine code for an H100.

The counts are of ticketed kernels for bfloat16 and ReLU. `python -m tests.compile_kernels --targets
sm_90` prints them, and a test compares them with this table.
"""

from __future__ import annotations

from .tiling import ACCESS_BYTES, WARPS, Problem, Tile

# For each phase and layout of tiles, these are the instructions of a thread for each element in
# the loop over tiles, and for each run outside of that loop.
INSTRUCTIONS = {
    ("moments", "planes"): (6.3, 720),
    ("moments", "channels"): (6.3, 710),
    ("moments", "columns"): (6.3, 1280),
    ("output", "planes"): (6.7, 440),
    ("output", "channels"): (6.2, 320),
    ("output", "columns"): (6.2, 460),
    ("sums", "planes"): (9.9, 540),
    ("sums", "channels"): (10.2, 560),
    ("sums", "columns"): (10.2, 850),
    ("gradient", "planes"): (10.9, 370),
    ("gradient", "channels"): (11.0, 370),
    ("gradient", "columns"): (11.0, 490),
}

# A residual adds so many instructions for each element to these loops.
RESIDUAL = {"output": 5.6, "gradient": 0.6}

# Accesses of half the width are assumed to add so many instructions to each element.
NARROW = 2.0


def loop_instructions(phase: str, problem: Problem, tile: Tile) -> float:
    """Returns the instructions of a phase's loop for each element."""
    loop, _ = INSTRUCTIONS[phase, tile.layout]
    narrow = NARROW * (ACCESS_BYTES / tile.access_bytes(problem.itemsize) - 1)
    return loop + problem.residual * RESIDUAL.get(phase, 0.0) + narrow


def fixed_instructions(phase: str, tile: Tile) -> float:
    """Returns the instructions of all threads that a run takes outside of a phase's loop."""
    return INSTRUCTIONS[phase, tile.layout][1] * 32 * WARPS

"""How many instructions the kernels take, as counted in machine code for an H100.

Counted for bfloat16 and ReLU in ticketed kernels; `python -m tests.compile_kernels --targets
sm_90` counts them, and a test compares them with this table.
"""

from __future__ import annotations

from .tiling import WARPS, Tile

# By phase and layout of tiles: instructions of a thread for each element in the loop over
# tiles, and for each run outside of it.
INSTRUCTIONS = {
    ("moments", "planes"): (6.3, 950),
    ("moments", "channels"): (6.3, 820),
    ("moments", "columns"): (6.3, 1560),
    ("output", "planes"): (6.5, 440),
    ("output", "channels"): (6.6, 400),
    ("output", "columns"): (6.6, 450),
    ("sums", "planes"): (10.0, 530),
    ("sums", "channels"): (10.6, 600),
    ("sums", "columns"): (10.6, 960),
    ("gradient", "planes"): (10.9, 370),
    ("gradient", "channels"): (11.7, 380),
    ("gradient", "columns"): (11.7, 460),
}

# What a residual adds to the loops of output and gradient.
RESIDUAL = {"output": 6.0, "gradient": 0.6}


def instructions_per_element(phase: str, tile: Tile, length: int, residual: bool = False) -> float:
    """Returns the instructions of a phase for each element, in runs of so many tiles."""
    loop, fixed = INSTRUCTIONS[phase, tile.layout]
    run = length * tile.elements / (32 * WARPS)
    return loop + residual * RESIDUAL.get(phase, 0.0) + fixed / run

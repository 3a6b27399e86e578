"""How many instructions the kernels take, as counted in machine code for an H100.

Counted for bfloat16 and ReLU in ticketed kernels; `python -m tests.compile_kernels --targets
sm_90` counts them, and a test compares them with this table.
"""

from __future__ import annotations

from .tiling import WARPS, Tile

# By phase and layout of tiles: instructions of a thread for each element in the loop over
# tiles, and for each run outside of it.
INSTRUCTIONS = {
    ("moments", "planes"): (5.9, 870),
    ("moments", "channels"): (6.0, 1050),
    ("moments", "columns"): (5.9, 1760),
    ("output", "planes"): (6.0, 350),
    ("output", "channels"): (6.6, 370),
    ("output", "columns"): (6.6, 450),
    ("sums", "planes"): (9.9, 475),
    ("sums", "channels"): (10.6, 570),
    ("sums", "columns"): (10.6, 980),
    ("gradient", "planes"): (10.7, 290),
    ("gradient", "channels"): (11.7, 380),
    ("gradient", "columns"): (11.7, 440),
}

# What a residual adds to the loops of output and gradient.
RESIDUAL = {"output": 6.0, "gradient": 0.6}


def instructions_per_element(phase: str, tile: Tile, length: int, residual: bool = False) -> float:
    """Returns the instructions of a phase for each element, in runs of so many tiles."""
    loop, fixed = INSTRUCTIONS[phase, tile.layout]
    run = length * tile.elements / (32 * WARPS)
    return loop + residual * RESIDUAL.get(phase, 0.0) + fixed / run

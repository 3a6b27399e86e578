"""`pytest benchmarks/test_host_overhead.py --benchmark-only` times what a call costs the host.

The time ends at Triton's launcher: launches do nothing here, so that any machine can measure it,
with tensors in any memory. The problem is small, with one resident launch in each direction.
PyTorch's own modules are timed for comparison. On a CPU their time includes computing a few values.
"""

import pytest
import torch
from triton import knobs

from .host import DIRECTIONS, LAYERS, call_of, no_launches, one_thread

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.benchmark(min_rounds=200, warmup=True, warmup_iterations=2000)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_host_overhead(layer, direction, benchmark):
    if knobs.runtime.interpret:
        pytest.skip("with TRITON_INTERPRET=1 there is no dispatch to measure")
    benchmark.group = f"host, {direction}"
    with one_thread(), no_launches():
        benchmark(call_of(layer, direction, DEVICE))

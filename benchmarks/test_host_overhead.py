"""`pytest benchmarks/test_host_overhead.py --benchmark-only`: what a call costs the host.

Up to Triton's launcher: the launch itself does nothing here, so that any machine
can measure it, with tensors in any memory. The problem is a small one, of one
resident launch each way. PyTorch's own modules stand beside it; theirs includes,
on a CPU, computing a few values.
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

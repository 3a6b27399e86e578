"""`pytest benchmarks/test_keras.py --benchmark-only`: Keras's layer and fastbn's side by side."""

import pytest
import torch

pytest.importorskip("keras")

from .keras_layers import LAYERS, SHAPES, call_of
from .test_batch_norm import WHERE, synchronised


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keras(shape, layer, benchmark):
    benchmark.group = f"{WHERE}Keras layers, forward+backward, {shape}"
    call, expected = (call_of(name, shape) for name in (layer, "keras"))
    torch.testing.assert_close(call(), expected(), rtol=1e-3, atol=1e-2)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)

"""`pytest benchmarks/test_keras.py --benchmark-only` compares Keras's layer with fastbn's."""

import pytest
import torch

from .test_batch_norm import WHERE, synchronised

layers = pytest.importorskip("benchmarks.keras_layers", reason="Keras is not installed")


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("layer", layers.LAYERS)
@pytest.mark.parametrize("shape", layers.SHAPES, ids=str)
def test_keras(shape, layer, benchmark):
    benchmark.group = f"{WHERE}Keras layers, forward+backward, {shape}"
    call, expected = (layers.call_of(name, shape) for name in (layer, "keras"))
    torch.testing.assert_close(call(), expected(), rtol=1e-3, atol=1e-2)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)

"""`python -m benchmarks.keras_layers` times Keras's batch norm and fastbn's in one process.

It times the forward and backward of either layer in turn, as a model calls them, on the device that
Keras chooses. On a CPU PyTorch computes fastbn's batch norm too, so that Keras's elementwise
operations are compared with one operator.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch

from fastbn.keras import BatchNormalization

from .environment import environment, title
from .timing import clock_of

# The sizes of inputs of batch norms in networks, with channels last as Keras has them.
SHAPES = ((32, 56, 56, 64), (128, 32, 32, 32), (128, 16, 16, 64), (1024, 512))
LAYERS = {"keras": keras.layers.BatchNormalization, "fastbn": BatchNormalization}
ROUNDS = 15


def call_of(name: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """Returns a function that takes a training step: a forward, and all gradients."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    layer.build(shape)
    device = layer.gamma.value.device
    x, dy = torch.randn(2, *shape, device=device)
    x.requires_grad_()
    leaves = [x, layer.gamma.value, layer.beta.value]
    return lambda: torch.autograd.grad(layer(x, training=True), leaves, dy)


def times(shape: tuple[int, ...], rounds: int = ROUNDS) -> dict[str, float]:
    """Returns each layer's median seconds of a step; the layers take turns."""
    calls = {name: call_of(name, shape) for name in LAYERS}
    clock = clock_of(keras.ops.zeros(1).device)
    laps: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            ticking = clock()
            ticking.mark()
            call()
            ticking.mark()
            laps[name] += ticking.laps()
    return {name: statistics.median(found) for name, found in laps.items()}


def main() -> None:
    found = environment(keras.ops.zeros(1).device)
    print(f"{title(found)}, {found['cpu_threads']} CPU threads, Keras {keras.__version__}")
    print("Forward and backward in float32, milliseconds, medians\n")
    print("| input | Keras | fastbn | Keras / fastbn |\n|---|---|---|---|")
    for shape in SHAPES:
        keras_ms, fastbn_ms = (1e3 * seconds for seconds in times(shape).values())
        print(f"| {shape} | {keras_ms:.2f} | {fastbn_ms:.2f} | {keras_ms / fastbn_ms:.1f} |")


if __name__ == "__main__":
    main()

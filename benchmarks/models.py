"""Shows what `fastbn.fuse` makes of well-known networks.

    python -m benchmarks.models [NETWORK ...] [--size PIXELS] [--compile]

It prints a table with a line for each network. A line has the numbers of norms that have an
activation of their own, that are fused with an activation, with an addition and an activation, or
with an addition alone, and that are plain; the numbers of such calls in a forward; the largest
differences of outputs and gradients from those of the unfused network, on PyTorch's path; and how
many bytes fewer a training step of the norms reads and writes, by counting. With --compile it also
has the number of graphs that `torch.compile` makes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn as nn
import torchvision
from torch import Tensor

import fastbn
from fastbn import explain, fuse

KINDS = ("own act", "act", "add+act", "add", "plain")


@dataclass(frozen=True)
class Network:
    """A network's name, a function that makes it, and its numbers of norms by the KINDS."""

    name: str
    make: Callable[[], nn.Module]
    norms: tuple[int, int, int, int, int]
    shape: tuple[int, ...] = (3, 64, 64)


def _torchvision(name: str, norms: tuple, shape: tuple = (3, 64, 64), **options) -> Network:
    def make() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, **options)

    return Network(name, make, norms, shape)


def _timm(name: str, norms: tuple) -> Network:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name)

    return Network(f"timm {name}", make, norms)


NETWORKS = [
    _torchvision("resnet18", (0, 9, 8, 0, 3)),
    _torchvision("resnet50", (0, 33, 16, 0, 4)),
    _torchvision("mobilenet_v2", (0, 35, 0, 10, 7)),
    _torchvision("mobilenet_v3_large", (0, 31, 0, 10, 5)),
    _torchvision("efficientnet_b0", (0, 33, 0, 0, 16)),
    _torchvision("densenet121", (0, 121, 0, 0, 0)),
    _torchvision("googlenet", (0, 59, 0, 0, 0), init_weights=False),
    _torchvision("inception_v3", (0, 96, 0, 0, 0), (3, 299, 299), init_weights=False),
    _torchvision("shufflenet_v2_x1_0", (0, 37, 0, 0, 19)),
    _torchvision("regnet_y_400mf", (0, 33, 16, 0, 4)),
    _torchvision("mnasnet1_0", (0, 35, 0, 10, 7)),
    _torchvision("r3d_18", (0, 9, 8, 0, 3), (3, 4, 32, 32)),
    _torchvision("fcn_resnet50", (0, 35, 16, 0, 4), weights_backbone=None, aux_loss=True),
    _timm("resnet18", (0, 9, 8, 0, 3)),
    _timm("efficientnet_b0", (33, 0, 0, 9, 7)),
    _timm("regnetx_002", (27, 0, 13, 0, 4)),
    _timm("dla34", (0, 21, 12, 0, 4)),
    _timm("res2net50_26w_4s", (0, 65, 16, 0, 4)),
    _timm("hrnet_w18_small", (0, 43, 23, 0, 25)),
    _timm("repvgg_a0", (0, 0, 22, 17, 22)),
    _timm("mobilenetv3_small_100", (23, 0, 0, 6, 5)),
    _timm("ghostnet_100", (1, 33, 0, 5, 41)),
    _timm("cspresnet50", (38, 0, 13, 0, 4)),
]


def main_output(output) -> Tensor:
    """Returns a network's only or main output."""
    if isinstance(output, dict):
        return output["out"]
    return output if isinstance(output, Tensor) else output[0]


class CountedCalls:
    """Counts fastbn's calls within a `with` statement; `norms` has their numbers by the KINDS."""

    def __enter__(self) -> CountedCalls:
        self._counts: Counter[str] = Counter()
        self._patch = mock.patch.object(fastbn.modules, "tracked_batch_norm", self._count)
        self._call = fastbn.modules.tracked_batch_norm
        self._patch.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._patch.__exit__(*error)

    def _count(self, *arguments):
        activation, residual = arguments[9], arguments[11]
        kind = "add" * (residual is not None) + "+" + "act" * (activation not in (None, "none"))
        self._counts[kind.strip("+") or "plain"] += 1
        return self._call(*arguments)

    @property
    def norms(self) -> tuple[int, int, int, int]:
        """The numbers of calls with an activation, with both, with an addition, and plain ones."""
        act, both, add, plain = (self._counts[kind] for kind in KINDS[1:])
        return act, both, add, plain


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns output and gradients of one step, with the random numbers of a fixed seed."""
    torch.manual_seed(0)
    output = main_output(model(x))
    output.square().mean().backward()
    return output.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def graphs_of(model: nn.Module, x: Tensor) -> int:
    """Returns in how many graphs `torch.compile` cuts three training steps of a model."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(x)
    return counter.frame_count


def measure(network: Network, compile: bool) -> str:
    """Returns a network's line of the table."""
    torch.manual_seed(0)
    model = network.make()
    reference = copy.deepcopy(model)
    x = torch.randn(2, *network.shape)
    fuse(model)
    found = Counter(explain(model).kinds.values())
    with CountedCalls() as calls:
        output, gradients = step(model, x)
    expected, expected_gradients = step(reference, x)
    apart = (output - expected).abs().max().item()
    far = max((a - b).abs().max().item() for a, b in zip(gradients, expected_gradients))
    saved = explain(model, x).saved_bytes
    counts = "  ".join(f"{found[kind]:7}" for kind in KINDS)
    graphs = f"  {graphs_of(model, x):6}" if compile else ""
    called = "/".join(map(str, calls.norms))
    numbers = f"{apart:8.1e}  {far:8.1e}  {saved / 1e6:7.1f}"
    return f"{network.name:27}{counts}  {called:>14}  {numbers}{graphs}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What fuse makes of well-known networks.")
    parser.add_argument("networks", nargs="*", help="names, by default all that can be made")
    parser.add_argument("--compile", action="store_true", help="count graphs of torch.compile")
    options = parser.parse_args(arguments)
    unknown = set(options.networks) - {network.name for network in NETWORKS}
    if unknown:
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    heads = "  ".join(f"{kind:>7}" for kind in KINDS)
    graphs = "  graphs" if options.compile else ""
    print(f"{'network':27}{heads}  {'called':>14}    output  gradient  MB less{graphs}")
    with fastbn.use_backend("torch"):
        for network in NETWORKS:
            if not options.networks or network.name in options.networks:
                try:
                    print(measure(network, options.compile), flush=True)
                except ModuleNotFoundError as error:
                    print(f"{network.name:27}{error.name} is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

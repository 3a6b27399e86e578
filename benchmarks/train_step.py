"""Times ResNet-50's training step on random images, with PyTorch's batch norm and with fastbn's.

    python -m benchmarks.train_step

It trains in mixed precision (bfloat16), channels-last, by SGD, eager and under torch.compile. In a
few minutes it prints images a second, the spread of the steps (interquartile range over median)
and, on a GPU, peak memory, and writes them to train_step.json. On a GPU the batch is 256 images of
224 by 224. On a CPU, where fastbn is PyTorch's own batch norm, the batch is small and its times say
nothing of a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from fastbn import FusedBatchNorm2d, FusedBatchNormAct2d

from .command_line import parse_with_out
from .environment import environment, title
from .rivals import kernels_only, no_compiler, quiet_compiler
from .timing import clock_of, peak_memory, time_rounds

LAYERS = (3, 4, 6, 3)
CLASSES = 1000

# The losses of the first steps may differ by this fraction between two norms, since bfloat16 rounds
# each layer's results.
TOLERANCE = 0.02
STEPS = 3


class FusedBottleneck(Bottleneck):
    """torchvision's block with its ReLUs and sum inside the norms; parameters keep their names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bn1 = FusedBatchNormAct2d(self.bn1.num_features)
        self.bn2 = FusedBatchNormAct2d(self.bn2.num_features)
        self.bn3 = FusedBatchNormAct2d(self.bn3.num_features)
        del self.relu

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out), shortcut)


def torch_network() -> nn.Module:
    return ResNet(Bottleneck, LAYERS, CLASSES)


def fused_network() -> nn.Module:
    network = ResNet(FusedBottleneck, LAYERS, CLASSES, norm_layer=FusedBatchNorm2d)
    network.bn1, network.relu = FusedBatchNormAct2d(64), nn.Identity()
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {"torch": torch_network, "fused": fused_network}


@dataclass(frozen=True)
class Row:
    """The figures of one network, eager or compiled.

    Attributes:
        norm: the name of the network in `NETWORKS`.
        compiled: whether `torch.compile` compiled it.
        images_per_second: images by the median time of ten steps or more.
        spread: interquartile range of the steps' times as a fraction of the median.
        peak_memory: bytes that a step needs on top of images, parameters and the
            optimizer's state; None without a GPU.
        losses: losses of the first steps.
    """

    norm: str
    compiled: bool
    images_per_second: float
    spread: float
    peak_memory: int | None
    losses: list[float]


def measure(norm: str, compiled: bool, images: Tensor, labels: Tensor) -> Row:
    """Trains on the same images in all steps; the initial weights depend on the seed alone."""
    device = images.device
    torch.manual_seed(0)
    network = NETWORKS[norm]().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    if compiled:
        torch.compiler.reset()
        network.compile(fullgraph=True, dynamic=False)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with quiet_compiler():
        losses = [step().item() for _ in range(STEPS)]
    memory = peak_memory(step) if device.type == "cuda" else None
    timing = time_rounds(step, 1, clock_of(device))
    return Row(norm, compiled, len(images) / timing.median, timing.spread, memory, losses)


def compare(batch: int, size: int, device: torch.device, compile: bool) -> Iterator[Row]:
    """Measures both norms, eager and compiled, and yields their rows.

    Raises:
        ArithmeticError: the losses of a network are not those of the first one.
    """
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)
    expected = None
    for compiled in (False, True) if compile else (False,):
        for norm in NETWORKS:
            row = measure(norm, compiled, images, labels)
            # The memory of this network must be free before that of the next one is measured.
            gc.collect()
            expected = expected or row.losses
            if not all(abs(a - b) <= TOLERANCE * b for a, b in zip(row.losses, expected)):
                raise ArithmeticError(f"expected losses of {expected} from {row}")
            yield row


def line(row: Row) -> str:
    memory = "-" if row.peak_memory is None else f"{row.peak_memory / 2**30:.2f} GiB"
    mode = "compiled" if row.compiled else "eager"
    speed = f"{row.images_per_second:9,.1f} images/s, spread {row.spread:.0%}"
    return f"{row.norm:6}{mode:9}{speed}, {memory}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    file = parse_with_out(parser, arguments, "train_step.json").out / "train_step.json"
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    found = environment(device)
    print(title(found))
    reason = no_compiler(device)
    if reason is not None:
        print(f"without torch.compile, which does not work here: {reason}")
    batch, size = (256, 224) if gpu else (16, 32)
    result = {
        "title": title(found), "environment": found, "batch": batch, "image_size": size, "rows": [],
    }  # fmt: skip
    file.write_text(json.dumps(result, indent=1))  # this replaces an earlier run's file
    with kernels_only(device):
        for row in compare(batch, size, device, compile=reason is None):
            print(line(row), flush=True)
            result["rows"].append(asdict(row))
            file.write_text(json.dumps(result, indent=1))
    if not gpu:
        print("PyTorch computed the fused norm: its speed says nothing of fastbn's kernels.")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Models what shared statistics cost on up to 1,024 GPUs, to find the cheapest messages.

    python -m benchmarks.sync.model

The command prints a table and draws images/sync.png. Nothing is measured, and README.md says what
is assumed. A message takes a time for each of its hops, and moves bytes at a bandwidth:

    ring all-gather of n bytes    P - 1 hops, (P - 1) n bytes
    ring all-reduce of n bytes    2 (P - 1) hops, 2 (P - 1) / P n bytes
    tree all-reduce of n bytes    2 log2(P) hops, 2 n bytes

Hops between nodes take longer than hops within a node. In a ring over m nodes, m - 1 of the P - 1
hops are between nodes; in a tree, log2(m) levels are.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path

from matplotlib.figure import Figure

IMAGES = Path(__file__).parents[1] / "images"


@dataclass(frozen=True)
class Network:
    """What is assumed of a cluster.

    Attributes:
        gpus: GPUs of a node.
        start: seconds until a collective's first byte moves.
        hop_inside, hop_between: seconds for a hop within a node and between nodes.
        bytes_inside, bytes_between: bytes a second that a ring or tree moves.
    """

    gpus: int = 8
    start: float = 7e-6
    hop_inside: float = 1e-6
    hop_between: float = 5e-6
    bytes_inside: float = 300e9
    bytes_between: float = 100e9

    def seconds(self, inside: float, between: float, size: float) -> float:
        """Returns the time of a message that passes so many hops and moves so many bytes."""
        bandwidth = self.bytes_between if between else self.bytes_inside
        hops = inside * self.hop_inside + between * self.hop_between
        return self.start + hops + size / bandwidth


NETWORK = Network()

# Channels of ResNet-50's 53 norms.
RESNET50 = [
    64,
    *[64, 64, 256] * 3, 256,
    *[128, 128, 512] * 4, 512,
    *[256, 256, 1024] * 6, 1024,
    *[512, 512, 2048] * 3, 2048,
]  # fmt: skip


def all_gather(ranks: int, size: float, network: Network = NETWORK) -> float:
    nodes = ceil(ranks / network.gpus)
    return network.seconds(ranks - nodes, nodes - 1, (ranks - 1) * size)


def all_reduce(ranks: int, size: float, network: Network = NETWORK) -> float:
    """Returns the time of the faster one of ring and tree."""
    nodes = ceil(ranks / network.gpus)
    moved = 2 * (ranks - 1) / ranks * size
    ring = network.seconds(2 * (ranks - nodes), 2 * (nodes - 1), moved)
    levels = log2(ranks / nodes), ceil(log2(nodes))
    return min(ring, network.seconds(2 * levels[0], 2 * levels[1], 2 * size))


def gathered(ranks: int, channels: int) -> float:
    """Returns the time of fastbn's message: one all-gather.

    Each process gives its means in two parts, its sums of squares, and its count.
    """
    return all_gather(ranks, 4 * (3 * channels + 1))


def reduced(ranks: int, channels: int) -> float:
    """Returns the time of two all-reduces: of the mean, then of the sums of squares about it.

    One all-reduce would do for the sums of x and x^2, but their difference loses the digits of the
    variance.
    """
    return all_reduce(ranks, 4 * (channels + 1)) + all_reduce(ranks, 4 * channels)


def backward(ranks: int, channels: int) -> float:
    """Returns the time of the backward's message, an all-reduce of two sums in either case."""
    return all_reduce(ranks, 4 * 2 * channels)


def step(ranks: int, forward) -> float:
    """Returns the time of all messages of ResNet-50's training step."""
    return sum(forward(ranks, c) + backward(ranks, c) for c in RESNET50)


RANKS = [2**i for i in range(1, 11)]


def draw(path: Path) -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    ways = {"one all-gather (fastbn)": gathered, "two all-reduces": reduced}
    colors = ["#2a6fbb", "#e08a1e"]
    for (name, way), color in zip(ways.items(), colors):
        for channels, line in ((64, "-"), (2048, "--")):
            times = [1e6 * way(ranks, channels) for ranks in RANKS]
            axes[0].plot(RANKS, times, line, color=color, label=f"{name}, {channels} channels")
        axes[1].plot(RANKS, [1e3 * step(ranks, way) for ranks in RANKS], color=color, label=name)
    in_node = [1e3 * step(min(ranks, NETWORK.gpus), gathered) for ranks in RANKS]
    axes[1].plot(RANKS, in_node, color="#3a9a5b", label="all-gather among the GPUs of a node")
    for axis in axes:
        axis.axvline(NETWORK.gpus, color="gray", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="GPUs (8 in a node, left of the gray line)")
        axis.set_xticks(RANKS, RANKS, fontsize=8)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_title("forward of one norm: microseconds", loc="left")
    axes[1].set_title("ResNet-50, forward and backward: ms a step", loc="left")
    figure.suptitle("A model of what the messages cost; nothing was measured")
    figure.savefig(path, dpi=110)


def table() -> str:
    lines = [
        "| GPUs | 64 channels | 2,048 channels | ResNet-50, a step |",
        "|---|---|---|---|",
    ]
    for ranks in RANKS:
        layers = [
            f"{1e6 * gathered(ranks, c):,.0f} / {1e6 * reduced(ranks, c):,.0f} µs"
            for c in (64, 2048)
        ]
        steps = f"{1e3 * step(ranks, gathered):.1f} / {1e3 * step(ranks, reduced):.1f} ms"
        lines.append(f"| {ranks:,} | {layers[0]} | {layers[1]} | {steps} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sync.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder (%(default)s)")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "sync.png")
    print("One all-gather / two all-reduces, by the model:\n")
    print(table())
    print(f"\nwrote {out / 'sync.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

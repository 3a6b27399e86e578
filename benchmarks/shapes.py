"""The batch norms to measure, from well-known networks at the sizes they are trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Epilogue:
    """Whether a residual is added after the normalisation, and whether a ReLU follows."""

    name: str
    residual: bool
    relu: bool

    def __str__(self) -> str:
        return self.name


BN = Epilogue("BN", residual=False, relu=False)
BN_RELU = Epilogue("BN+ReLU", residual=False, relu=True)
BN_ADD_RELU = Epilogue("BN+add+ReLU", residual=True, relu=True)

# Units of traffic of a kernel that reads and writes each tensor once, without and for a residual. A
# forward moves x and y, a backward dy, x and dx; a residual is read, and its gradient written.
FLOOR_UNITS = {"forward": (2, 1), "forward+backward": (2 + 3, 1 + 1)}


@dataclass(frozen=True)
class Shape:
    """The input of a batch norm somewhere in a network.

    Attributes:
        network: the network that has it.
        size: (N, C) or (N, C, ...), with a batch size used in training.
        epilogues: the epilogues to measure. All shapes have BN+ReLU, so that they can be
            compared.
        small: the size to measure without a GPU. A shape that has one also stands for its
            network if time is short.
    """

    network: str
    size: tuple[int, ...]
    epilogues: tuple[Epilogue, ...] = (BN_RELU,)
    small: tuple[int, ...] | None = None


SHAPES = (
    Shape("ResNet-50", (256, 256, 56, 56), (BN_RELU, BN_ADD_RELU, BN), small=(4, 256, 14, 14)),
    Shape("ResNet-50", (256, 64, 112, 112)),
    Shape("ResNet-50", (256, 64, 56, 56)),
    Shape("ResNet-50", (256, 512, 28, 28), (BN_RELU, BN_ADD_RELU)),
    Shape("ResNet-50", (256, 1024, 14, 14), (BN_RELU, BN_ADD_RELU)),
    Shape("ResNet-50", (256, 2048, 7, 7), (BN_RELU, BN_ADD_RELU)),
    Shape("ResNet-18/CIFAR", (512, 64, 32, 32), (BN_RELU, BN_ADD_RELU), small=(16, 64, 16, 16)),
    Shape("ResNet-18/CIFAR", (256, 128, 16, 16), (BN_RELU, BN_ADD_RELU)),
    Shape("ResNet-18/CIFAR", (128, 512, 4, 4), (BN_RELU, BN_ADD_RELU)),
    Shape("MobileNetV2", (256, 24, 56, 56), (BN_RELU, BN), small=(4, 24, 28, 28)),
    Shape("MobileNetV2", (256, 96, 112, 112)),
    Shape("MobileNetV2", (256, 144, 56, 56)),
    Shape("MobileNetV3", (256, 672, 14, 14)),
    Shape("MobileNetV3", (256, 960, 7, 7)),
    Shape("U-Net 2-D", (16, 64, 256, 256), small=(2, 64, 32, 32)),
    Shape("U-Net 2-D", (16, 256, 64, 64)),
    Shape("U-Net 2-D", (16, 1024, 16, 16)),
    Shape("U-Net 3-D", (2, 32, 128, 128, 128), small=(1, 32, 16, 16, 16)),
    Shape("U-Net 3-D", (2, 64, 64, 64, 64)),
    Shape("U-Net 3-D", (2, 320, 8, 8, 8)),
    Shape("MLP", (8192, 1024), (BN_RELU, BN_ADD_RELU), small=(256, 1024)),
    Shape("MLP", (1024, 4096)),
    Shape("MLP", (65536, 256), (BN_RELU, BN)),
)


@dataclass(frozen=True)
class Case:
    """A batch norm to measure, by whatever rival computes it."""

    network: str
    size: tuple[int, ...]
    layout: str
    dtype: str
    epilogue: Epilogue

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.size))

    @property
    def labels(self) -> dict[str, str]:
        """The values that tell this case from others in a report."""
        return {
            "network": self.network,
            "shape": self.shape,
            "layout": self.layout,
            "dtype": self.dtype,
            "epilogue": self.epilogue.name,
        }

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one unit of traffic: a tensor read or written once."""
        return math.prod(self.size) * (4 if self.dtype == "float32" else 2)

    def floor_bytes(self, direction: str) -> int:
        """Returns the bytes that any implementation must move, by which all GB/s are computed.

        They are what a one-pass kernel reads and writes: 2 units forward and 3 backward, and one
        more each with a residual. GB/s of rivals can be compared since these bytes are the same
        for all rivals, whatever a rival really moves.
        """
        plain, residual = FLOOR_UNITS[direction]
        return (plain + residual * self.epilogue.residual) * self.tensor_bytes

    def __str__(self) -> str:
        return " ".join(self.labels.values())


def cases(gpu: bool, quick: bool) -> list[Case]:
    """Returns all cases to measure, the most important first.

    All shapes are measured in one dtype and both layouts, and one shape of each kind in the other
    two dtypes: all combinations would take an hour.

    Args:
        gpu: whether to return real sizes, mostly in bfloat16, or small ones, mostly in float32.
        quick: whether to return one shape of each network in one dtype only.
    """
    main, *others = (
        ("bfloat16", "float32", "float16") if gpu else ("float32", "float16", "bfloat16")
    )
    chosen = [shape for shape in SHAPES if shape.small]
    found = [case for shape in chosen for case in _cases(shape, main, gpu)]
    if quick:
        return found
    few = [shape for shape in chosen if shape.network in ("ResNet-50", "U-Net 3-D", "MLP")]
    found += [
        case
        for dtype in others
        for shape in few
        for case in _cases(shape, dtype, gpu)
        if case.epilogue == BN_RELU
    ]
    rest = [shape for shape in SHAPES if gpu and not shape.small]
    return found + [case for shape in rest for case in _cases(shape, main, gpu)]


def _cases(shape: Shape, dtype: str, gpu: bool) -> list[Case]:
    size = shape.size if gpu else shape.small
    layouts = ("rows",) if len(size) == 2 else ("channels-first", "channels-last")
    return [
        Case(shape.network, size, layout, dtype, epilogue)
        for epilogue in shape.epilogues
        for layout in layouts
    ]

"""The cases that the steps check and time, shared so that all of them can be compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..shapes import BN, BN_ADD_RELU, BN_RELU, Case, Epilogue

LAYOUTS = ("channels-first", "channels-last")

# All batch norms of ResNet-50 as (channels, height and width), the ones with most bytes first.
RESNET50 = (
    (64, 112), (256, 56), (128, 56), (512, 28), (64, 56), (1024, 14), (256, 28), (2048, 7),
    (128, 28), (512, 14), (256, 14), (512, 7),
)  # fmt: skip

# The batch norms that end a block, to whose output the residual is added.
ENDS_OF_BLOCKS = ((256, 56), (512, 28), (1024, 14), (2048, 7))

# The shapes of the benchmarks that stand for their networks.
SHAPES = (
    ("ResNet-50", (256, 256, 56, 56)),
    ("ResNet-50", (256, 2048, 7, 7)),
    ("ResNet-18/CIFAR", (512, 64, 32, 32)),
    ("MobileNetV2", (256, 24, 56, 56)),
    ("MLP", (8192, 1024)),
    ("U-Net 2-D", (16, 64, 256, 256)),
    ("U-Net 3-D", (2, 32, 128, 128, 128)),
    ("ResNet-50", (256, 1024, 14, 14)),
)

TINY = (("CNN", (2, 8, 3, 5)), ("MLP", (16, 8)))


def _cases(
    network: str, size: tuple[int, ...], epilogue: Epilogue, dtype: str = "bfloat16"
) -> Iterator[Case]:
    for layout in ("rows",) if len(size) == 2 else LAYOUTS:
        yield Case(network, size, layout, dtype, epilogue)


def _all(found: Sequence[tuple[str, tuple[int, ...], Epilogue]]) -> list[Case]:
    return [case for one in found for case in _cases(*one)]


def strategy_cases(rehearse: bool) -> list[Case]:
    """Returns the cases for which every strategy is timed, most important first."""
    if rehearse:
        return [case for network, size in TINY for case in _cases(network, size, BN_RELU)]

    def resnet(shapes: Sequence[tuple[int, int]], epilogue: Epilogue, batch: int = 256):
        return [("ResNet-50", (batch, c, side, side), epilogue) for c, side in shapes]

    others = [
        (network, size, BN_RELU) for network, size in SHAPES if network in ("MLP", "U-Net 2-D")
    ]
    return _all(
        [
            *resnet(RESNET50[:4], BN_RELU),
            *resnet(ENDS_OF_BLOCKS[:2], BN_ADD_RELU),
            *others,
            *resnet(RESNET50[4:8], BN_RELU),
            ("ResNet-18/CIFAR", (512, 64, 32, 32), BN_RELU),
            ("U-Net 3-D", (2, 32, 128, 128, 128), BN_RELU),
            *resnet(ENDS_OF_BLOCKS[2:], BN_ADD_RELU),
            *resnet(RESNET50[8:], BN_RELU),
            *resnet(ENDS_OF_BLOCKS, BN_RELU, batch=64),
        ]
    )


def rival_cases(rehearse: bool) -> list[Case]:
    """Returns the cases for which rivals are timed, most important first."""
    if rehearse:
        return [Case("MLP", (32, 16), "rows", "float32", BN_ADD_RELU)]
    few = [SHAPES[0], SHAPES[2], SHAPES[4]]
    return _all(
        [
            *((network, size, BN_RELU) for network, size in SHAPES[:3]),
            *((network, size, BN_ADD_RELU) for network, size in few),
            *((network, size, BN_RELU) for network, size in SHAPES[3:]),
            *((network, size, BN) for network, size in few),
        ]
    )


def training_cases() -> list[Case]:
    """Returns the batch norms of ResNet-50's training step, channels-last in mixed precision."""

    def cases(shapes: Sequence[tuple[int, int]], epilogue: Epilogue) -> list[Case]:
        return [
            Case("ResNet-50", (256, c, side, side), "channels-last", "bfloat16", epilogue)
            for c, side in shapes
        ]

    # The norm of a shortcut has no activation of its own.
    return [
        *cases(RESNET50, BN_RELU),
        *cases(ENDS_OF_BLOCKS, BN_ADD_RELU),
        *cases(ENDS_OF_BLOCKS, BN),
    ]

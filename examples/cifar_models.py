"""The networks of train_cifar.py, with the norm left open."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastbn import FusedBatchNorm2d, FusedBatchNormAct1d, FusedBatchNormAct2d


class FusedBlock(BasicBlock):
    """torchvision's residual block with both ReLUs and the sum inside the norms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bn1 = FusedBatchNormAct2d(self.bn1.num_features)
        self.bn2 = FusedBatchNormAct2d(self.bn2.num_features)
        del self.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(out), shortcut)


class Norm(NamedTuple):
    """What follows a layer, built from its number of channels, and a ResNet's block with it."""

    block: type[BasicBlock]
    norm2d: Callable[[int], nn.Module]  # after a convolution
    norm_relu2d: Callable[[int], nn.Module]  # after a convolution, with the ReLU
    norm_relu1d: Callable[[int], nn.Module]  # after a dense layer, with the ReLU


NORMS = {
    "none": Norm(
        block=BasicBlock,
        norm2d=lambda channels: nn.Identity(),
        norm_relu2d=lambda channels: nn.ReLU(),
        norm_relu1d=lambda channels: nn.ReLU(),
    ),
    "torch": Norm(
        block=BasicBlock,
        norm2d=nn.BatchNorm2d,
        norm_relu2d=lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()),
        norm_relu1d=lambda channels: nn.Sequential(nn.BatchNorm1d(channels), nn.ReLU()),
    ),
    # Norm and ReLU in one module. The Sequential around it keeps the names of the parameters, so
    # that a checkpoint trained with "torch" loads here, and back.
    "fused": Norm(
        block=FusedBlock,
        norm2d=FusedBatchNorm2d,
        norm_relu2d=lambda channels: nn.Sequential(FusedBatchNormAct2d(channels)),
        norm_relu1d=lambda channels: nn.Sequential(FusedBatchNormAct1d(channels)),
    ),
}


def cnn(norm: Norm, classes: int) -> nn.Module:
    """The tutorial network: two convolutions, two dense layers."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        norm.norm_relu2d(32),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        norm.norm_relu2d(64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 64, bias=False),
        norm.norm_relu1d(64),
        nn.Linear(64, classes),
    )


def gap(norm: Norm, classes: int) -> nn.Module:
    """One convolution block, then the average over the whole image."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        norm.norm_relu2d(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def resnet18(norm: Norm, classes: int) -> nn.Module:
    """torchvision's ResNet-18 without the stem that shrinks an image to a quarter of its width."""
    model = ResNet(norm.block, [2, 2, 2, 2], num_classes=classes, norm_layer=norm.norm2d)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    if norm.block is FusedBlock:
        model.bn1, model.relu = FusedBatchNormAct2d(64), nn.Identity()
    return model


MODELS = {"cnn": cnn, "gap": gap, "resnet18": resnet18}


def build_model(name: str, norm: str, classes: int, seed: int) -> nn.Module:
    """The network ``name``; the weights of its layers depend on the seed, not on the norm."""
    torch.manual_seed(seed)
    model = MODELS[name](NORMS[norm], classes)
    if norm == "none":
        # Batch norm brings its own shift, so the layer before it has no bias; without it the bias
        # is needed. Added only now and at zero, as the shift starts: nothing is drawn for it, and
        # the random weights stay the same for every norm.
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]))
    return model

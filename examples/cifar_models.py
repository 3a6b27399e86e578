"""The networks of train_cifar.py, which take the kind of norm as an argument."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastbn import FusedBatchNorm2d, FusedBatchNormAct1d, FusedBatchNormAct2d


class FusedBlock(BasicBlock):
    """torchvision's residual block, with both ReLUs and the sum computed by the norms."""

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
    """A ResNet's block, and functions that make what follows a layer of so many channels."""

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
    # Norm and ReLU are one module. The Sequential around it keeps the names of the parameters, so
    # that a checkpoint of "torch" loads into "fused", and the other way round.
    "fused": Norm(
        block=FusedBlock,
        norm2d=FusedBatchNorm2d,
        norm_relu2d=lambda channels: nn.Sequential(FusedBatchNormAct2d(channels)),
        norm_relu1d=lambda channels: nn.Sequential(FusedBatchNormAct1d(channels)),
    ),
}


def cnn(norm: Norm, classes: int) -> nn.Module:
    """Returns the tutorials' network, with two convolutions and two dense layers."""
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
    """Returns one convolution block, followed by the average over the whole image."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        norm.norm_relu2d(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def resnet18(norm: Norm, classes: int) -> nn.Module:
    """Returns ResNet-18 without the stem that shrinks an image to a quarter of its width."""
    model = ResNet(norm.block, [2, 2, 2, 2], num_classes=classes, norm_layer=norm.norm2d)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    if norm.block is FusedBlock:
        model.bn1, model.relu = FusedBatchNormAct2d(64), nn.Identity()
    return model


MODELS = {"cnn": cnn, "gap": gap, "resnet18": resnet18}


def build_model(name: str, norm: str, classes: int, seed: int) -> nn.Module:
    """Returns the network ``name``, whose layers' weights depend on the seed, not on the norm."""
    torch.manual_seed(seed)
    model = MODELS[name](NORMS[norm], classes)
    if norm == "none":
        # Batch norm has its own shift, so that the layer before it has no bias; without batch norm
        # the bias is needed. It is added only now and starts at zero, as the shift does: no random
        # numbers are drawn for it, so that the weights are the same for every norm.
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]))
    return model

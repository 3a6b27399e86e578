"""Small networks, and functions that tell what a fused one computes and by which calls."""

from __future__ import annotations

import copy
from collections import Counter
from unittest import mock

import torch
import torch.nn as nn

import fastbn.modules


def fused_calls(model, *args, restore=True, **kwargs):
    """Runs a model; returns its output and the calls of batch norm, counted by what they fuse.

    Afterwards the model has the state that it had before, unless `restore` is False.
    """
    calls = Counter()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    original = fastbn.modules.tracked_batch_norm

    def spy(*given):
        activation, residual = given[9], given[11]
        name = "add+" * (residual is not None) + (activation or "none")
        calls[name.removesuffix("+none")] += 1
        return original(*given)

    with mock.patch.object(fastbn.modules, "tracked_batch_norm", spy):
        output = model(*args, **kwargs)
    with torch.no_grad():
        for name, t in model.state_dict().items() if restore else ():
            t.copy_(state[name])
    return output, dict(calls)


def train(model, inputs, steps=2, kwargs=None):
    """Takes steps of SGD and returns the output and the inputs' gradients of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    results = []
    for step in range(steps):
        given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        torch.manual_seed(step)
        output = model(*(x * 1 for x in given), **(kwargs or {}))
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        results += [output.detach(), *(x.grad for x in given)]
    return results


def assert_alike(model, reference, inputs, kwargs=None, exact=True):
    """Compares a fused model with an unfused one in two steps, in eval mode, and in a step more."""
    limits = {"rtol": 0, "atol": 0} if exact else {}
    for mode, steps in ((True, 2), (False, 0), (True, 1)):
        if steps:
            found = train(model.train(mode), inputs, steps, kwargs)
            expected = train(reference.train(mode), inputs, steps, kwargs)
        else:
            with torch.no_grad():
                found = model.train(mode)(*(x * 1 for x in inputs), **(kwargs or {}))
                expected = reference.train(mode)(*(x * 1 for x in inputs), **(kwargs or {}))
        torch.testing.assert_close(found, expected, **limits)
    gradients = [[p.grad for p in m.parameters()] for m in (model, reference)]
    torch.testing.assert_close(*gradients, **limits)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), **limits)


def pair(make):
    """Returns a new model, which a test may fuse, and a copy to compare it with."""
    torch.manual_seed(1)
    model = make()
    return model, copy.deepcopy(model)


class Block(nn.Module):
    """A residual block like torchvision's."""

    def __init__(self, channels=4, out=None, stride=1):
        super().__init__()
        out = out or channels
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or out != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    """A residual network of two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.blocks = nn.Sequential(Block(), Block(4, 6, 2))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))


NET_CALLS = {"relu": 3, "add+relu": 2, "none": 1}

"""Makes calls of small layers, to time what batch norm costs the host in PyTorch and in fastbn.

The input is so small that the host decides how long a call takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn
from triton.runtime import JITFunction

import fastbn
from fastbn.kernels.device import H100

SIZE = (8, 16, 4, 4)
DIRECTIONS = ("forward", "forward+backward")


def native() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(SIZE[1]), nn.ReLU())


def fused() -> nn.Module:
    return fastbn.FusedBatchNormAct2d(SIZE[1])


LAYERS: dict[str, Callable[[], nn.Module]] = {"native": native, "fastbn": fused}


def call_of(name: str, direction: str, device: torch.device) -> Callable[[], object]:
    """Returns a call of a layer in training mode."""
    layer = LAYERS[name]().to(device)
    x = torch.randn(SIZE, device=device, requires_grad=True)
    dy = torch.randn(SIZE, device=device)
    leaves = (x, *layer.parameters())
    if direction == "forward":
        return lambda: layer(x)
    return lambda: torch.autograd.grad(layer(x), leaves, dy)


class _NoKernel:
    """Takes the place of a compiled kernel, and starts nothing."""

    def __getitem__(self, grid):
        return lambda *arguments: None


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Within the block, calls are planned for an H100 and do everything but launch kernels."""
    with (
        mock.patch.object(JITFunction, "run", return_value=_NoKernel()),
        mock.patch("fastbn.runtime.support.INTERPRETING", True),
        mock.patch("fastbn.runtime.execution_plan.device_facts", return_value=H100),
        fastbn.use_backend("triton"),
    ):
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, PyTorch uses one thread, which is fastest for few values."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

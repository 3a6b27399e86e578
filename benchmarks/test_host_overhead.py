"""`pytest benchmarks/test_host_overhead.py --benchmark-only`: what a call costs the host.

Up to Triton's launcher: the launch itself does nothing here, so that any machine
can measure it, with tensors in any memory. The problem is a small one, of one
resident launch each way. PyTorch's own modules stand beside it; theirs includes,
on a CPU, computing a few values.
"""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn as nn
from triton import knobs
from triton.runtime import JITFunction

import fastbn
from fastbn.kernels.device import H100

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (8, 16, 4, 4)


class NoKernel:
    """In place of a compiled kernel: starts nothing."""

    def __getitem__(self, grid):
        return lambda *arguments: None


@contextlib.contextmanager
def no_launches():
    """All of fastbn but the driver, planned for an H100, for tensors on this machine."""
    if knobs.runtime.interpret:
        pytest.skip("with TRITON_INTERPRET=1 there is no dispatch to measure")
    with (
        mock.patch.object(JITFunction, "run", return_value=NoKernel()),
        mock.patch("fastbn.runtime.support.INTERPRETING", True),
        mock.patch("fastbn.runtime.execution_plan.device_facts", return_value=H100),
        fastbn.use_backend("triton"),
    ):
        yield


def native():
    return nn.Sequential(nn.BatchNorm2d(SIZE[1]), nn.ReLU())


def fused():
    return fastbn.FusedBatchNormAct2d(SIZE[1])


@pytest.mark.benchmark(min_rounds=200, warmup=True, warmup_iterations=2000)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("module", [native, fused])
def test_host_overhead(module, direction, benchmark):
    layer = module().to(DEVICE)
    x = torch.randn(SIZE, device=DEVICE, requires_grad=True)
    dy = torch.randn(SIZE, device=DEVICE)
    leaves = (x, *layer.parameters())

    def forward():
        return layer(x)

    def forward_backward():
        return torch.autograd.grad(layer(x), leaves, dy)

    benchmark.group = f"host, {direction}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with no_launches():
            benchmark(forward if direction == "forward" else forward_backward)
    finally:
        torch.set_num_threads(threads)

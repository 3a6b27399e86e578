"""Checks that need a GPU: replayed graphs, concurrent streams, tensors past 2^31 elements."""

from __future__ import annotations

import torch
from torch import Tensor

import fastbn
from fastbn import FusedBatchNorm2d
from fastbn.runtime import workspace


def _tensors() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 64, 32, 32, device="cuda", requires_grad=True)
    return x, torch.randn_like(x)


def _assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def workspaces_rest() -> None:
    """Checks that every launch has set its counters of arrivals and tickets back to 0."""
    for one in workspace._workspaces.values():
        assert not one.arrivals.any(), "counters of arrivals are not 0 after all launches"
        assert not one.tickets[0] & 0xFFFFFFFF, "the counter of tickets is not 0 after all launches"


def graph_replays(times: int = 1000) -> None:
    """Checks that a captured training step gives an eager one's bits, and counts each replay."""
    norm = FusedBatchNorm2d(64).cuda()
    x, dy = _tensors()

    def step() -> list[Tensor]:
        y = norm(x)
        return [y.detach(), *torch.autograd.grad(y, x, dy)]

    for _ in range(3):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    count = norm.num_batches_tracked.item()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()
    _assert_equal(found, expected)
    assert norm.num_batches_tracked == count + times
    workspaces_rest()


def streams_agree(times: int = 50) -> None:
    """Checks that two streams that run at the same time give the same bits."""
    x, dy = _tensors()

    def step() -> list[Tensor]:
        y = fastbn.batch_norm(x, None, None, training=True)
        return [y.detach(), *torch.autograd.grad(y, x, dy)]

    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(times):
        results = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(step())
        torch.cuda.synchronize()
        _assert_equal(*results)
    workspaces_rest()


def past_2_31(channels_last: bool) -> None:
    """Checks that the ends of such tensors are computed, and that no sum wraps around."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(33, 64, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=format).requires_grad_()
    dy = torch.randn_like(x)
    y = FusedBatchNorm2d(64).cuda()(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    for channel in (0, 63):
        one = x[:, channel].detach().double().requires_grad_()
        exact = (one - one.mean()) / one.std(correction=0)
        (exact_dx,) = torch.autograd.grad(exact, one, dy[:, channel].double())
        for actual, right in ((y, exact), (dx, exact_dx)):
            assert (actual[:, channel] - right).abs().max() < 2**-5

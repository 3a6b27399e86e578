"""Measures norms that share statistics; each process of a group calls `measure`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from fastbn import FusedBatchNorm2d, FusedSyncBatchNorm

CHANNELS = 32
RESULTS = ("output", "gradient of the input", "running variance")


def measure(rank: int, processes: int, store: str, seconds: float) -> None:
    """Measures in all processes, and prints the tables in the first one."""
    on_gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=processes)
    where = torch.cuda.get_device_name() if on_gpus else f"CPU, {os.cpu_count()} cores"
    tables = errors(rank, device), steps(device, seconds)
    if rank == 0:
        print(f"\n{processes} processes, {backend} ({where})")
        for table in tables:
            print(f"\n{table}")
    dist.destroy_process_group()


def errors(rank: int, device: torch.device) -> str:
    """Returns a table of the largest errors against one process in float64, over all processes."""
    kinds = [FusedSyncBatchNorm, *[nn.SyncBatchNorm] * (device.type == "cuda")]
    header = [f"{name}, {kind.__name__}" for kind in kinds for name in RESULTS]
    lines = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for name, sizes in _splits().items():
            found = [_errors_of(kind, dtype, sizes, rank, device) for kind in kinds]
            figures = [f"{error:.1e}" for of_kind in found for error in of_kind]
            lines.append([f"{str(dtype).removeprefix('torch.')}, {name} parts", *figures])
    return _table(["case", *header], lines)


def _splits() -> dict[str, list[int]]:
    world = dist.get_world_size()
    return {
        "even": [4] * world,
        "uneven": [1 + 3 * (rank % 2) for rank in range(world)],
        "some empty": [8 * (rank % 2) for rank in range(world)],
    }


def _errors_of(
    kind: Callable[..., nn.Module], dtype: torch.dtype, sizes: list[int], rank: int,
    device: torch.device,
) -> list[float]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, sum(sizes), CHANNELS, 14, 14, generator=generator) + 1
    x, dy = whole.to(device, dtype).unbind()
    exact = _step(nn.BatchNorm2d(CHANNELS).to(device, torch.float64), x.double(), dy.double())
    norm = kind(CHANNELS).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    found = _step(norm, x.split(sizes)[rank], dy.split(sizes)[rank])
    expected = [*(t.split(sizes)[rank] for t in exact[:2]), exact[2]]
    largest = [(a - b).abs().flatten() for a, b in zip(found, expected)]
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    worst = torch.stack([torch.cat([errors, zero]).max() for errors in largest])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist()


def _step(norm: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = norm(x)
    output.backward(dy)
    assert x.grad is not None
    return [output.detach().double(), x.grad.double(), norm.running_var.double()]


def steps(device: torch.device, seconds: float) -> str:
    """Returns a table of messages, bytes and times of training steps of one norm."""
    lines = []
    shapes = [(8, 64, 28, 28), (8, 256, 14, 14), (8, 2048, 1, 1)]
    if device.type == "cuda":
        shapes = [(32, 64, 56, 56), (32, 256, 14, 14), (32, 2048, 7, 7)]
    kinds = [FusedBatchNorm2d, FusedSyncBatchNorm]
    kinds += [nn.SyncBatchNorm] * (device.type == "cuda")
    for shape in shapes:
        for kind in kinds:
            norm = kind(shape[1]).to(device)
            x, dy = torch.randn(2, *shape, device=device).unbind()
            sent = _messages(partial(_train, norm, x, dy))
            took = _time(partial(_train, norm, x, dy), device, seconds)
            count, size = sum(sent.values()), sum(n * times for (_, n), times in sent.items())
            name = f"{kind.__name__}, {' x '.join(map(str, shape))} a process"
            lines.append([name, f"{count}", f"{size:,}", f"{1e3 * took:.3f}"])
    header = ["norm, input", "messages a step", "bytes a process gives", "ms a step"]
    return _table(header, lines)


def _train(norm: nn.Module, x: Tensor, dy: Tensor) -> None:
    norm(x.detach().requires_grad_()).backward(dy)


def _messages(call: Callable[[], object]) -> Counter:
    """Returns how many messages a call sends, by collective and number of bytes."""
    sent: Counter = Counter()

    def spy(name: str):
        original = getattr(dist, name)

        def count(*tensors, **options):
            sent[name, tensors[-1].nbytes] += 1
            return original(*tensors, **options)

        return mock.patch.object(dist, name, count)

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with spy(gather), spy("all_reduce"):
        call()
    return sent


def _time(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Returns the median time of a call, of which all processes make equally many."""
    calls, times = 20, []
    for timed in (False, True):
        for _ in range(calls):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if not timed:
            # The processes agree on a number of calls.
            slowest = torch.tensor(median(times), device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            calls, times = max(20, int(seconds / slowest.item())), []
    return median(times)


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))

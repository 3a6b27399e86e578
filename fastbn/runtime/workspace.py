"""A workspace holds what the programs of one launch share and no later launch needs.

These are the counters by which programs wait for each other, and their partial results. Every
device and stream has one workspace. The kernels leave its counters as the next launch needs
them (`kernels/tickets.py`), so no launch has to clear them. Launches in one
stream run one after the other and share a workspace; launches in two streams may overlap and
must not share one. What one launch leaves for the next does not belong here: between the two
another thread may launch in the same stream.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# A new workspace serves at least this many groups of channels and bytes of partial results, so
# that it seldom has to grow.
GROUPS = 4096
PARTIAL_BYTES = 2**20


class Workspace(NamedTuple):
    """Counters for a number of groups of channels, and memory for partial results.

    Attributes:
        arrivals: int32 counters, one for each group of channels and one more.
        tickets: the int64 counter of tickets, then a flag for each group of channels.
        partials: the memory for partial results, as a tensor of either dtype of statistics.
        groups: how many groups of channels the counters serve.
        partial_bytes: size of the memory for partial results.
    """

    arrivals: Tensor
    tickets: Tensor
    partials: dict[torch.dtype, Tensor]
    groups: int
    partial_bytes: int


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def get_workspace(device: torch.device, groups: int, partial_bytes: int = 0) -> Workspace:
    """Returns the workspace of the device's current stream, for so many groups of channels and
    bytes of partial results.

    A stream is identified by its handle. A stream that PyTorch did not make must
    not be destroyed while launches in it still run: its handle may be given to a
    new stream, which would then use the same counters.
    """
    stream = 0
    if device.type == "cuda":
        if _capturing(device):
            # A graph may be replayed in any stream, so it needs a workspace of its own.
            return _make(device, groups, partial_bytes)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    elif device.type == "xpu":
        stream = torch.xpu.current_stream(device).sycl_queue
    found = _workspaces.get((device, stream))
    if found is None:
        found = _make_lasting(device, max(groups, GROUPS), max(partial_bytes, PARTIAL_BYTES))
    elif found.groups < groups or found.partial_bytes < partial_bytes:
        sizes = max(groups, found.groups), max(partial_bytes, found.partial_bytes)
        found = _make_lasting(device, *sizes)
    else:
        return found
    _workspaces[device, stream] = found
    return found


def discard() -> None:
    """Drops all workspaces: after a launch that failed, their counters may have any value."""
    _workspaces.clear()


def _capturing(device: torch.device) -> bool:
    """Says whether a CUDA graph is being captured from the device's current stream."""
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _make(device: torch.device, groups: int, partial_bytes: int) -> Workspace:
    """Makes a workspace, with counters from one allocation that one launch fills with zeros."""
    # The number of 8-byte words is even, so that the second part is aligned to 16 bytes too.
    size = groups + 2 & ~1
    memory = torch.zeros(2 * size, dtype=torch.int64, device=device)
    wide = torch.empty(-(-partial_bytes // 8), dtype=torch.float64, device=device)
    partials = {torch.float64: wide, torch.float32: wide.view(torch.float32)}
    arrivals = memory[size:].view(torch.int32)
    return Workspace(arrivals, memory[:size], partials, groups, partial_bytes)


def _make_lasting(device: torch.device, groups: int, partial_bytes: int) -> Workspace:
    """Makes a workspace that outlives the call, by allocating it in another thread.

    The calling thread may be about to capture a CUDA graph and then allocates
    from the graph's own memory pool (`torch.compile(mode="reduce-overhead")` does
    so while it warms up). Nothing in that pool may be kept after the call.
    """
    stream = contextlib.nullcontext()
    if device.type in ("cuda", "xpu"):
        streams = getattr(torch, device.type)
        # Fill the counters in the caller's stream, ahead of the launches that use them.
        stream = streams.stream(streams.current_stream(device))

    def make() -> Workspace:
        with torch.inference_mode(False), stream:
            return _make(device, groups, partial_bytes)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()

"""A workspace holds the counters by which programs of a launch wait for each other.

Every device and stream has one workspace. Its counters are zero before a launch,
and the kernels leave them at zero (`kernels/tickets.py`), so no launch has to
clear them. Launches in one stream run one after the other and share a workspace;
launches in two streams may overlap and must not.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# A new workspace serves at least this many groups of channels, so that it seldom has to grow.
GROUPS = 4096


class Workspace(NamedTuple):
    """Counters for a number of groups of channels.

    Attributes:
        arrivals: int32 counters, one for each group of channels and one more.
        tickets: the int64 counter of tickets, then a flag for each group of channels.
        groups: how many groups of channels the counters serve.
    """

    arrivals: Tensor
    tickets: Tensor
    groups: int


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def get_workspace(device: torch.device, groups: int) -> Workspace:
    """Returns the workspace of the device's current stream, for so many groups of channels.

    A stream is identified by its handle. A stream that PyTorch did not make must
    not be destroyed while launches in it still run: its handle may be given to a
    new stream, which would then use the same counters.
    """
    stream = 0
    if device.type == "cuda":
        if _capturing(device):
            # A graph may be replayed in any stream, so it needs a workspace of its own.
            return _zeros(device, groups)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    elif device.type == "xpu":
        stream = torch.xpu.current_stream(device).sycl_queue
    found = _workspaces.get((device, stream))
    if found is None or found.groups < groups:
        found = _workspaces[device, stream] = _lasting_zeros(device, max(groups, GROUPS))
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


def _zeros(device: torch.device, groups: int) -> Workspace:
    """Makes a workspace from one allocation, so that one launch fills it with zeros."""
    # An even number of 8-byte words, so that the second part starts aligned to 16 bytes too.
    size = groups + 2 & ~1
    memory = torch.zeros(2 * size, dtype=torch.int64, device=device)
    return Workspace(memory[size:].view(torch.int32), memory[:size], groups)


def _lasting_zeros(device: torch.device, groups: int) -> Workspace:
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
            return _zeros(device, groups)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()

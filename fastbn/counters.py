"""Counters that the programs of a launch share: one set for each device and stream.

They are zero before a launch and after it (`kernels/tickets.py`), so nothing has
to be filled in between. Launches in one stream come one after the other; those in
two streams have two sets.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# Channel blocks that a set is made for at first.
BLOCKS = 4096


class Counters(NamedTuple):
    """int32 `arrivals` and int64 `tickets`, each longer than the channel blocks served."""

    arrivals: Tensor
    tickets: Tensor
    blocks: int


_sets: dict[tuple[torch.device, int], Counters] = {}


def counters(device: torch.device, blocks: int) -> Counters:
    """Those of the device's current stream, for so many channel blocks at least.

    Streams are told apart by their handles: one that is not PyTorch's may not be
    destroyed, and its handle used anew, while launches in it still run.
    """
    stream = 0
    if device.type == "cuda":
        if _captured(device):
            # They belong to the graph, which may be replayed in any stream.
            return _zeros(device, blocks)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    elif device.type == "xpu":
        stream = torch.xpu.current_stream(device).sycl_queue
    found = _sets.get((device, stream))
    if found is None or found.blocks < blocks:
        found = _sets[device, stream] = _lasting_zeros(device, max(blocks, BLOCKS))
    return found


def discard() -> None:
    """Forgets all sets: after a launch that failed nobody knows what they hold."""
    _sets.clear()


def _captured(device: torch.device) -> bool:
    """Whether a graph is recorded from the device's current stream."""
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _zeros(device: torch.device, blocks: int) -> Counters:
    """From one piece of memory, which takes one launch to fill; both parts start aligned."""
    size = blocks + 2 & ~1
    memory = torch.zeros(2 * size, dtype=torch.int64, device=device)
    return Counters(memory[size:].view(torch.int32), memory[:size], blocks)


def _lasting_zeros(device: torch.device, blocks: int) -> Counters:
    """`_zeros` that outlive the call.

    A thread about to record a CUDA graph allocates from the graph's own memory
    (`torch.compile(mode="reduce-overhead")` does so while it warms up), where
    nothing may stay behind. Another thread does not.
    """
    stream = contextlib.nullcontext()
    if device.type in ("cuda", "xpu"):
        streams = getattr(torch, device.type)
        # Filled before the launches that follow in the caller's stream.
        stream = streams.stream(streams.current_stream(device))

    def make() -> Counters:
        with torch.inference_mode(False), stream:
            return _zeros(device, blocks)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()

"""Runs a function in several processes that form a Gloo group."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .conftest import HAS_GPU

# No process waits longer than so many seconds for a peer.
TIMEOUT = 60

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch.distributed", "triton"])


def run(
    world: int, function: Callable, *arguments: Any, timeout: float = TIMEOUT, ends: bool = False
) -> list[Any]:
    """Returns what function(rank, *arguments) returns in each of `world` processes.

    An exception in a process fails the test. With `ends` the exception is returned instead, and for
    a process that ended without a result or an exception its exit status is.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            FORKS.Process(target=_rank, args=(rank, world, folder, timeout, function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        found = []
        for rank, process in enumerate(processes):
            process.join(2 * TIMEOUT)
            hangs = process.is_alive()
            process.kill()
            assert not hangs, f"process {rank} hangs"
            path = Path(folder, f"{rank}")
            if not path.exists():
                found.append(process.exitcode)
                continue
            result = torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
            if isinstance(result, BaseException) and not ends:
                raise result
            found.append(result)
        assert ends or all(process.exitcode == 0 for process in processes)
        return found


def _rank(
    rank: int, world: int, folder: str, timeout: float, function: Callable, arguments: tuple
) -> None:
    from .interpreter import mend

    if not HAS_GPU:
        mend()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    try:
        result = function(rank, *arguments)
    except Exception as error:
        error.add_note(f"in process {rank}:\n{traceback.format_exc()}") if hasattr(
            error, "add_note"
        ) else None
        result = error
    torch.save(result, f"{folder}/{rank}")
    if not isinstance(result, Exception):
        dist.destroy_process_group()

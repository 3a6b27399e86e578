"""Lets the processes that torchrun started, one for each GPU, share every batch."""

import io
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def join(device: torch.device) -> torch.device:
    """Joins the other processes, if there are any, and returns this process's own device.

    From then on only the first process prints.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank():
            sys.stdout = io.StringIO()
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(batch: Tensor) -> Tensor:
    """Returns this process's part of a batch. Each image is in the part of exactly one process."""
    return batch.tensor_split(size())[rank()]


def total(value: Tensor) -> Tensor:
    """Returns the sum of a value over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def parallel(net: nn.Module) -> nn.Module:
    """Returns a network whose gradients are the mean over all processes."""
    return DistributedDataParallel(net) if dist.is_initialized() else net

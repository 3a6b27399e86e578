"""How a tensor lies in memory, and its view as the kernels' (N, C, S)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which batch norm returns its output for this input, as in PyTorch.

    A tensor of any other strides is copied into this format first.
    """
    if x.is_contiguous() or x.dim() not in _CHANNELS_LAST:
        return torch.contiguous_format
    channels_last = _CHANNELS_LAST[x.dim()]
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch._prims_common.suggest_memory_format(x)


def sizes(x: Tensor, format: torch.memory_format) -> tuple[int, int, int]:
    """(N, C, S) of a tensor that is dense in the given format.

    The innermost axis is contiguous. Channels-last tensors and matrices are
    rows of channels: S is 1. A single channel is one long row: N is 1.
    """
    n, c, s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if c == 1:
        return 1, 1, n * s
    if format != torch.contiguous_format:
        return n * s, c, 1
    return n, c, s

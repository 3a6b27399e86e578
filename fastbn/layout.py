"""How a tensor lies in memory, and its view as the kernels' (N, C, S)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels.tiling import MASK_BITS

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which batch norm returns its output for this input, as PyTorch on a CPU.

    A tensor of any other strides is copied into this format first.
    """
    if x.is_contiguous() or x.dim() not in _CHANNELS_LAST:
        return torch.contiguous_format
    channels_last = _CHANNELS_LAST[x.dim()]
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch._prims_common.suggest_memory_format(x)


def dense(tensor: Tensor, format: torch.memory_format) -> Tensor:
    """A tensor in a memory format, by a copy if need be; one of few axes has a single format."""
    if tensor.dim() not in _CHANNELS_LAST:
        format = torch.contiguous_format
    return tensor.contiguous(memory_format=format)


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


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of mean, rstd and sums, for an input of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_sizes(x: Tensor) -> tuple[int, int]:
    """(rows, bytes a row) of the packed mask of `x`; bits run along the contiguous axis."""
    n, c, s = sizes(x, memory_format(x))
    rows, length = (n, c) if s == 1 else (n * c, s)
    return rows, (length + MASK_BITS - 1) // MASK_BITS


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The packed mask of `x` as booleans of its shape."""
    format = memory_format(x)
    bits = mask.view(*mask_sizes(x), 1) >> torch.arange(MASK_BITS, device=mask.device)
    _, c, s = sizes(x, format)
    bits = (bits & 1).bool().flatten(1)[:, : c if s == 1 else s]
    if format == torch.contiguous_format:
        return bits.reshape(x.shape)
    return bits.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)

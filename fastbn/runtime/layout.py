"""How a tensor lies in memory, and the (N, C, S) array as which the kernels see it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.tiling import MASK_BITS, Problem, alignment, mask_by_rows, plane_extent

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """Returns the memory format that batch norm's output has in PyTorch on a CPU.

    An input with any other strides is copied into this format first.
    """
    if x.is_contiguous() or x.dim() not in _CHANNELS_LAST:
        return torch.contiguous_format
    channels_last = _CHANNELS_LAST[x.dim()]
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch._prims_common.suggest_memory_format(x)


def dense(tensor: Tensor, format: torch.memory_format) -> Tensor:
    """Returns the tensor itself if it is dense in this memory format, else a copy that is.

    Tensors with other than four or five axes have only the contiguous format.
    """
    if tensor.dim() not in _CHANNELS_LAST:
        format = torch.contiguous_format
    return tensor.contiguous(memory_format=format)


def with_canonical_strides(x: Tensor) -> Tensor:
    """Returns a tensor whose axes of size 1 have the strides that its memory format gives them.

    Such axes may have any stride. PyTorch's batch norm on a CPU reads some of these strides as
    another layout, and then computes gradients from the wrong elements.
    """
    if 1 not in x.shape:
        return x
    format = memory_format(x)
    if not x.is_contiguous(memory_format=format):
        return x
    shape = x.shape
    axes = range(x.dim()) if format == torch.contiguous_format else (0, *range(2, x.dim()), 1)
    strides, stride = [0] * x.dim(), 1
    for axis in reversed(axes):
        strides[axis] = stride
        stride *= shape[axis]
    return x if x.stride() == tuple(strides) else x.as_strided(shape, strides)


def kernel_shape(shape: Sequence[int], format: torch.memory_format) -> tuple[int, int, int]:
    """Returns (N, C, S), the shape as which the kernels see a dense tensor.

    The last of the three axes that is longer than 1 is contiguous. Channels-last
    tensors and matrices are rows of channels, so S is 1. A tensor with one channel
    is one long row, so N is 1.
    """
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    if c == 1:
        return 1, 1, n * s
    if format != torch.contiguous_format:
        return n * s, c, 1
    return n, c, s


def problem_of(
    x: Tensor, training: bool = True, residual: bool = False, saves: str | None = None
) -> Problem:
    """Returns what the planner needs to know of a call with this input."""
    n, c, s = kernel_shape(x.shape, memory_format(x))
    return Problem(n, c, s, x.element_size(), training, residual, saves)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of mean, rstd and sums for an input of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_sizes(x: Tensor) -> tuple[int, int]:
    """Returns (rows, bytes a row) of the packed mask of `x`.

    Bits run along the rows of the array that the kernels see, or along its planes, and each
    row or plane starts with a new byte.
    """
    problem = problem_of(x, saves="mask")
    if mask_by_rows(problem):
        rows, length = problem.n, problem.c * problem.s
    else:
        rows, length = problem.n * problem.c, plane_extent(problem)
    return rows, (length + MASK_BITS - 1) // MASK_BITS


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Returns the packed mask of `x` as booleans of its shape."""
    format, problem = memory_format(x), problem_of(x, saves="mask")
    bits = mask.view(*mask_sizes(x), 1) >> torch.arange(MASK_BITS, device=mask.device)
    bits = (bits & 1).bool().flatten(1)
    # The remaining bits of a row's last byte belong to no element.
    if mask_by_rows(problem):
        bits = bits[:, : problem.c * problem.s]
    else:
        # Bits before a plane, from where its first tile begins, belong to none either.
        lead = torch.arange(problem.c, device=mask.device) * problem.s % alignment(problem)
        columns = lead[:, None] + torch.arange(problem.s, device=mask.device)
        bits = bits.view(problem.n, problem.c, -1)
        bits = bits.gather(2, columns.expand(problem.n, -1, -1))
    if format == torch.contiguous_format:
        return bits.reshape(x.shape)
    return bits.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)

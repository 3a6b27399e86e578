"""Makes random tensors for a case, so many that a cache can't hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Case

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Inputs:
    """What one training step of a layer reads.

    Attributes:
        x: the input.
        residual: the tensor to add, or None.
        dy: the gradient of the output.
    """

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Returns random tensors, since a GPU takes less power for zeros and clocks higher."""
    rank = len(case.size)
    layout = _CHANNELS_LAST[rank] if case.layout == "channels-last" else torch.contiguous_format
    dtype = getattr(torch, case.dtype)

    def normal(mean: float, std: float) -> Tensor:
        empty = torch.empty(case.size, dtype=dtype, device=device, memory_format=layout)
        return empty.normal_(mean, std)

    residual = normal(0.0, 1.0).requires_grad_() if case.epilogue.residual else None
    return Inputs(normal(0.7, 1.5).requires_grad_(), residual, normal(0.0, 1.0))


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Returns at least two sets, and so many that their inputs are three times the GPU's L2."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = max(2, math.ceil(3 * cache / case.tensor_bytes))
    return [make_inputs(case, device) for _ in range(count)]

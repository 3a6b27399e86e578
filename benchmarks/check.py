"""Checks a rival's results against float64, at the sizes that are timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs
from .rivals import Rival, forward, gradients
from .shapes import Case

# The error allowed, as a fraction of the largest value that makes up a channel's result. The half
# formats may be off by four units in the last place, since eager rounds between its operators, and
# float32 needs room for sums of millions of terms.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Closer than this many tolerances to the ReLU's kink, rounding may decide on which side a value is.
KINK = 4

# So many elements are computed in float64 at once. With what their gradients need, they take 3 GB.
CHUNK_ELEMENTS = 2**25


def worst_error(case: Case, rival: Rival, inputs: Inputs) -> float:
    """Returns the largest error of all results, as a multiple of the error that is allowed.

    A few channels at a time are computed in float64, since all of them would not fit into memory.
    Channels don't mix in batch norm, so that this makes no difference.

    Returns:
        At most 1 if all results are right, and infinity if one is not finite.
    """
    channels, norm = case.size[1], rival.norm
    step = max(1, CHUNK_ELEMENTS * channels // inputs.x.numel())
    chunks = [slice(first, first + step) for first in range(0, channels, step)]
    statistics = norm.running_mean.clone(), norm.running_var.clone()

    dy = inputs.dy.clone()
    if case.epilogue.relu:
        for chunk in chunks:
            z = _Exact(rival, inputs, statistics, chunk).z.detach()
            dy[_of(dy, chunk)] *= z.abs() > KINK * TOLERANCE[inputs.x.dtype]
    y = forward(rival, inputs)
    found = [y, *gradients(rival, replace(inputs, dy=dy), y), norm.running_mean, norm.running_var]
    errors = []
    for chunk in chunks:
        exact = _Exact(rival, inputs, statistics, chunk)
        for got, (right, allowed) in zip(found, exact.results(case, dy), strict=True):
            error = _largest(got[_of(got, chunk)].double() - right)
            errors.append((error / allowed).max())
    worst = torch.stack(errors).max().item()
    return worst if worst == worst else float("inf")


class _Exact:
    """Batch norm and residual of a chunk of channels in float64; `z` goes into the ReLU."""

    def __init__(
        self, rival: Rival, inputs: Inputs, statistics: tuple[Tensor, Tensor], chunk: slice
    ) -> None:
        def leaf(t: Tensor) -> Tensor:
            return t.detach()[_of(t, chunk)].to(torch.float64, copy=True).requires_grad_()

        # The norm is called without its activation, which `results` computes.
        norm = getattr(rival.norm, "without_activation", lambda: rival.norm)()
        self.norm = norm
        self.chunk = chunk
        self.leaves = [leaf(t) for t in (*inputs.leaves, norm.weight, norm.bias)]
        x, *residual, weight, bias = self.leaves
        self.mean, self.var = (t[chunk].double() for t in statistics)
        momentum, eps = norm.momentum, norm.eps
        self.z = F.batch_norm(x, self.mean, self.var, weight, bias, True, momentum, eps)
        for term in residual:
            self.z = self.z + term

    def results(self, case: Case, dy: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each result and the error allowed in each of its channels."""
        # All gradients have the tolerance of the input's dtype, in which PyTorch's compiler hands
        # the statistics to the backward on a CPU.
        tolerance = TOLERANCE[dy.dtype]
        dy = dy[_of(dy, self.chunk)].double()
        output = F.relu(self.z) if case.epilogue.relu else self.z
        yield output.detach(), tolerance * _largest(self.z)
        x, *residual, weight, _ = (t.detach() for t in self.leaves)
        largest = _largest(dy)
        slope = weight / x.var([0, *range(2, x.dim())]).sqrt()
        sums = largest * (x.numel() / x.shape[1]) ** 0.5  # the terms have random signs
        scales = [largest * slope, *(largest for _ in residual), sums, sums]
        gradients = torch.autograd.grad(output, self.leaves, dy)
        yield from ((g, tolerance * scale) for g, scale in zip(gradients, scales, strict=True))
        for statistic, scale in ((self.mean, _largest(x)), (self.var, self.var)):
            yield statistic, TOLERANCE[self.norm.running_mean.dtype] * scale


def _of(t: Tensor, chunk: slice) -> tuple[slice, ...]:
    """Returns the index of a chunk of channels."""
    return (chunk,) if t.dim() == 1 else (slice(None), chunk)


def _largest(t: Tensor) -> Tensor:
    """Returns the largest magnitude in each channel."""
    t = t.detach().abs()
    return t if t.dim() == 1 else t.amax([0, *range(2, t.dim())])

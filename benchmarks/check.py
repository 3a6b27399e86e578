"""Is a rival right? Against float64, at the sizes that are timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs
from .rivals import Rival, forward, gradients
from .shapes import Case

# Error allowed, as a fraction of the largest value that makes up a channel's
# result: four units in the last place of the half formats, since eager rounds
# between its operators; in float32 room for sums of millions of terms.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Closer to its kink than this many tolerances, rounding may decide the ReLU's side.
KINK = 4

# In float64 at once; a chunk and what its gradients need take some 3 GB.
CHUNK_ELEMENTS = 2**25


def worst_error(case: Case, rival: Rival, inputs: Inputs) -> float:
    """Largest error of output, gradients and running statistics, in units of what is allowed.

    Channels don't mix in batch norm: a few at a time are computed in float64,
    where all of them would not fit.

    Returns:
        At most 1 for a right result; infinite if one is not finite.
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

        # The activation is computed here, apart.
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
        """Each result and, for each channel, the error allowed in it."""
        # Of all gradients alike: on a CPU, PyTorch's compiler hands the statistics
        # to the backward in the input's dtype.
        tolerance = TOLERANCE[dy.dtype]
        dy = dy[_of(dy, self.chunk)].double()
        output = F.relu(self.z) if case.epilogue.relu else self.z
        yield output.detach(), tolerance * _largest(self.z)
        x, *residual, weight, _ = (t.detach() for t in self.leaves)
        largest = _largest(dy)
        slope = weight / x.var([0, *range(2, x.dim())]).sqrt()
        sums = largest * (x.numel() / x.shape[1]) ** 0.5  # that many terms of random sign
        scales = [largest * slope, *(largest for _ in residual), sums, sums]
        gradients = torch.autograd.grad(output, self.leaves, dy)
        yield from ((g, tolerance * scale) for g, scale in zip(gradients, scales, strict=True))
        for statistic, scale in ((self.mean, _largest(x)), (self.var, self.var)):
            yield statistic, TOLERANCE[self.norm.running_mean.dtype] * scale


def _of(t: Tensor, chunk: slice) -> tuple[slice, ...]:
    """Index of a chunk of channels."""
    return (chunk,) if t.dim() == 1 else (slice(None), chunk)


def _largest(t: Tensor) -> Tensor:
    """Largest magnitude in each channel."""
    t = t.detach().abs()
    return t if t.dim() == 1 else t.amax([0, *range(2, t.dim())])

"""Implementations of a case that are called in the same way: PyTorch's, compiled ones, fastbn's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fastbn

from .command_line import in_one_line
from .inputs import Inputs, make_inputs
from .shapes import Case


@dataclass(frozen=True)
class Rival:
    """An implementation in training mode.

    Attributes:
        norm: the module that holds parameters and running statistics.
        call: takes x and a residual or None, and returns y.
    """

    norm: nn.Module
    call: Callable[[Tensor, Tensor | None], Tensor]


def _initialised(norm: nn.Module) -> nn.Module:
    """Draws parameters with which every term of the formulas matters, and returns the norm."""
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.5)
    return norm


def _dimensions(case: Case) -> str:
    return f"{max(1, len(case.size) - 2)}d"


def eager(case: Case, device: torch.device) -> Rival:
    """Returns `nn.BatchNorm*d`, then `+ residual`, then `F.relu`."""
    norm = getattr(nn, f"BatchNorm{_dimensions(case)}")(case.size[1], device=device)
    relu = case.epilogue.relu

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        y = norm(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if relu else y

    return Rival(_initialised(norm), call)


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Hides the compiler's warnings, which are of its own code and of options not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled(
    case: Case, device: torch.device, options: dict[str, bool] | None = None
) -> Rival:  # fmt: skip
    """Returns `eager` under `torch.compile`, compiled in both directions."""
    # Without a reset, `torch.compile` compiles a function for eight shapes at most, and is silent.
    torch.compiler.reset()
    plain = eager(case, device)
    call = torch.compile(plain.call, fullgraph=True, dynamic=False, options=options)
    rival = Rival(plain.norm, call)
    with quiet_compiler():
        forward_backward(rival, make_inputs(case, device))
    return rival


def cooperative(case: Case, device: torch.device) -> Rival:
    """Returns `compiled` with cooperative reductions, which several programs share.

    They are off by default. Where Inductor can make them, on a GPU, its batch norm is fastest.
    """
    return compiled(case, device, {"triton.cooperative_reductions": True})


def fused(case: Case, device: torch.device) -> Rival:
    """Returns `FusedBatchNorm*d`, or `FusedBatchNormAct*d` if the epilogue has a ReLU."""
    act = "Act" if case.epilogue.relu else ""
    layer = getattr(fastbn, f"FusedBatchNorm{act}{_dimensions(case)}")
    norm = _initialised(layer(case.size[1], device=device))
    return Rival(norm, norm if act else lambda x, residual: norm(x))


RIVALS: dict[str, Callable[[Case, torch.device], Rival]] = {
    "eager": eager,
    "compile": compiled,
    "cooperative": cooperative,
    "fastbn": fused,
}

# The rivals that `torch.compile` compiles.
COMPILED = ("compile", "cooperative")


def forward(rival: Rival, inputs: Inputs) -> Tensor:
    """Runs a forward of training, which keeps what the backward needs."""
    return rival.call(inputs.x, inputs.residual)


def gradients(rival: Rival, inputs: Inputs, y: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients of the input, the residual if there is one, weight and bias."""
    wanted = (*inputs.leaves, rival.norm.weight, rival.norm.bias)
    return torch.autograd.grad(y, wanted, inputs.dy)


def forward_backward(rival: Rival, inputs: Inputs) -> tuple[Tensor, ...]:
    """Takes one training step of the layer and returns the gradients."""
    return gradients(rival, inputs, forward(rival, inputs))


def forward_round(rival: Rival, sets: Sequence[Inputs]) -> list[Tensor]:
    return [forward(rival, inputs) for inputs in sets]


def forward_backward_round(
    rival: Rival, sets: Sequence[Inputs]
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Runs all forwards first, so that no backward finds `x` in the cache, as in a network."""
    outputs = forward_round(rival, sets)
    return [(y, gradients(rival, inputs, y)) for inputs, y in zip(sets, outputs)]


# These are the rounds that are timed: they make a call with each set of inputs in turn. They return
# all results, so that none is freed within the round: if each result got the memory of the one
# before, its writes would stay in the cache.
DIRECTIONS: dict[str, Callable[[Rival, Sequence[Inputs]], list]] = {
    "forward": forward_round,
    "forward+backward": forward_backward_round,
}


def no_compiler(device: torch.device) -> str | None:
    """Returns why `torch.compile` can't be used on this machine, or None if it can."""
    try:
        with quiet_compiler():
            torch.compile(torch.relu)(torch.ones(2, device=device))
    except Exception as problem:
        return in_one_line(problem)
    return None


def kernels_only(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a call on a GPU that the kernels can't serve an error instead of a slower figure."""
    return fastbn.use_backend("triton" if device.type == "cuda" else "torch")

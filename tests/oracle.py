"""Runs a call of batch norm by fastbn, by PyTorch and exactly, and holds fastbn to one rule."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbn
from fastbn.activations import ACTIVATIONS
from fastbn.functional import tracked_batch_norm
from fastbn.reference import batch_norm as reference
from fastbn.runtime import workspace
from fastbn.runtime.layout import with_canonical_strides

# The rule is that fastbn's error against float64 is at most twice that of PyTorch's own operator on
# the same input, in the channel where PyTorch's is worst (since how a mean rounds is a matter of
# chance), plus this many units in the last place of the channel's largest value, or of the terms
# that cancel in it. In float64 the exact result is itself rounded, so that more units are allowed.
FLOOR_ULPS = {torch.float64: 32, torch.float32: 6, torch.float16: 0.5, torch.bfloat16: 0.5}
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in
           (torch.float64, torch.float32, torch.float16, torch.bfloat16)}  # fmt: skip

# Gradients are not compared where the activation's argument is this close to a kink, since rounding
# decides on which side of the kink it falls.
KINKS = (-3.0, 0.0, 3.0, 6.0)
KINK_WIDTH = 0.05

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call of batch norm."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    channels_last: bool = False
    training: bool = True
    activation: str = "none"
    residual: bool = False
    weight: bool = True
    bias: bool = True
    statistics: bool = True
    momentum: float | None = 0.1
    biased_running_var: bool = False
    skip_nonfinite: bool = False
    eps: float = 1e-5
    mean: float = 0.7
    std: float = 1.5


@dataclass
class Arguments:
    """The tensors of a case; a tensor that the case leaves out is None."""

    case: Case
    input: Tensor
    grad_output: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor

    def to(self, dtype: torch.dtype) -> Arguments:
        """Returns the same numbers in another dtype, in fresh memory."""

        def convert(t):
            return None if t is None else t.to(dtype, copy=True)

        return replace(
            self,
            **{
                name: convert(getattr(self, name))
                for name in (
                    "input", "grad_output", "weight", "bias", "residual", "running_mean",
                    "running_var",
                )
            },
            num_batches_tracked=self.num_batches_tracked.clone(),
        )  # fmt: skip


def make_arguments(case: Case, device: torch.device, num_batches_tracked: int = 3) -> Arguments:
    """Returns random tensors for a case."""
    c = case.shape[1]
    half = case.dtype in (torch.float16, torch.bfloat16)
    param_dtype = case.param_dtype or (torch.float32 if half else case.dtype)

    def lay_out(t):
        t = t.to(device, case.dtype)
        if case.channels_last:
            return t.contiguous(memory_format=CHANNELS_LAST[t.dim()])
        return t

    def parameter(t, wanted):
        return t.to(device, param_dtype) if wanted else None

    def normal():
        return torch.randn(case.shape, device=device)

    spread = torch.linspace(0.5, 2.0, c, device=device)
    spread = spread.reshape(1, c, *[1] * (len(case.shape) - 2))
    arguments = Arguments(
        case,
        input=lay_out(normal() * case.std * spread + case.mean),
        grad_output=lay_out(normal()),
        weight=parameter(torch.rand(c) + 0.5, case.weight),
        bias=parameter(torch.randn(c), case.bias),
        residual=lay_out(normal()) if case.residual else None,
        running_mean=parameter(torch.randn(c) * 0.1 + case.mean, case.statistics),
        running_var=parameter((torch.rand(c) + 0.5) * case.std**2, case.statistics),
        num_batches_tracked=torch.tensor(num_batches_tracked, device=device),
    )
    exact = _preactivation(arguments)
    far = torch.ones_like(exact, dtype=torch.bool)
    for kink in KINKS if case.activation != "none" else ():
        far &= (exact - kink).abs() > KINK_WIDTH
    arguments.grad_output *= far
    return arguments


@contextlib.contextmanager
def poisoned():
    """Fills uninitialised memory with NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        # The workspaces still hold partial results of earlier launches: these become NaN too.
        for one in workspace._workspaces.values():
            one.partials[torch.float32].view(torch.uint8).fill_(255)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_fastbn(arguments: Arguments) -> dict[str, Tensor]:
    """Returns the output, updated statistics and gradients that fastbn's kernels compute."""
    case = arguments.case

    def function(input, weight, bias, residual):
        return tracked_batch_norm(
            input, arguments.running_mean, arguments.running_var,
            arguments.num_batches_tracked if case.training else None, weight, bias, case.training,
            case.momentum, case.eps, case.activation, None, residual, case.biased_running_var,
            case.skip_nonfinite,
        )  # fmt: skip

    with fastbn.use_backend("triton"), poisoned():
        return _results(arguments, function)


def run_exact(arguments: Arguments) -> dict[str, Tensor]:
    """Returns the results of the reference in float64."""
    correction = 0.0 if arguments.case.biased_running_var else 1.0
    return _run_torch(arguments.to(torch.float64), partial(reference, correction=correction))


def run_native(arguments: Arguments) -> dict[str, Tensor]:
    """Returns the results of PyTorch's operators in the arguments' dtype."""

    def batch_norm(input, mean, var, weight, bias, *options):
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)  # since the backward on a GPU needs a weight
        unbiased = None if var is None else var.clone()
        output = F.batch_norm(input, mean, unbiased, weight, bias, *options)
        if var is not None:
            update(var, unbiased, input.numel() // input.shape[1])
        return output

    def update(var, unbiased, count):
        if arguments.case.training and arguments.case.biased_running_var:
            momentum = _momentum(arguments)
            unbiased = unbiased - (1 - momentum) * var
            var.mul_(1 - momentum)
            var += unbiased * ((count - 1) / count)
        else:
            var.copy_(unbiased)

    fresh = clone(arguments)
    # PyTorch's gradients on a CPU are wrong if an axis of size 1 has an unusual stride.
    for name in ("input", "grad_output", "residual"):
        if getattr(fresh, name) is not None:
            setattr(fresh, name, with_canonical_strides(getattr(fresh, name)))
    return _run_torch(fresh, batch_norm)


def _run_torch(arguments: Arguments, batch_norm) -> dict[str, Tensor]:
    case = arguments.case
    momentum = _momentum(arguments)
    if case.training:
        arguments.num_batches_tracked += 1

    def function(input, weight, bias, residual):
        z = batch_norm(
            input, arguments.running_mean, arguments.running_var, weight, bias, case.training,
            momentum, case.eps,
        )  # fmt: skip
        if residual is not None:
            z = z + residual
        activation = ACTIVATIONS[case.activation]
        return activation.function(z, activation.default)

    return _results(arguments, function)


def _momentum(arguments: Arguments) -> float:
    if arguments.case.momentum is None:
        return 1 / (arguments.num_batches_tracked.item() + 1)
    return arguments.case.momentum


def _preactivation(arguments: Arguments) -> Tensor:
    case = arguments.case
    none = replace(arguments, case=replace(case, activation="none"))
    return run_exact(none)["output"]


def _results(arguments: Arguments, function) -> dict[str, Tensor]:
    names = ("input", "weight", "bias", "residual")
    tensors = [getattr(arguments, name) for name in names]
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    present = [(name, leaf) for name, leaf in zip(names, leaves) if leaf is not None]
    grads = torch.autograd.grad(output, [leaf for _, leaf in present], arguments.grad_output)
    results = {"output": output.detach()}
    results |= {f"grad_{name}": grad for (name, _), grad in zip(present, grads)}
    if arguments.running_mean is not None:
        results["running_mean"] = arguments.running_mean
        results["running_var"] = arguments.running_var
    results["num_batches_tracked"] = arguments.num_batches_tracked
    return results


def check(case: Case, device: torch.device) -> None:
    """Runs a case in all three ways and holds each of fastbn's results to the rule."""
    compare(make_arguments(case, device))


def compare(arguments: Arguments) -> None:
    """Does what `check` does, for given tensors."""
    assert_right(run_fastbn(clone(arguments)), arguments, expect(arguments))


class Expected(NamedTuple):
    """What a call's results are compared with.

    Attributes:
        exact: the results in float64.
        native: PyTorch's results, whose dtypes, shapes and strides fastbn's must have.
        yardstick: the results of PyTorch's own kernels, to whose error fastbn's is held.
    """

    exact: dict[str, Tensor]
    native: dict[str, Tensor]
    yardstick: dict[str, Tensor]


def expect(arguments: Arguments) -> Expected:
    """Returns what a call's results are compared with."""
    native = run_native(arguments)
    # cuDNN's errors on hostile input are too large to be a yardstick.
    with torch.backends.cudnn.flags(enabled=False):
        yardstick = run_native(arguments) if arguments.input.is_cuda else native
    return Expected(run_exact(arguments), native, yardstick)


def assert_right(actual: dict[str, Tensor], arguments: Arguments, expected: Expected) -> None:
    """Holds the results of `run_fastbn` to the rule."""
    case, (exact, native, yardstick) = arguments.case, expected
    assert actual.keys() == exact.keys()
    for name in actual:
        assert actual[name].dtype == native[name].dtype, name
        assert actual[name].shape == native[name].shape, name
        if name == "num_batches_tracked":
            assert actual[name].equal(native[name])
            continue
        if actual[name].shape == arguments.input.shape:
            assert actual[name].stride() == native[name].stride(), name
        scale = torch.maximum(_largest(exact[name]), _terms(name, arguments))
        actual_error = _largest(actual[name].double() - exact[name])
        native_error = _largest(yardstick[name].double() - exact[name])
        # Where PyTorch's result is not finite, fastbn's error may only be the units of the rule.
        native_error.masked_fill_(~native_error.isfinite(), 0.0)
        ulps = FLOOR_ULPS[actual[name].dtype] * EPSILON[actual[name].dtype]
        allowed = (2 * (native_error / scale).max() + ulps) * scale
        worst = (actual_error / allowed).max().item()
        assert worst <= 1, f"{name} is {worst:.3g} times as far off as allowed: {case}"


def _terms(name: str, arguments: Arguments) -> Tensor:
    """Returns the size of the terms whose sum or difference each channel's result is."""
    x = arguments.input.double()
    axes = [0, *range(2, x.dim())]
    grad = _largest(arguments.grad_output.double())
    if name == "running_mean":
        return _largest(x)
    if name in ("grad_weight", "grad_bias"):
        # The sum of M terms of random sign grows with the root of M.
        return grad * (x.numel() / x.shape[1]) ** 0.5
    scale = (x.var(axes, correction=0) + arguments.case.eps).rsqrt()
    if arguments.weight is not None:
        scale *= arguments.weight.double().abs()
    if name == "grad_input":
        return grad * scale
    if name == "output":
        return _largest(x - x.mean(axes, keepdim=True)) * scale
    return torch.full_like(grad, torch.finfo(torch.float64).tiny)


def _largest(t: Tensor) -> Tensor:
    """Returns the largest magnitude in each channel."""
    return t.abs() if t.dim() == 1 else t.abs().amax([0, *range(2, t.dim())])


def clone(arguments: Arguments) -> Arguments:
    """Returns a copy with the same layout in memory, gaps included: `Tensor.clone` fills them."""

    def copy(t):
        storage = t.untyped_storage().clone()
        return t.new_empty(0).set_(storage, t.storage_offset(), t.size(), t.stride())

    tensors = {name: t for name, t in vars(arguments).items() if isinstance(t, Tensor)}
    return replace(arguments, **{name: copy(t) for name, t in tensors.items()})

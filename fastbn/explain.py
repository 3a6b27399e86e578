"""`explain` says what fastbn would do with an input, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .activations import saved_for
from .backend import get_backend
from .functional import as_float, check_residual
from .kernels.plan import Plan, make_plan
from .kernels.schedules import Schedule
from .models.report import ModelExplanation, explain_model
from .modules import _Fused, _FusedAct, arguments_of, fused_activation
from .runtime import support
from .runtime.device import device_facts
from .runtime.layout import problem_of
from .strategy import get_strategy
from .sync.modules import _Synchronised


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`, which prints as plain words.

    Attributes:
        backend: "triton", "torch", or "none" if the call is an error.
        reason: why this backend serves the call, or the error.
        plan: all launch decisions, with the predicted time of both directions;
            None if PyTorch serves the call.
        after: what PyTorch does after the kernels: drop layer, residual, activation.
        strategy: what `use_strategy` asks for; the plan says what each direction takes.
        device: name of the device that the plan is for.
        forward_bytes, backward_bytes: bytes of the tensors that each direction of a
            training step reads and writes. The forward of a call without gradients
            writes no mask and so moves a little less. Reads that the second of two
            passes finds in a cache count, and reads that a ticketed launch repeats
            from the cache do not.
        forward_seconds, backward_seconds: the time that these bytes take at the
            device's bandwidth; None if the bandwidth is unknown.
        processes: how many processes share the statistics.
    """

    backend: str
    reason: str
    plan: Plan | None = None
    after: tuple[str, ...] = ()
    strategy: str = "auto"
    device: str | None = None
    forward_bytes: int | None = None
    backward_bytes: int | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    processes: int = 1

    def __str__(self) -> str:
        if self.backend == "none":
            return f"This call is an error: {self.reason}."
        shared = ""
        if self.processes > 1:
            shared = (
                f"\nStatistics are shared by {self.processes} processes: the forward takes"
                " an all-gather and a launch more, the backward an all-reduce."
            )
        if self.plan is None:
            return f"PyTorch's own batch norm serves this call: {self.reason}." + shared
        plan, problem = self.plan, self.plan.problem
        forward = self._in_words(plan.forward, self.forward_bytes, self.forward_seconds)
        backward = self._in_words(plan.backward, self.backward_bytes, self.backward_seconds)
        sizes = f"({problem.n}, {problem.c}, {problem.s})"
        return (
            f"Triton kernels serve this call: {self.reason}.\n"
            f"Input:    {problem.layout}, seen as (N, C, S) = {sizes}.\n"
            f"Forward:  {forward}\nBackward: {backward}"
            + (f"\nAfter the kernels, in PyTorch: {', '.join(self.after)}." if self.after else "")
            + shared
        )

    def _in_words(self, schedule: Schedule, bytes: int | None, seconds: float | None) -> str:
        """Describes one direction of the plan in a sentence."""
        assert self.plan is not None
        assert bytes is not None
        problem, chosen = self.plan.problem, schedule.strategy
        if problem.training and self.strategy not in ("auto", chosen):
            chosen += f" (since {self.strategy} can't serve it)"
        launches = f"{schedule.launches} launch{'es' if schedule.launches > 1 else ''}"
        access = f"{schedule.tile.access_bytes(problem.itemsize)}-byte accesses"
        size = f"{bytes / 1e6:.2f} MB" if bytes >= 1e6 else f"{bytes / 1e3:.2f} kB"
        cached = f", {schedule.cached_units:g} more from the cache" if schedule.cached_units else ""
        time = "" if seconds is None else f", {seconds * 1e6:.1f} us at full bandwidth"
        return (
            f"{chosen}, {launches}, {access};"
            f" {schedule.units:g} tensors read or written = {size}{time}{cached}."
        )


def _error(
    reason: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *args: Any,
    residual: Tensor | None,
) -> str | None:
    """Returns the error that a call which the kernels can't serve ends with, or None."""
    insists = get_backend() == "triton" and support.bypass_reason() is None
    if insists and reason != support.PYTORCH_REFUSES:
        return f"backend 'triton' can't serve this call because {reason}"
    mean, var = (None if t is None else t.clone() for t in (running_mean, running_var))
    try:
        output = F.batch_norm(input, mean, var, *args)
        if residual is not None:
            output + residual
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return str(error).rstrip(".")
    return None


@overload
def explain(
    module: _Fused | None, input: Tensor, residual: Tensor | None = None
) -> Explanation: ...


@overload
def explain(
    module: nn.Module | None, input: Any = None, residual: Tensor | None = None
) -> Explanation | ModelExplanation: ...


def explain(
    module: nn.Module | None, input: Any = None, residual: Tensor | None = None
) -> Explanation | ModelExplanation:
    """Says which backend would serve a call, how, and what traffic it costs; or, of a model, what
    is computed with each of its norms.

    Args:
        module: one of fastbn's modules in the mode to explain, None for a plain batch norm in
            training, or a model, of which the current mode is explained.
        input: the tensor that the module would get, of shape (N, C) or (N, C, ...). For a model
            it is optional and may be a tuple of arguments; with it bytes are counted.
        residual: the tensor that the module would add, if any.

    Returns:
        A dataclass that prints as plain words, for a model a `ModelExplanation`. If PyTorch
        serves a norm's call, `explain` tries the call on copies of the statistics to find the
        error that it may end with. Bytes count each tensor of the input's size once for
        every time that the kernels read or write it. They don't count statistics,
        parameters, or the copy that an input of other strides needs first.

    Raises:
        TypeError: the module is no module, or the input of a norm is no tensor.
    """
    if module is not None and not isinstance(module, _Fused):
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a module or None, but got a {type(module).__name__}")
        return explain_model(module, input)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, but got a {type(input).__name__}")
    weight = bias = running_mean = running_var = num_batches_tracked = None
    training, eps, activation = True, 1e-5, "none"
    momentum: float | None = 0.1
    after: tuple[str, ...] = ()
    try:
        if residual is not None:
            check_residual(input, residual)
        if module is not None:
            module._check_input_dim(input)
    except (TypeError, ValueError) as error:
        return Explanation("none", str(error))
    processes = module.processes() if isinstance(module, _Synchronised) else 1
    if module is not None:
        (
            running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps,
        ) = arguments_of(module)  # fmt: skip
        momentum, eps = as_float(momentum), as_float(eps)
        if residual is not None and not isinstance(module, _FusedAct):
            return Explanation("none", f"{type(module).__name__} takes no residual")
        fused = fused_activation(module)
        if fused is not None:
            activation = fused[0]
        else:
            # PyTorch applies these in this order.
            layers = (module.drop, residual, module.act)
            after = tuple(
                "residual" if layer is residual else type(layer).__name__
                for layer in layers
                if layer is not None and type(layer) is not nn.Identity
            )
            residual = None
    statistics = (running_mean, running_var)
    reason = support.bypass_reason() or support.unsupported_reason(
        input, residual, weight, bias, *statistics, num_batches_tracked, training, momentum, eps
    )
    if reason is not None:
        numbers = (training, 0.1 if momentum is None else momentum, eps)
        message = _error(reason, input, *statistics, weight, bias, *numbers, residual=residual)
        if message:
            return Explanation("none", message)
        return Explanation("torch", reason, processes=processes)

    saves = saved_for(activation, residual is not None)
    device = device_facts(input.device)
    strategy = get_strategy() if processes == 1 else "two-pass"
    plan = make_plan(problem_of(input, training, residual is not None, saves), device, strategy)
    unit = plan.problem.tensor_bytes
    forward, backward = round(plan.forward.units * unit), round(plan.backward.units * unit)

    def seconds(bytes: int) -> float | None:
        return None if device.bandwidth is None else bytes / device.bandwidth

    return Explanation(
        "triton", f"{device.name} runs them", plan, after, strategy, device.name,
        forward, backward, seconds(forward), seconds(backward), processes,
    )  # fmt: skip

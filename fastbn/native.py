"""PyTorch's own batch norm, with derivatives that are right where PyTorch's are not.

PyTorch's formulas treat the statistics of the batch as constants in third derivatives, and in
second derivatives that involve forward mode. Its kernels on a CPU compute wrong gradients where an
axis of size 1 has an unusual stride and the output's gradient has another layout than the input.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from torch.utils.hooks import RemovableHandle

from . import reference
from .runtime import support
from .runtime.layout import with_canonical_strides


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    correction: float = 1.0,
) -> Tensor:
    """Does what `torch.nn.functional.batch_norm` does, and raises the errors that it raises.

    With a correction of 0 instead of 1, the running variance is updated by the biased variance.
    """
    if training and correction == 0.0 and running_var is not None and input.numel():
        return _with_biased_variance(input, running_mean, running_var, weight, bias, momentum, eps)
    arguments = (running_mean, running_var, weight, bias, training, momentum, eps)
    if support.transforms_active():
        # PyTorch checks the arguments and updates the running statistics.
        F.batch_norm(input.detach(), *arguments)
        mean, var = (None, None) if training else (running_mean, running_var)
        return reference.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    # A compiler runs no eager backward to correct, and a trace must hold only PyTorch's operators.
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return F.batch_norm(input, *arguments)
    if torch.is_grad_enabled() and isinstance(input, Tensor):
        input = with_canonical_strides(input)
    output = F.batch_norm(input, *arguments)
    if output.requires_grad:
        # `Tensor.register_hook` does the same, but makes a dictionary and a handle for each
        # tensor, which takes as long as a small call.
        node: Any = output.grad_fn
        node._register_hook_dict(_hooked)
    return output


def _with_biased_variance(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Calls `batch_norm` for training, and undoes Bessel's correction of the running variance."""
    update = torch.zeros_like(running_var)
    output = batch_norm(input, running_mean, update, weight, bias, True, momentum, eps)
    count = input.numel() // input.shape[1]
    running_var.mul_(1 - momentum).add_(update * ((count - 1) / count))
    return output


def _before_backward(grad_output: Tensor) -> Tensor:
    """Gives the gradient strides that PyTorch's backward reads rightly.

    Where the backward may be differentiated, the reference replaces its results instead.
    """
    if not support.backward_is_differentiated():
        return with_canonical_strides(grad_output)
    node: Any = torch._C._current_autograd_node()
    # The graph has no node of batch norm if, for example, the input is empty.
    if hasattr(node, "_saved_training"):
        # The node holds the hook, so a hook that held the node would make a reference cycle.
        handle: RemovableHandle = node.register_hook(lambda *grads: _by_reference(handle, *grads))
    return grad_output


def _by_reference(
    handle: RemovableHandle,
    grad_inputs: tuple[Tensor | None, ...],
    grad_outputs: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of batch norm's node, in a form that can be differentiated."""
    handle.remove()
    node: Any = torch._C._current_autograd_node()
    try:
        input, weight = node._saved_input, node._saved_weight
        fixed = (
            None if node._saved_training else (node._saved_running_mean, node._saved_running_var)
        )
    except CheckpointError:
        # A checkpoint gives out each saved tensor once, and PyTorch's own backward has taken it.
        return tuple(None if grad is None else _TwiceAtMost.apply(grad) for grad in grad_inputs)
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    dx, _, dw, db = reference.batch_norm_backward(
        grad_outputs[0], input, weight, None, fixed, eps, "none", 0.0, None
    )
    return tuple(
        None if computed is None else grad.to(computed.dtype)
        for computed, grad in zip(grad_inputs, (dx, dw, db))
    )


class _TwiceAtMost(torch.autograd.Function):
    """The identity on a first derivative that PyTorch computed; third derivatives are an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if support.backward_is_differentiated():
            raise RuntimeError(
                "batch norm within a checkpoint has no third derivatives where PyTorch serves the"
                " call: take second ones without create_graph, or the layer out of the checkpoint"
            )
        return grad


# All graphs share the hooks of this tensor.
_hooked = torch.empty(0)
_hooked._backward_hooks = OrderedDict({0: _before_backward})

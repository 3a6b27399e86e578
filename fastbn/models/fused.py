"""`fused` computes norm, residual and activation in one call wherever that changes nothing.

This is decided anew at each call, so that hooks, replaced modules, other shapes and other types
are noticed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.fx.proxy import Proxy

from ..activations import ACTIVATIONS, activation_of, has_global_hooks, has_hooks
from ..modules import _Fused
from .generated import Generated
from .kinds import is_bare_norm, is_unpatched, passes_unchanged

_NONE = ("none", None)
_STOCK_CALL = nn.Module.__call__


def _add_to(output: Any, residual: Any) -> Any:
    return residual + output


def _iadd_to(output: Any, residual: Any) -> Any:
    return operator.iadd(residual, output)


# The ways to add a residual to an output, by names that can be constants of a graph.
_ADDITIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "iadd": operator.iadd,
    "add_to": _add_to,
    "iadd_to": _iadd_to,
}

# An activation is a module, or name and parameter of one that the kernels know, or None.
Act = nn.Module | tuple[str, float | None] | None


def fused(
    module: nn.Module,
    input: Tensor,
    act: Act = None,
    residual: Tensor | None = None,
    add: str | None = None,
    before: tuple[nn.Module, ...] = (),
    after: tuple[nn.Module, ...] = (),
) -> Tensor:
    """Returns act(after(add(before(module(input)), residual))), in one call if possible.

    Args:
        module: one of fastbn's norms, or a Sequential or an owner that ends in one; any other
            module is called as it is.
        input: the module's input.
        act: the activation: a module, or name and parameter as `batch_norm` takes them, or None.
        residual: what is added, if `add` says that something is.
        add: how the two are added: "add", "iadd" (in place), or with the residual as the first
            summand "add_to", "iadd_to"; None if nothing is added.
        before, after: layers that the module's output and the sum pass, such as drop layers,
            which must return their input for the call to be one.
    """
    activation = _activation(act)
    if activation is not None and passes_unchanged(before + after) and is_plain_call(module, input):
        if isinstance(module, _Fused):
            if (add is None or _adds_plainly(residual, input, add)) and is_bare_norm(module):
                return module.normalise(input, *activation, residual)
        elif isinstance(module, Generated) and module._fastbn_ends_in_norm and is_unpatched(module):
            return module._fastbn_forward_then(input, act, residual, add, before, after)
    return unfused(module(input), act, residual, add, before, after)


def unfused(
    output: Tensor,
    act: Act,
    residual: Tensor | None,
    add: str | None,
    before: tuple[nn.Module, ...],
    after: tuple[nn.Module, ...],
) -> Tensor:
    """Returns what `fused` returns, from the module's output."""
    for layer in before:
        output = layer(output)
    if add is not None:
        output = _ADDITIONS[add](output, residual)
    for layer in after:
        output = layer(output)
    if isinstance(act, tuple):
        return activate(output, *act)
    return output if act is None else act(output)


def activate(output: Tensor, name: str, param: float | None) -> Tensor:
    """Returns an activation of the table, by PyTorch's function."""
    activation = ACTIVATIONS[name]
    return activation.function(output, activation.default if param is None else param)


def _activation(act: Act) -> tuple[str, float | None] | None:
    """Returns name and parameter of an activation, or None if the kernels don't know it."""
    if act is None:
        return _NONE
    return act if isinstance(act, tuple) else activation_of(act)


def _adds_plainly(residual: Any, input: Tensor, add: str) -> bool:
    """Says whether the kernels' sum with a residual is what PyTorch's would be."""
    if not isinstance(residual, Tensor) or residual.shape != input.shape:
        return False
    # A sum has the strides of its first summand.
    if add.endswith("_to") and residual.stride() != input.stride():
        return False
    return residual.dtype == input.dtype and residual.device == input.device


def is_plain_call(module: nn.Module, input: Any) -> bool:
    """Says whether a call of a module with a tensor runs its `forward` and nothing else."""
    return (
        not isinstance(input, Proxy)
        # TorchScript's trace would record comparisons of shapes as a part of the model.
        and not torch.jit.is_tracing()
        and not has_hooks(module)
        and not has_global_hooks()
        and module._compiled_call_impl is None
        and type(module).__call__ is _STOCK_CALL
    )

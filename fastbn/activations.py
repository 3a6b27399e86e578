"""A table of the activations that the kernels compute, with one row for each.

To add one, add its row here and its two lines to `activate` and `activation_backward`
in `kernels/epilogue.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as _modules

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: the name by which `batch_norm` and the kernels know it.
        module: the module class that computes it.
        function: maps the argument and the parameter to the activation.
        derivative: maps the result's gradient, the argument and the parameter to the
            argument's gradient, by operations that can be differentiated in turn.
        parameter: the attribute of a module that holds the parameter, or None if the
            activation has no parameter.
        default: PyTorch's default of the parameter, 0 if there is none.
        options: (name, value) pairs of further arguments of the module class, which become
            attributes of the module.
        constants: (name, value) pairs of attributes that no argument sets, but that the
            module's `forward` reads.
        saves: what the backward keeps of the argument where there is a residual: "residual",
            from which it recomputes the argument, or "mask", the argument's sign in one
            bit, if the derivative depends on nothing else.
        aliases: other names that `act_layer` accepts.
    """

    name: str
    module: type[nn.Module]
    function: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, Tensor, float], Tensor]
    parameter: str | None = None
    default: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    saves: str | None = "residual"
    aliases: tuple[str, ...] = ()


def _silu_backward(dy: Tensor, z: Tensor) -> Tensor:
    """Computes the derivative of SiLU; PyTorch's own operator for it can't be differentiated."""
    sigmoid = torch.sigmoid(z)
    return dy * sigmoid * (1 + z * (1 - sigmoid))


_TABLE = (
    Activation("none", nn.Identity, lambda z, _: z, lambda dy, z, _: dy, saves=None),
    Activation(
        "relu",
        nn.ReLU,
        lambda z, _: F.relu(z),
        lambda dy, z, _: _aten.threshold_backward(dy, z, 0.0),
        saves="mask",
    ),
    Activation(
        "leaky_relu",
        nn.LeakyReLU,
        F.leaky_relu,
        lambda dy, z, slope: _aten.leaky_relu_backward(dy, z, slope, False),
        parameter="negative_slope",
        default=0.01,
        saves="mask",
    ),
    Activation(
        "silu",
        nn.SiLU,
        lambda z, _: F.silu(z),
        lambda dy, z, _: _silu_backward(dy, z),
        aliases=("swish",),
    ),
    Activation(
        "gelu",
        nn.GELU,
        lambda z, _: F.gelu(z),
        lambda dy, z, _: _aten.gelu_backward(dy, z),
        options=(("approximate", "none"),),
    ),
    Activation(
        "gelu_tanh",
        nn.GELU,
        lambda z, _: F.gelu(z, approximate="tanh"),
        lambda dy, z, _: _aten.gelu_backward(dy, z, approximate="tanh"),
        options=(("approximate", "tanh"),),
    ),
    Activation(
        "hardswish",
        nn.Hardswish,
        lambda z, _: F.hardswish(z),
        lambda dy, z, _: _aten.hardswish_backward(dy, z),
        aliases=("hard_swish",),
    ),
    Activation(
        "relu6",
        nn.ReLU6,
        lambda z, _: F.relu6(z),
        lambda dy, z, _: _aten.hardtanh_backward(dy, z, 0.0, 6.0),
        constants=(("min_val", 0.0), ("max_val", 6.0)),
    ),
    Activation(
        "elu",
        nn.ELU,
        F.elu,
        lambda dy, z, alpha: _aten.elu_backward(dy, alpha, 1.0, 1.0, False, z),
        parameter="alpha",
        default=1.0,
    ),
    Activation(
        "sigmoid",
        nn.Sigmoid,
        lambda z, _: torch.sigmoid(z),
        lambda dy, z, _: _aten.sigmoid_backward(dy, torch.sigmoid(z)),
    ),
    Activation(
        "tanh",
        nn.Tanh,
        lambda z, _: torch.tanh(z),
        lambda dy, z, _: _aten.tanh_backward(dy, torch.tanh(z)),
    ),
)

# The rows by name, and by all names that `act_layer` accepts.
ACTIVATIONS = {row.name: row for row in _TABLE}
ACT_LAYERS = {name: row for row in _TABLE for name in (row.name, *row.aliases)}


def _stock_forward(module_class: type[nn.Module]) -> Callable | None:
    """Returns PyTorch's own `forward` of a class, or None if somebody has replaced it."""
    owner = next(base for base in module_class.__mro__ if "forward" in base.__dict__)
    forward = module_class.forward
    stock_name = (owner.__module__, f"{owner.__qualname__}.forward")
    stock = (forward.__module__, forward.__qualname__) == stock_name
    return forward if stock and not hasattr(forward, "__wrapped__") else None


_Module, _STOCK_CALL = nn.Module, nn.Module.__call__
# For each module class its stock `forward`, and for each row of that class the name, the attribute
# of the parameter, and the values that other attributes of a module must have.
_BY_MODULE: dict[type[nn.Module], tuple[Callable | None, list]] = {}
for _row in _TABLE:
    _, _rows = _BY_MODULE.setdefault(_row.module, (_stock_forward(_row.module), []))
    _rows.append((_row.name, _row.parameter, _row.options + _row.constants))


def activation_of(module: nn.Module) -> tuple[str, float | None] | None:
    """Returns name and parameter of the activation that a call of a module computes.

    Returns None unless the call would compute an activation of the table and do nothing
    else: a subclass, a hook or a replaced `forward` may do anything. The caller checks for
    hooks on all modules, by `has_global_hooks`.
    """
    module_class = type(module)
    if module_class not in _BY_MODULE:
        return None
    stock_forward, rows = _BY_MODULE[module_class]
    if (
        stock_forward is None
        or not runs(module, stock_forward)
        or _Module.__call__ is not _STOCK_CALL
        or has_hooks(module)
    ):
        return None
    for name, parameter, attributes in rows:
        for attribute, value in attributes:
            if getattr(module, attribute) != value:
                break
        else:
            return name, None if parameter is None else getattr(module, parameter)
    return None


def runs(module: nn.Module, forward: Any) -> bool:
    """Says whether a module's `forward` is the given function.

    The code of both is compared, since `torch.compile` can't tell which function a method runs.
    """
    return getattr(module.forward, "__code__", None) is forward.__code__


def has_hooks(module: nn.Module) -> bool:
    """Says whether a call of a module runs hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Says whether calls of all modules run hooks, as `register_module_forward_hook` adds them."""
    return bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def saved_for(activation: str, residual: bool) -> str | None:
    """Returns what the backward keeps besides input, statistics and parameters.

    Without a residual it keeps nothing else: it recomputes the argument from these tensors.
    """
    return ACTIVATIONS[activation].saves if residual else None


def reads_bias(activation: str, saved: str | None) -> bool:
    """Says whether a backward that keeps `saved` recomputes the argument, and so needs the bias."""
    return activation != "none" and saved != "mask"

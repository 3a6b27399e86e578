"""Makes an `nn.Sequential` compute each norm and the activation after it in one call."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from .fused import fused
from .generated import Generated, set_class, subclass
from .kinds import ends_in_norm, is_activation


class FusedSequential(Generated):
    """The `forward` of generated classes whose other base class is a Sequential."""

    _modules: dict[str, Any]

    @property
    def _fastbn_ends_in_norm(self) -> bool:
        modules = list(self._modules.values())
        return len(modules) > 0 and ends_in_norm(modules[-1])

    def forward(self, input: Any) -> Any:
        return _run(list(self._modules.values()), input)

    def _fastbn_forward_then(self, input: Any, *rest: Any) -> Any:
        *modules, last = self._modules.values()
        # The Sequential ends in a norm when this is called, so the last module has no activation.
        return fused(last, _run(modules, input), *rest)


def _run(modules: list[nn.Module], value: Any) -> Any:
    i = 0
    while i < len(modules):
        module = modules[i]
        if i + 1 < len(modules) and ends_in_norm(module) and is_activation(modules[i + 1]):
            value = fused(module, value, modules[i + 1])
            i += 2
        else:
            value = module(value)
            i += 1
    return value


_classes: dict[Any, type[nn.Module]] = {}


def fuse_sequential(module: nn.Sequential) -> None:
    """Gives a Sequential the generated class, if it has a module that ends in a norm."""
    if isinstance(module, FusedSequential):
        return
    children = list(module._modules.values())
    stock = type(module).__iter__ is nn.Sequential.__iter__
    if not stock or not any(map(ends_in_norm, children)):
        return
    kind: Any = type(module)
    if kind not in _classes:
        _classes[kind] = subclass(kind, FusedSequential, {})
    set_class(module, _classes[kind])

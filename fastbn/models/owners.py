"""Owners are modules whose `forward` calls norms. They get a class with a generated `forward`.

The generated `forward` has a variant for each value of `training` and each pattern of arguments
(given, None, or a constant). A variant is valid while the attributes that the module's
own `forward` read when it was traced are as they were. Where no variant is valid, the `forward`
is traced anew, and if that fails the module's own `forward` runs.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from types import FunctionType
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.fx.proxy import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from .fused import unfused
from .generated import Generated, set_class, subclass
from .kinds import (
    ends_in_norm,
    is_activation,
    keeps_nothing,
    lets_go,
    makes_fresh,
    may_pass_unchanged,
)
from .tracing import GIVEN
from .variants import Owner, Variant, kind_of


class FusedOwner(Generated):
    """The `forward` of generated classes whose other base class is an owner's own."""

    _fastbn_owner: Owner

    @property
    def _fastbn_ends_in_norm(self) -> bool:
        found = (v for variants in self._fastbn_owner.variants.values() for v in variants)
        return any(v.forward_then is not None and v.holds(self) for v in found)

    @property
    def _fastbn_makes_fresh(self) -> bool:
        variants = current_variants(self)
        return bool(variants) and all(
            v.fresh is not None and all(makes_fresh(self.get_submodule(p)) for p in v.fresh)
            for v in variants
        )

    @property
    def _fastbn_lets_go(self) -> bool:
        return all(
            v.kept is not None and all(_lets_go(self.get_submodule(p)) for p in v.kept)
            for v in current_variants(self)
        )

    def _fastbn_forward_then(self, input: Any, *rest: Any) -> Any:
        owner = self._fastbn_owner
        variant = owner.variant(self, owner.bind((input,), {}))
        if variant is None or variant.forward_then is None:
            return unfused(self(input), *rest)
        return variant.forward_then(self, input, *rest)


def _lets_go(module: nn.Module) -> bool:
    return lets_go(module) or keeps_nothing(module)


def current_variants(module: FusedOwner) -> list[Variant]:
    """Returns the valid variants for the module's mode, including those without a graph."""
    owner = module._fastbn_owner
    found = (v for (mode, _), vs in owner.variants.items() if mode == module.training for v in vs)
    return [variant for variant in found if variant.holds(module)]


def fuse_owner(module: nn.Module) -> None:
    """Gives an owner a generated `forward` if that fuses something, else its own class."""
    generated, _ = plan_owner(module)
    if generated is not None:
        set_class(module, generated)
    elif isinstance(module, FusedOwner):
        set_class(module, module._fastbn_original)


def plan_owner(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """Returns a class that fuses something in an owner, or None, and why a trace failed."""
    original = module._fastbn_original if isinstance(module, FusedOwner) else type(module)
    if not isinstance(original.forward, FunctionType) or "forward" in module.__dict__:
        return None, "its forward is not its class' own Python function"
    if _asks_for_its_own_class(original):
        return None, "it calls super(type(self), self)"
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    if any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        return None, "its forward takes any number of arguments"
    generated = _class_of(original, _signature(module))
    variants = []
    for training in (True, False):
        todo = _patterns(parameters)
        for pattern in todo:
            variant = generated._fastbn_owner.find_or_trace(module, training, pattern)
            if variant is None:
                continue
            variants.append(variant)
            # A `forward` that asks for the type of its argument may treat a list differently.
            if variant.asks and pattern[0] == (Tensor,):
                todo.append(((list,), *pattern[1:]))
    reasons = [variant.reason for variant in variants if variant.reason]
    if any(variant.forward is not None for variant in variants):
        return generated, ""
    # A caller that adds to the module's result in place may fuse the addition if the result is new
    # memory. This class tells the caller whether it is.
    has_norms = any(isinstance(m, _BatchNorm) for m in module.modules())
    if has_norms and any(variant.fresh is not None for variant in variants):
        return generated._fastbn_vouching, ""
    return None, reasons[0] if reasons else ""


def _patterns(parameters: list[inspect.Parameter]) -> list[tuple]:
    """Returns the patterns of arguments to expect: no optional one is given, or one of them is."""
    base = [
        (Tensor,) if p.default is p.empty else kind_of(p.default, p.default) or (Tensor,)
        for p in parameters
    ]
    optional = [i for i, p in enumerate(parameters) if p.default is None]
    found = [tuple(base)]
    for i in optional:
        found.append(tuple((Tensor,) if j == i else kind for j, kind in enumerate(base)))
    return found


def _asks_for_its_own_class(original: type[nn.Module]) -> bool:
    """Says whether a method calls `super(type(self), self)`, which recurses in a subclass."""
    for base in original.__mro__:
        if base is nn.Module:
            return False
        for member in vars(base).values():
            code = getattr(member, "__code__", None)
            if code is not None and {"super", "type"} <= set(code.co_names):
                loaded = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
                if ("super", "type") in itertools.pairwise(loaded):
                    return True
    return False


def _signature(module: nn.Module) -> tuple:
    """Returns the kinds of the modules that a `forward` may call, by their paths."""
    found: list[tuple[str, Any]] = []
    for path, child in _reachable(module, ""):
        if ends_in_norm(child):
            found.append((path, "norm"))
        elif is_activation(child):
            found.append((path, "activation"))
        elif may_pass_unchanged(child) and type(child) is not nn.Identity:
            found.append((path, "drop layer"))
        else:
            found.append((path, type(child)))
    return tuple(found)


def _reachable(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in module._modules.items():
        if child is None:
            continue
        found.append((prefix + name, child))
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            found += _reachable(child, f"{prefix}{name}.")
    return found


_classes: dict[tuple, Any] = {}


def _class_of(original: type[nn.Module], signature: tuple) -> Any:
    """Returns the generated class that all modules of this class and signature share."""
    if (original, signature) not in _classes:
        _classes[original, signature] = _make_class(original)
    return _classes[original, signature]


def _make_class(original: Any) -> type[nn.Module]:
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = tuple(p.name for p in parameters)
    owner = Owner(
        original, names, {p.name: p.default for p in parameters if p.default is not p.empty}
    )

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = owner.bind(args, kwargs)
        variant = owner.variant(self, values)
        if values is None or variant is None or variant.forward is None:
            return original.forward(self, *args, **kwargs)
        given = [value for value in values if isinstance(value, (*GIVEN, Proxy))]
        return variant.forward(self, *given)

    members = {"_fastbn_owner": owner}
    # Modules that fuse nothing get this class. It keeps their `forward`, and says whether results
    # are new memory.
    vouching = subclass(original, FusedOwner, members)
    return subclass(
        original, FusedOwner, members | {"forward": forward, "_fastbn_vouching": vouching}
    )

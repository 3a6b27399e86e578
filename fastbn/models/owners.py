"""Owners: modules whose `forward` calls norms. They get a class with a generated `forward`.

The generated `forward` has a variant for each value of `training` and each pattern of arguments
(given, None, or a constant). A variant is good while the attributes are alike that the
module's own `forward` read when it was traced. Where no variant is good, the `forward` is
traced anew, and if that fails the module's own `forward` runs.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.fx.proxy import Proxy

from .chains import Fold, fold, open_tail, tail_of
from .fused import (
    ends_in_norm,
    is_activation,
    is_harmless,
    makes_fresh,
    may_pass_unchanged,
    unfused,
)
from .generated import Generated, set_class, subclass
from .steps import is_fresh
from .tracing import GIVEN, Untraceable, trace
from .watching import Missing, Reads, same

# More variants than this under one key are a sign that some attribute is never alike.
_MOST_VARIANTS = 64


@dataclass(frozen=True)
class Variant:
    """What `forward` does for one value of `training` and one pattern of arguments.

    Attributes:
        holds: says of a module whether its attributes are those that the variant was made for.
        forward: takes the module and its arguments of the kinds in `tracing.GIVEN`; None if the
            module's own `forward` must run.
        forward_then: does so and goes on with what `fused` is to add; None unless the module
            ends in a norm.
        folds: what became of the norms.
        tail: the path of the last norm.
        reason: why there is no generated `forward`.
        asks: whether `forward` asks for the type of an argument.
        is_fresh: if it leaves its arguments alone and returns new memory, the paths of the
            modules that must do so for that; otherwise None.
    """

    holds: Callable[[nn.Module], bool]
    forward: Callable | None = None
    forward_then: Callable | None = None
    folds: tuple[Fold, ...] = ()
    tail: str | None = None
    reason: str = ""
    asks: bool = False
    is_fresh: tuple[str, ...] | None = None


@dataclass
class Owner:
    """What instances of a generated class share.

    Attributes:
        original: the modules' own class.
        names, defaults: of the parameters of `forward`.
        variants: by `training` and the pattern of arguments.
    """

    original: type[nn.Module]
    names: tuple[str, ...]
    defaults: dict[str, Any]
    variants: dict[tuple, list[Variant]] = field(default_factory=dict)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Returns the values of all parameters, or None if the call does not fit them."""
        later = self.names[len(args) :]
        if len(args) > len(self.names) or any(name not in later for name in kwargs):
            return None
        values = list(args)
        for name in later:
            if name in kwargs:
                values.append(kwargs[name])
            elif name in self.defaults:
                values.append(self.defaults[name])
            else:
                return None
        return tuple(values) if len(values) == len(self.names) else None

    def variant(self, module: nn.Module, values: tuple | None) -> Variant | None:
        """Returns the variant for a call, tracing it if there is none yet."""
        if values is None:
            return None
        defaults = self.defaults
        pattern = tuple([_kind(v, defaults.get(n)) for n, v in zip(self.names, values)])
        if None in pattern:
            return None
        for variant in self.variants.get((module.training, pattern), ()):
            if variant.holds(module):
                return variant
        # A compiler can't trace, and a stand-in of a tracer is no call.
        if torch.compiler.is_compiling() or any(isinstance(v, Proxy) for v in values):
            return None
        return self.find_or_trace(module, module.training, pattern)

    def find_or_trace(self, module: nn.Module, training: bool, pattern: tuple) -> Variant | None:
        """Returns the variant of a module for a pattern of arguments."""
        variants = self.variants.setdefault((training, pattern), [])
        for variant in variants:
            if variant.holds(module):
                return variant
        if len(variants) >= _MOST_VARIANTS:
            return None
        variant = _make_variant(module, self.original, self.names, training, pattern)
        variants.append(variant)
        return variant


def _kind(value: Any, default: Any = None) -> tuple | None:
    """Returns the kind of an argument for `tracing.trace` in a tuple, or None if it has none.

    Numbers are a part of the graph, and so only those are taken that a parameter has by default:
    others may be new in each call.
    """
    if isinstance(value, (Tensor, Proxy)):
        return (Tensor,)
    for kind in (list, tuple):
        if type(value) is kind and all(isinstance(part, (Tensor, Proxy)) for part in value):
            return (kind,)
    if value is None or type(value) in (bool, str):
        return (value,)
    return (value,) if type(value) in (int, float) and same(value, default) else None


class FusedOwner(Generated):
    """The `forward` of generated classes whose other base class is an owner's own."""

    owner: Owner

    @property
    def ends_in_norm(self) -> bool:
        return any(variant.forward_then is not None for variant in self._variants())

    @property
    def is_fresh(self) -> bool:
        variants = [v for v in self._variants() if v.is_fresh is not None]
        return bool(variants) and all(
            v.is_fresh is not None and all(makes_fresh(self.get_submodule(p)) for p in v.is_fresh)
            for v in self._variants()
        )

    def _variants(self) -> list[Variant]:
        found = (v for variants in self.owner.variants.values() for v in variants)
        return [variant for variant in found if not variant.reason and variant.holds(self)]

    def current_variant(self) -> Variant | None:
        """Returns the variant of a plain call in the module's mode, for reports."""
        found = (
            variant
            for (training, _), variants in self.owner.variants.items()
            for variant in variants
            if training == self.training and variant.forward is not None and variant.holds(self)
        )
        return next(found, None)

    def forward_then(self, input: Any, *rest: Any) -> Any:
        owner = self.owner
        variant = owner.variant(self, owner.bind((input,), {}))
        if variant is None or variant.forward_then is None:
            return unfused(self(input), *rest)
        return variant.forward_then(self, input, *rest)


def fuse_owner(module: nn.Module) -> None:
    """Gives an owner a generated `forward` if that fuses something, else its own class."""
    generated, _ = plan_owner(module)
    if generated is not None:
        set_class(module, generated)
    elif isinstance(module, FusedOwner):
        set_class(module, module.original)


def plan_owner(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """Returns the class that fuses something of an owner, or None, and why a trace failed."""
    original = module.original if isinstance(module, FusedOwner) else type(module)
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
            variant = generated.owner.find_or_trace(module, training, pattern)
            if variant is None:
                continue
            variants.append(variant)
            # It may do something else with a list.
            if variant.asks and pattern[0] == (Tensor,):
                todo.append(((list,), *pattern[1:]))
    reasons = [variant.reason for variant in variants if variant.reason]
    if any(variant.forward is not None for variant in variants):
        return generated, ""
    return None, reasons[0] if reasons else ""


def _patterns(parameters: list[inspect.Parameter]) -> list[tuple]:
    """Returns the patterns of arguments to expect: optional ones not given, and one of them."""
    base = [
        (Tensor,) if p.default is p.empty else _kind(p.default, p.default) or (Tensor,)
        for p in parameters
    ]
    optional = [i for i, p in enumerate(parameters) if p.default is None]
    found = [tuple(base)]
    for i in optional:
        found.append(tuple((Tensor,) if j == i else kind for j, kind in enumerate(base)))
    return found


def _asks_for_its_own_class(original: type[nn.Module]) -> bool:
    """Says whether a method calls `super(type(self), self)`, which a subclass sends in a circle."""
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
    """Returns the generated class of all modules of a class that call modules of such kinds."""
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

    return subclass(original, FusedOwner, {"owner": owner, "forward": forward})


def _make_variant(
    module: nn.Module, original: Any, names: tuple[str, ...], training: bool,
    pattern: tuple,
) -> Variant:  # fmt: skip
    arguments = [(name, kind[0]) for name, kind in zip(names, pattern)]
    try:
        traced = trace(module, original.forward, arguments, training)
    except Untraceable as error:
        return Variant(_guard(error.reads, set()), reason=str(error), asks=error.asks)
    graph = traced.graph
    fresh = is_fresh(graph, module)
    found, trusted = fold(graph, module)
    folds, holds = tuple(found), _guard(traced.reads, trusted)
    tail = tail_of(graph, module) if sum(k[0] in GIVEN for k in pattern) == 1 else None
    if tail is None and all(f.kind == "plain" for f in folds):
        return Variant(holds, folds=folds, asks=traced.asks, is_fresh=fresh)
    forward = _compiled(graph)
    forward_then = None
    if tail is not None:
        open_tail(graph, tail)
        forward_then = _compiled(graph)
    path = None if tail is None else tail.target
    return Variant(holds, forward, forward_then, folds, path, asks=traced.asks, is_fresh=fresh)


def _compiled(graph: fx.Graph) -> Callable:
    """Returns a function that does what a graph says."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<fastbn>", "exec"), names)
    return names["forward"]


def _guard(reads: Reads, trusted: set[str]) -> Callable[[nn.Module], bool]:
    """Returns a function that says whether a module's attributes are still as they were read.

    Args:
        reads: what was read.
        trusted: paths of modules that must leave their input alone.
    """
    checks: list[str] = []
    kept: list[Any] = []
    for path, name, value in reads:
        found = _expression(path)
        attribute = _expression(path, name)
        if value is Missing:
            checks.append(f"not hasattr({found}, {name!r})")
        elif name == "_modules":
            checks.append(f"tuple({attribute}) == {value!r}")
        elif isinstance(value, (nn.Module, Tensor)):
            checks.append(f"{attribute} is not None")
        elif value is None or type(value) is bool:
            checks.append(f"{attribute} is {value}")
        else:
            checks.append(
                f"same({attribute}, kept[{len(kept)}])"
                if name
                else f"type({found}) is kept[{len(kept)}]"
            )
            kept.append(value)
    checks += [f"harmless({_expression(path)})" for path in sorted(trusted)]
    body = "".join(f"    if not ({check}):\n        return False\n" for check in checks)
    names: dict[str, Any] = {"kept": kept, "same": same, "harmless": is_harmless}
    exec(compile(f"def holds(module):\n{body}    return True\n", "<fastbn>", "exec"), names)
    guard = names["holds"]

    def holds(module: nn.Module) -> bool:
        try:
            return guard(module)
        except AttributeError:
            return False

    return holds


def _expression(path: str, name: str = "") -> str:
    """Returns the code of an attribute of the module at a path."""
    code = "module"
    for part in filter(None, (*path.split("."), name)):
        code = f"{code}.{part}" if part.isidentifier() else f"getattr({code}, {part!r})"
    return code

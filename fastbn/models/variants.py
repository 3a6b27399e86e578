"""A variant of a `forward` holds for a pattern of arguments and for values of attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.fx.proxy import Proxy

from .chains import Fold, fold, open_tail, tail_of
from .kinds import is_harmless, lets_go, returns_tensor
from .steps import calls_that_make_fresh, calls_that_may_keep
from .tracing import GIVEN, Untraceable, trace
from .watching import Missing, Reads, same

# More variants than this under one key are a sign that some attribute changes all the time.
_MOST_VARIANTS = 64


@dataclass(frozen=True)
class Variant:
    """What `forward` does for one value of `training` and one pattern of arguments.

    Attributes:
        holds: says of a module whether its attributes are those that the variant was made for.
        forward: takes the module and its arguments of the kinds in `tracing.GIVEN`; None if the
            module's own `forward` must run.
        forward_then: does the same and what `fused` adds after it; None unless the module ends in
            a norm.
        folds: what became of the norms.
        tail: the path of the last norm.
        reason: why there is no generated `forward`.
        asks: whether `forward` asks for the type of an argument.
        fresh: if `forward` leaves its arguments alone and returns other memory, the paths of the
            modules that must do so for that; otherwise None.
        kept: if only the caller has what `forward` returns, the paths of the modules that must keep
            nothing for that; otherwise None.
    """

    holds: Callable[[nn.Module], bool]
    forward: Callable | None = None
    forward_then: Callable | None = None
    folds: tuple[Fold, ...] = ()
    tail: str | None = None
    reason: str = ""
    asks: bool = False
    fresh: tuple[str, ...] | None = None
    kept: tuple[str, ...] | None = None


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
        pattern = tuple([kind_of(v, defaults.get(n)) for n, v in zip(self.names, values)])
        if None in pattern:
            return None
        for variant in self.variants.get((module.training, pattern), ()):
            if variant.holds(module):
                return variant
        # Don't trace inside of a compiler or of another trace.
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


def kind_of(value: Any, default: Any = None) -> tuple | None:
    """Returns the kind of an argument for `tracing.trace` in a tuple, or None if it has none.

    A graph would fix the value of a number, which may be new in each call. So the only number that
    has a kind is a parameter's default.
    """
    if isinstance(value, (Tensor, Proxy)):
        return (Tensor,)
    for kind in (list, tuple):
        if type(value) is kind and all(isinstance(part, (Tensor, Proxy)) for part in value):
            return (kind,)
    if value is None or type(value) in (bool, str):
        return (value,)
    return (value,) if type(value) in (int, float) and same(value, default) else None


def _make_variant(
    module: nn.Module, original: Any, names: tuple[str, ...], training: bool,
    pattern: tuple,
) -> Variant:  # fmt: skip
    arguments = [(name, kind[0]) for name, kind in zip(names, pattern)]
    try:
        traced = trace(module, original.forward, arguments, training)
    except Untraceable as error:
        holds = _guard(error.reads, doubted=error.tensors)
        return Variant(holds, reason=str(error), asks=error.asks)
    graph = traced.graph
    facts: dict[str, Any] = {
        "asks": traced.asks,
        "fresh": calls_that_make_fresh(graph, module),
        "kept": calls_that_may_keep(graph, module),
    }
    found, trusted, unkept = fold(graph, module)
    folds, holds = tuple(found), _guard(traced.reads, trusted, unkept, traced.tensors)
    tail = tail_of(graph, module) if sum(k[0] in GIVEN for k in pattern) == 1 else None
    if tail is None and all(f.kind == "plain" for f in folds):
        return Variant(holds, folds=folds, **facts)
    forward = _compiled(graph)
    forward_then = None
    if tail is not None:
        open_tail(graph, tail)
        forward_then = _compiled(graph)
    path = None if tail is None else tail.target
    return Variant(holds, forward, forward_then, folds, path, **facts)


def _compiled(graph: fx.Graph) -> Callable:
    """Returns a function that does what a graph says."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<fastbn>", "exec"), names)
    return names["forward"]


def _guard(
    reads: Reads, trusted: Iterable[str] = (), unkept: Iterable[str] = (),
    tensors: Iterable[str] = (), doubted: Iterable[str] = (),
) -> Callable[[nn.Module], bool]:  # fmt: skip
    """Returns a function that says whether a module's attributes are still as they were read.

    Args:
        reads: what `forward` read.
        trusted: paths of modules that must leave their input alone.
        unkept: paths of modules that must return new memory and keep nothing of it.
        tensors: paths of modules that must return tensors.
        doubted: paths of modules, if any, of which at least one must not return a tensor.
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
    checks += [f"lets_go({_expression(path)})" for path in sorted(unkept)]
    checks += [f"returns_tensor({_expression(path)})" for path in sorted(tensors)]
    doubts = [f"returns_tensor({_expression(path)})" for path in sorted(doubted)]
    if doubts:
        checks.append(f"not ({' and '.join(doubts)})")
    body = "".join(f"    if not ({check}):\n        return False\n" for check in checks)
    names: dict[str, Any] = {"kept": kept, "same": same}
    names |= {"harmless": is_harmless, "lets_go": lets_go, "returns_tensor": returns_tensor}
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

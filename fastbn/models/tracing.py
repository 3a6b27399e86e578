"""Records one `forward` as a graph, with all that the graph takes for granted.

`torch.fx` runs the `forward` once on stand-ins for its arguments and records what it calls.
Python's decisions are taken for good on the way, so the attributes are noted that the `forward`
reads, and a graph is good for as long as they are alike. A `forward` that does what no
graph shows, such as setting attributes or drawing random numbers, is refused.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.fx.proxy import Proxy, TraceError
from torch.overrides import TorchFunctionMode

# Kinds of arguments that a graph takes as they come; any other argument is a part of the graph.
GIVEN = (Tensor, list, tuple, dict)

_lock = threading.RLock()


@dataclass(frozen=True)
class Trace:
    """A graph and what it takes for granted.

    Attributes:
        graph: what `forward` does. Its placeholders are the arguments of the kinds in GIVEN.
        reads: for each attribute that was read the module's path, the name, and the value.
        asks: whether the `forward` asked for the type of an argument.
    """

    graph: fx.Graph
    reads: tuple[tuple[str, str, Any], ...]
    asks: bool


class Untraceable(Exception):
    """Says why a `forward` has no graph, and what it had read and asked by then."""

    def __init__(self, reason: str, reads: tuple[tuple[str, str, Any], ...], asks: bool) -> None:
        super().__init__(reason)
        self.reads, self.asks = reads, asks


class _Value(Proxy):
    """Stands for a tensor, or for what an argument's `kind` says."""

    kind: type | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if self.kind is None or caller.startswith("torch."):
            return _Value
        tracer: Any = self.tracer
        tracer.asks = True
        return self.kind

    # Without these Python would compute `x += y` as `x = x + y`.
    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, forward: FunctionType, arguments: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        self.forward, self.arguments, self.asks = forward, arguments, False
        self.surroundings = _surroundings()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self.surroundings:
            raise TraceError("it calls checkpoint, or changes the grad mode or autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> Proxy:
        return _Value(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        values: list[Any] = [self.root]
        for name, kind in self.arguments:
            if kind in GIVEN:
                value: Any = self.create_proxy("placeholder", name, (), {})
                value.kind = kind
                values.append(value)
            else:
                values.append(kind)
        return self.forward, values

    def create_arg(self, a: Any) -> Any:
        if type(a) is Tensor and not any(a is buffer for buffer in self.root.buffers()):
            raise TraceError("it makes a tensor that does not depend on its input")
        return super().create_arg(a)


def _surroundings() -> tuple:
    """Returns what a context manager may change around a call, which a graph does not show."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        # Checkpoints, which save inputs alone.
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class _NoOtherTensors(TorchFunctionMode):
    """Refuses calls on tensors that are no stand-ins: their results would be taken for good."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given: list[Any] = []
        fx.node.map_aggregate((args, kwargs or {}), given.append)
        if not any(type(a) is _Value for a in given):
            name = getattr(function, "__name__", str(function))
            raise TraceError(f"it calls {name} without its input")
        return function(*args, **(kwargs or {}))


def trace(
    module: nn.Module, forward: FunctionType, arguments: Sequence[tuple[str, Any]], training: bool
) -> Trace:
    """Records `forward(module, ...)`.

    Args:
        module: whose `forward` it is; all modules that it calls become nodes.
        forward: the function.
        arguments: name and kind of each argument, a kind being one of GIVEN, or the value.
        training: the value of `module.training` to record with.

    Raises:
        Untraceable: `forward` decides by values of its input, or does what no graph shows.
    """
    tracer = _Tracer(forward, arguments)
    reads: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
    lists: list[tuple[list, list]] = []
    with _lock:
        before = module.training
        random_state = random.getstate()
        module.__dict__["training"] = training
        try:
            with (
                warnings.catch_warnings(),
                mock.patch.object(nn.Module, "__getattribute__", _noting(reads, lists)),
                mock.patch.object(nn.Module, "__setattr__", _refusing_to_set),
                _NoOtherTensors(),
            ):
                warnings.simplefilter("ignore")
                graph = tracer.trace(module)
            reason = None
        except Exception as error:  # whatever a forward may raise when it gets no tensors
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        finally:
            module.__dict__["training"] = before
        if random.getstate() != random_state:
            random.setstate(random_state)
            reason = "it draws random numbers"
        for changed, content in lists:
            if len(changed) != len(content) or any(map(operator.is_not, changed, content)):
                changed[:] = content
                reason = "it changes a list"
        paths = {id(m): path for path, m in module.named_modules()}
    noted = tuple(
        (paths[id(m)], name, value)
        for m, name, value in reads.values()
        if id(m) in paths and not (m is module and name == "training")
    )
    if reason is not None:
        raise Untraceable(reason, noted, tracer.asks)
    return Trace(graph, noted, tracer.asks)


def _noting(reads: dict, lists: list) -> Callable[[nn.Module, str], Any]:
    """Returns a `__getattribute__` for modules that notes what a `forward` reads."""
    read = object.__getattribute__

    def getattribute(module: nn.Module, name: str) -> Any:
        try:
            value = read(module, name)
        except AttributeError:
            found = None
            for place in ("_modules", "_parameters", "_buffers"):
                found = read(module, "__dict__").get(place, {}).get(name, found)
            if _by_forward(name):
                reads[id(module), name] = (module, name, found)
            raise
        if name == "_modules" and _reader() == "torch.nn.modules.container":
            reads[id(module), name] = (module, name, tuple(value))
        elif _by_forward(name) and not isinstance(value, MethodType):
            if name in read(module, "__dict__") or not isinstance(
                value, (FunctionType, BuiltinFunctionType)
            ):
                reads[id(module), name] = (module, name, _frozen(value))
            if type(value) is list:
                lists.append((value, list(value)))
        return value

    return getattribute


def _frozen(value: Any) -> Any:
    """Returns a copy of a container, in which a later change of it does not show."""
    return value.copy() if isinstance(value, (list, dict, set)) else value


def _reader() -> str:
    return sys._getframe(2).f_globals.get("__name__", "")


def _by_forward(name: str) -> bool:
    """Says whether code of a model's reads an attribute, and not PyTorch's machinery."""
    reader = sys._getframe(2).f_globals.get("__name__", "")
    machinery = ("torch.fx", "torch.nn.modules.module", "torch.nn.modules.container", "fastbn.")
    return not name.startswith("__") and not reader.startswith(machinery)


def _refusing_to_set(module: nn.Module, name: str, value: Any) -> None:
    raise TraceError(f"it sets {name}")

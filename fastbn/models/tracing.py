"""Records one `forward` as a graph, with all that the graph takes for granted.

`torch.fx` runs the `forward` once on stand-ins for its arguments and records what it calls.
Branches that Python takes on the way are fixed in the graph. So `watching.py` notes the attributes
that `forward` reads, and a graph is valid while these are as they were. A `forward` is refused if
it does what a graph doesn't show, or asks a stand-in what only a tensor can answer.
"""

from __future__ import annotations

import operator
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, UnionType
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.fx.proxy import Attribute, Proxy, TraceError
from torch.overrides import TorchFunctionMode

from .kinds import returns_tensor
from .watching import Reads, Watch, lock

# Arguments of these kinds are inputs of a graph. The value of any other is fixed in the graph.
GIVEN = (Tensor, list, tuple)

# Names of functions that answer wrongly for a stand-in, or whose effects a graph doesn't show.
_FORBIDDEN = {
    "type", "is_tensor", "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled",
    "is_tracing", "is_compiling", "manual_seed", "set_rng_state", "autocast", "no_grad",
    "enable_grad", "inference_mode", "set_grad_enabled",
}  # fmt: skip


_ASKS_FOR_A_TYPE = "it asks for the type of a value"


@dataclass(frozen=True)
class Trace:
    """A graph, and what must hold for it to be valid.

    Attributes:
        graph: what `forward` does. Its placeholders are the arguments of the kinds in GIVEN.
        reads: what `forward` read.
        asks: whether the `forward` asked for the type of an argument.
        tensors: paths of the modules whose results it asked for the type of. The graph takes
            these results for tensors.
    """

    graph: fx.Graph
    reads: Reads
    asks: bool
    tensors: set[str]


class Untraceable(Exception):
    """Says why a `forward` has no graph, and what it had read and asked by then.

    `tensors` are the paths of modules of which not all return tensors, if that is the reason.
    """

    def __init__(self, reason: str, reads: Reads, asks: bool, tensors: set[str]) -> None:
        super().__init__(reason)
        self.reads, self.asks, self.tensors = reads, asks, tensors


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class _InPlace:
    """Records operations in place; Python would otherwise compute `x += y` as `x = x + y`."""

    __iadd__, __isub__, __imul__, __itruediv__ = map(
        _in_place, ("iadd", "isub", "imul", "itruediv")
    )
    __ifloordiv__, __imod__, __ipow__ = map(_in_place, ("ifloordiv", "imod", "ipow"))
    __iand__, __ior__, __ixor__ = map(_in_place, ("iand", "ior", "ixor"))
    __ilshift__, __irshift__, __imatmul__ = map(_in_place, ("ilshift", "irshift", "imatmul"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "kind", "root", "attr", "_node"):
            raise TraceError(f"it sets {name} of a tensor")
        object.__setattr__(self, name, value)


class _Value(_InPlace, Proxy):
    """Stands for a tensor, or for what an argument's `kind` says."""

    kind: type | None = None

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name):
            return _Attribute(self, name)
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", "fastbn.")):
            raise AttributeError(name)
        raise TraceError(f"it asks a value for {name}")


class _Attribute(_InPlace, Attribute):
    """Stands for an attribute of a value."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, forward: FunctionType, arguments: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        self.forward, self.arguments, self.asks = forward, arguments, False
        self.tensors: set[str] = set()
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
        if type(a) is OrderedDict:
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        plain = type(a) in (list, tuple, dict) or hasattr(a, "_fields")
        if isinstance(a, (list, tuple, dict)) and not plain:
            raise TraceError(f"it makes a {type(a).__name__}")
        if hasattr(type(a), "__dataclass_fields__"):
            raise TraceError(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def answer_isinstance(self, value: Any, kinds: Any) -> bool:
        """Returns what `isinstance` would return for the value that a stand-in stands for."""
        if _are_narrow(kinds):
            raise TraceError(_ASKS_FOR_A_TYPE)
        if value.kind is None:
            if value.node.op != "call_module":
                raise TraceError(_ASKS_FOR_A_TYPE)
            self.tensors.add(value.node.target)
            return issubclass(Tensor, kinds)
        self.asks = True
        return issubclass(value.kind, kinds)


def _are_narrow(kinds: Any) -> bool:
    """Says whether some of these types fit only a few tensors, or are no types."""
    if isinstance(kinds, (tuple, UnionType)):
        return any(map(_are_narrow, kinds if isinstance(kinds, tuple) else kinds.__args__))
    if not isinstance(kinds, type) or type(kinds) is type(torch.FloatTensor):
        return True
    return issubclass(kinds, Tensor) and kinds is not Tensor


def _surroundings() -> tuple:
    """Returns what a context manager may change around a call; a graph does not show it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        # A checkpoint sets these hooks.
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class _NoOtherTensors(TorchFunctionMode):
    """Refuses calls on tensors that are no stand-ins: the graph would fix their results."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given: list[Any] = []
        fx.node.map_aggregate((args, kwargs or {}), given.append)
        if not any(type(a) in (_Value, _Attribute) for a in given):
            name = getattr(function, "__name__", str(function))
            raise TraceError(f"it calls {name} without its input")
        return function(*args, **(kwargs or {}))


def trace(
    module: nn.Module, forward: FunctionType, arguments: Sequence[tuple[str, Any]], training: bool
) -> Trace:
    """Records `forward(module, ...)`.

    Args:
        module: the module whose `forward` it is; calls of other modules become nodes.
        forward: the function.
        arguments: name and kind of each argument. The kind is one of GIVEN, or the value.
        training: the value of `module.training` to record with.

    Raises:
        Untraceable: `forward` decides by values of its input, or does what no graph shows.
    """
    tracer = _Tracer(forward, arguments)
    before, numbers, graph = module.training, _random_states(), None
    doubted: set[str] = set()
    with lock:
        module.__dict__["training"] = training
        watch = Watch(module, _Value, tracer.answer_isinstance)
        try:
            watch.refuse_names(forward.__code__, _FORBIDDEN)
            with warnings.catch_warnings(), watch, _NoOtherTensors():
                warnings.simplefilter("ignore")
                graph = tracer.trace(module)
            for code in watch.codes:
                watch.refuse_names(code, _FORBIDDEN)
            reason = watch.changes()
        except Exception as error:  # a forward that gets no tensors may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            watch.changes()
        finally:
            module.__dict__["training"] = before
        # This comes after the trace, since `torch.fx` replaces `nn.Module.__call__` meanwhile.
        doubted = {p for p in tracer.tensors if not returns_tensor(module.get_submodule(p))}
    if reason is None and doubted:
        reason = _ASKS_FOR_A_TYPE
    if _random_states() != numbers:
        _restore(numbers)
        reason = "it draws random numbers"
    reads = watch.found()
    if reason is None and reads is None:
        reason = "it reads a module that is not a part of it"
    if reason is not None or graph is None:
        raise Untraceable(reason or "it has no graph", reads or (), tracer.asks, doubted)
    return Trace(graph, reads or (), tracer.asks, tracer.tensors)


def _random_states() -> tuple:
    name, keys, *rest = np.random.get_state(legacy=True)
    own = (name, np.asarray(keys).tobytes(), *rest)
    return random.getstate(), own, torch.get_rng_state().numpy().tobytes()


def _restore(states: tuple) -> None:
    own, (name, keys, *rest), numbers = states
    random.setstate(own)
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(numbers), dtype=torch.uint8))

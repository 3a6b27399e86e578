"""Says what lies between a norm and a later step of a graph, and which steps share memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from .fused import fused
from .kinds import is_harmless, keeps_nothing, lets_go, makes_fresh, may_pass_unchanged

# A step of a graph. With PyTorch's type `fx.Node`, each use of an argument would need a cast.
Node = Any

# Functions that leave their arguments alone and return new memory.
_FRESH_FUNCTIONS = (fused, torch.cat)


def is_call(node: Node, module: nn.Module, kind: Callable[[nn.Module], bool]) -> bool:
    """Says whether a node calls a module of some kind on one value."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    return isinstance(node.args[0], fx.Node) and kind(module.get_submodule(node.target))


def only_user(node: Node) -> Node | None:
    """Returns the one step that uses a value, and uses it once."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    uses: list[Node] = []
    fx.node.map_arg((user.args, user.kwargs), uses.append)
    return user if uses.count(node) == 1 else None


def may_wait(node: Node, end: Node, module: nn.Module, steps: Sequence[Node] = ()) -> bool:
    """Says whether a norm may be computed as late as another step.

    No step between the two may change the norm's input or memory that the input shares, or use
    the norm. If the call computes more than a norm, only identity layers may lie between, since
    the rest may, for example, draw random numbers.
    """
    between = steps_between(node, end, steps)
    norm = module.get_submodule(node.target)
    if not isinstance(norm, _BatchNorm):
        return all(is_call(step, module, _is_identity) for step in between)
    shared = _may_share(node.args[0], module)
    attributes = [n.target for n in node.graph.nodes if n.op == "get_attr"]
    if between and any(name.startswith(f"{node.target}.") for name in attributes):
        return False
    for step in between:
        if shared & set(step.all_input_nodes) and not _leaves_alone(step, module):
            return False
        paths = [step.target] if step.op == "call_module" else []
        paths += [n.target for n in step.all_input_nodes if n.op == "get_attr"]
        for path in paths:
            found = module.get_submodule(path) if _is_module(module, path) else None
            if found is not None and any(m is norm for m in found.modules()):
                return False
    return True


def steps_between(node: Node, end: Node, steps: Sequence[Node]) -> list[Node]:
    """Returns the nodes between two that compute something and are not in `steps`."""
    between, current = [], node.next
    while current is not end:
        if current not in steps and current.op not in ("get_attr", "placeholder"):
            between.append(current)
        current = current.next
    return between


def _leaves_alone(node: Node, module: nn.Module) -> bool:
    return _is_fresh(node, module) or is_call(node, module, is_harmless)


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


def _is_module(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def calls_that_make_fresh(graph: fx.Graph, module: nn.Module) -> tuple[str, ...] | None:
    """Returns the paths of the modules that must leave their input alone and return other memory
    for a graph to do so, or None if that would not be enough.
    """
    shared: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            shared |= _may_share(node, module)
    users = {user for node in shared for user in node.users}
    if not all(_is_fresh(user, module) for user in users):
        return None
    return tuple(sorted(user.target for user in users if user.op == "call_module"))


def calls_that_may_keep(graph: fx.Graph, module: nn.Module) -> tuple[str, ...] | None:
    """Returns the paths of the modules that must keep nothing so that only the caller has what a
    graph returns, or None if that would not be enough.
    """
    result = next(node for node in reversed(graph.nodes) if node.op == "output")
    made: set[Node] = set()
    for node in result.all_input_nodes:
        made |= _may_share(node, module)
    calls = [node for node in made if node.op == "call_module"]
    if any(node.op in ("placeholder", "get_attr") for node in made):
        return None
    if not all(is_call(c, module, lets_go) or is_call(c, module, keeps_nothing) for c in calls):
        return None
    return tuple(sorted(node.target for node in calls))


def _is_fresh(node: Node, module: nn.Module) -> bool:
    """Says whether a step leaves its inputs alone and returns new memory."""
    if node.op == "call_function":
        return node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs
    return is_call(node, module, makes_fresh)


def nobody_else_has(node: Node, module: nn.Module) -> bool:
    """Says whether a step's output is new memory that only one other step uses."""
    if only_user(node) is None:
        return False
    if is_call(node, module, may_pass_unchanged):
        return nobody_else_has(node.args[0], module)
    return is_call(node, module, lets_go) if node.op == "call_module" else _is_fresh(node, module)


def _may_share(node: Node, module: nn.Module) -> set[Node]:
    """Returns the steps whose outputs may share memory with a step's."""
    found, todo = set(), [node]
    while todo:
        step = todo.pop()
        if step in found:
            continue
        found.add(step)
        if not _is_fresh(step, module):
            todo += step.all_input_nodes
        todo += [user for user in step.users if not _is_fresh(user, module)]
    return found

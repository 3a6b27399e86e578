"""Finds the chains norm -> (drop layers) -> (add) -> activation of a graph.

Each chain that can be one call becomes one call of `fused`, at the place of the chain's last
step. The norm is then computed later than before, which must not change any result.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .fused import fused
from .kinds import ends_in_norm, is_activation, is_harmless, may_pass_unchanged
from .steps import Node, is_call, may_wait, nobody_else_has, only_user, steps_between

# Functions and methods that compute activations of the table, with the activation's name and the
# name of its parameter.
_FUNCTIONS: dict[Any, tuple[str, str | None]] = {
    F.relu: ("relu", None),
    torch.relu: ("relu", None),
    torch.relu_: ("relu", None),
    F.leaky_relu: ("leaky_relu", "negative_slope"),
    F.silu: ("silu", None),
    F.hardswish: ("hardswish", None),
    F.relu6: ("relu6", None),
    F.elu: ("elu", "alpha"),
    F.sigmoid: ("sigmoid", None),
    torch.sigmoid: ("sigmoid", None),
    F.tanh: ("tanh", None),
    torch.tanh: ("tanh", None),
    "relu": ("relu", None),
    "relu_": ("relu", None),
    "sigmoid": ("sigmoid", None),
    "tanh": ("tanh", None),
}

# Names of the further arguments of a `forward` that also computes what follows its last norm.
TAIL = ("fused_act", "fused_residual", "fused_add", "fused_before", "fused_after")


@dataclass(frozen=True)
class Fold:
    """What became of a norm in a graph.

    Attributes:
        path: the path of the module that is the norm or ends in it.
        kind: "act", "add+act", "add" or "plain".
        reason: why a plain norm is plain.
        layers: paths of layers that must return their input for the norm not to be plain.
    """

    path: str
    kind: str
    reason: str = ""
    layers: tuple[str, ...] = ()


@dataclass
class _Chain:
    """Steps that follow a norm: their nodes, and what they do.

    Attributes:
        steps: the nodes of all steps.
        before, after: paths of the modules that may return their input, before and after the
            addition.
        residual, add: what is added, and how (see `fused`).
        act: the path of the activation, or name and parameter of a function.
    """

    steps: list[Node]
    before: list[str]
    after: list[str]
    residual: Node | None = None
    add: str | None = None
    act: str | tuple[str, Any] | None = None


def fold(graph: fx.Graph, module: nn.Module) -> tuple[list[Fold], set[str], set[str]]:
    """Replaces each chain in a graph of a module by one call.

    Returns:
        What became of all norms; the paths of the modules that must leave their input alone for
        this; and the paths of those that must keep nothing of what they return.
    """
    folds, trusted, unkept = [], set(), set()
    paths = {node.target for node in graph.nodes if is_call(node, module, is_harmless)}
    # If two norms feed an addition, the one that comes last takes the other's output as residual.
    for node in reversed(list(graph.nodes)):
        if not _calls_norm(node, module):
            continue
        chain = _chain_after(node, module)
        reason = _why_plain(node, chain, module)
        if reason is None:
            if chain.add == "iadd_to" or steps_between(node, chain.steps[-1], chain.steps):
                trusted = paths
            if chain.add == "iadd_to":
                made = _before_layers(chain.residual, module)
                unkept |= {made.target} if made.op == "call_module" else set()
            _replace(graph, node, chain)
            layers = (*chain.before, *chain.after)
            folds.append(Fold(node.target, _kind(chain.act, chain.residual), layers=layers))
        else:
            folds.append(Fold(node.target, "plain", reason))
    return folds[::-1], trusted, unkept


def folds_in(graph: fx.Graph, module: nn.Module) -> list[Fold]:
    """Returns what became of the norms of a graph that `fold` was given."""
    folds = []
    for node in graph.nodes:
        if node.target is fused:
            norm, _, act, residual, _, before, after = node.args
            layers = tuple(layer.target for layer in (*before, *after))
            folds.append(Fold(norm.target, _kind(act, residual), layers=layers))
        elif _calls_norm(node, module):
            reason = _why_plain(node, _chain_after(node, module), module)
            folds.append(Fold(node.target, "plain", reason or "the model is not fused"))
    return folds


def tail_of(graph: fx.Graph, module: nn.Module) -> Node | None:
    """Returns the call of a norm whose output a graph returns, unless something else uses it."""
    result = next(node for node in reversed(graph.nodes) if node.op == "output")
    node = result.args[0]
    if not (isinstance(node, fx.Node) and _calls_norm(node, module)):
        return None
    return node if only_user(node) is result and may_wait(node, result, module) else None


def open_tail(graph: fx.Graph, node: Node) -> None:
    """Adds arguments to a graph, so that the call that `tail_of` found computes what follows it."""
    result = next(node for node in reversed(graph.nodes) if node.op == "output")
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        rest = [graph.placeholder(name) for name in TAIL[::-1]][::-1]
    with graph.inserting_before(result):
        norm = graph.create_node("get_attr", node.target)
        call = graph.call_function(fused, (norm, node.args[0], *rest))
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _calls_norm(node: Node, module: nn.Module) -> bool:
    return is_call(node, module, ends_in_norm)


def _chain_after(node: Node, module: nn.Module) -> _Chain:
    chain = _Chain([], [], [])
    passed, end, user = _pass_layers(node, module)
    found = None if user is None else _addition(user, end)
    if user is not None and found is not None:
        chain.steps = [*passed, user]
        chain.before = [step.target for step in passed]
        chain.residual, chain.add = found
        passed, end, user = _pass_layers(user, module)
    if user is not None:
        chain.act = _activation(user, end, module)
        if chain.act is not None:
            chain.steps += [*passed, user]
            chain.after = [step.target for step in passed]
    return chain


def _pass_layers(node: Node, module: nn.Module) -> tuple[list[Node], Node, Node | None]:
    """Returns the steps after a node that may return their input, the last one, and its user."""
    passed, end, user = [], node, only_user(node)
    while user is not None and is_call(user, module, may_pass_unchanged):
        passed.append(user)
        end, user = user, only_user(user)
    return passed, end, user


def _before_layers(node: Node, module: nn.Module) -> Node:
    """Returns the step whose result reaches a node through layers that may return their input."""
    while is_call(node, module, may_pass_unchanged):
        node = node.args[0]
    return node


def _addition(node: Node, summand: Node) -> tuple[Node, str] | None:
    """Returns the other summand and the function, if a step adds two values."""
    functions = (operator.add, torch.add, operator.iadd)
    methods = ("add", "add_")
    if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    targets = {"call_function": functions, "call_method": methods}.get(node.op, ())
    if node.target not in targets:
        return None
    left, right = node.args
    inplace = node.target in (operator.iadd, "add_")
    if left is summand:
        return right, "iadd" if inplace else "add"
    return left, "iadd_to" if inplace else "add_to"


def _activation(node: Node, argument: Node, module: nn.Module) -> str | tuple[str, Any] | None:
    """Returns the path of the module, or name and parameter of the function, if a step computes
    an activation.
    """
    if is_call(node, module, is_activation) and node.args[0] is argument:
        return node.target
    if node.op not in ("call_function", "call_method") or node.args[:1] != (argument,):
        return None
    kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    if node.target is F.gelu and len(node.args) == 1:
        approximate = kwargs.get("approximate", "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
        return name and (name, None)
    if node.target not in _FUNCTIONS:
        return None
    name, parameter = _FUNCTIONS[node.target]
    rest = list(node.args[1:])
    value = None
    if parameter is not None:
        value = rest.pop(0) if rest else kwargs.pop(parameter, None)
    # What remains are `inplace` and arguments that the kernels don't know.
    if kwargs or any(type(a) is not bool for a in rest) or isinstance(value, fx.Node):
        return None
    return name, value


def _kind(act: Any, residual: Any) -> str:
    if residual is None:
        return "act"
    return "add" if act is None else "add+act"


def _why_plain(node: Node, chain: _Chain, module: nn.Module) -> str | None:
    """Returns why a norm and what follows it are not one call, or None if they can be."""
    if len(node.users) > 1:
        return "several steps use its output"
    if chain.residual is None and chain.act is None:
        user = next(iter(node.users), None)
        if user is None or user.op == "output":
            return "nothing follows it here"
        if user.op == "call_module":
            return f"next is {type(module.get_submodule(user.target)).__name__}"
        if user.target is fused:
            return "two norms feed one addition, and the other one takes it"
        name = user.target if isinstance(user.target, str) else user.target.__name__
        return f"next is {name}"
    # The addition changes the other summand in place, so nothing else may read it.
    if chain.add == "iadd_to" and not nobody_else_has(chain.residual, module):
        return "it is added in place to another tensor"
    if not may_wait(node, chain.steps[-1], module, chain.steps):
        return "what comes in between might change its input"
    return None


def _replace(graph: fx.Graph, node: Node, chain: _Chain) -> None:
    """Replaces a norm and the steps that follow it by a call of `fused`."""
    end = chain.steps[-1]
    with graph.inserting_before(end):
        norm = graph.create_node("get_attr", node.target)
        before, after = (
            tuple(graph.create_node("get_attr", path) for path in paths)
            for paths in (chain.before, chain.after)
        )
        act: Any = chain.act
        if isinstance(act, str):
            act = graph.create_node("get_attr", act)
        arguments: Any = (
            norm,
            node.args[0],
            act,
            chain.residual,
            chain.add,
            before,
            after,
        )
        call = graph.call_function(fused, arguments)
    end.replace_all_uses_with(call)
    for step in reversed([node, *chain.steps]):
        graph.erase_node(step)

"""Puts calls of `fused` into the graph that a `torch.fx.GraphModule` has already."""

from __future__ import annotations

import operator

from torch import fx

from .chains import fold
from .fused import activate, fused
from .steps import Node


def fuse_graph(module: fx.GraphModule) -> None:
    """Replaces each chain of a norm and what follows it by one call."""
    fold(module.graph, module)
    module.recompile()


def revert_graph(module: fx.GraphModule) -> None:
    """Replaces each call of `fused` by the calls and the addition that it stands for."""
    for node in list(module.graph.nodes):
        if node.target is fused:
            _expand(module.graph, node)
    module.recompile()


def _expand(graph: fx.Graph, node: Node) -> None:
    norm, value, act, residual, add, before, after = node.args
    with graph.inserting_before(node):
        for layer in (norm, *before):
            value = graph.call_module(layer.target, (value,))
        if add is not None:
            summands = (residual, value) if add.endswith("_to") else (value, residual)
            value = graph.call_function(getattr(operator, add.removesuffix("_to")), summands)
        for layer in after:
            value = graph.call_module(layer.target, (value,))
        if isinstance(act, tuple):
            value = graph.call_function(activate, (value, *act))
        elif act is not None:
            value = graph.call_module(act.target, (value,))
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    for layer in (norm, act, *before, *after):
        if isinstance(layer, fx.Node):
            graph.erase_node(layer)

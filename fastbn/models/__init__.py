"""Whole models: their norms become fastbn's, and what follows a norm is computed with it.

`fused.py` computes a norm and what follows it in one call where that changes nothing.
`sequential.py` and `owners.py` make modules call `fused`; `tracing.py` and `chains.py` find out
where.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..sync.convert import revert_sync_norm
from .freezing import freeze, unfreeze
from .generated import is_wrapped, revert_class
from .graph_modules import fuse_graph, revert_graph
from .norm_types import convert_norm, revert_norm
from .owners import fuse_owner
from .sequential import fuse_sequential

__all__ = ["convert", "freeze", "fuse", "revert", "unfreeze"]


def convert(model: nn.Module) -> nn.Module:
    """Makes a model's batch norms fastbn's, in place.

    Each `nn.BatchNorm1d/2d/3d` becomes a `FusedBatchNorm1d/2d/3d`, and each `BatchNormAct2d` of
    timm's a `FusedBatchNormAct2d`: the same object with another class. Parameters, buffers,
    hooks, training flags and the keys of `state_dict` stay. Subclasses of these norms stay as
    they are, and so do lazy norms that have not seen an input; `explain(model)` names them.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: the model is no module, or a scripted one.
    """
    _check_model(model)
    for module in list(model.modules()):
        convert_norm(module)
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Makes a model's batch norms fastbn's and computes what follows them with them, in place.

    Wherever a model computes act(norm(x)), act(norm(x) + residual) or norm(x) + residual, even
    across modules, one call of fastbn's takes the place of the two or three. All modules stay,
    with their parameters, hooks and names. Modules that call norms get a class of the same
    name with another `forward`, which `torch.fx` records from the module's own. The record is
    used while the module's attributes are as they were, and is made anew when they change.
    Global variables that a `forward` reads keep their values of the time of the record.

    Each call fuses only what it may at that time. It does not fuse, for example, where a hook
    would see the norm's output or where a residual must be broadcast. Results are those of the
    unfused model.

    Args:
        model: any module, fused ones too.

    Returns:
        The model. `revert` undoes the change, and `explain(model)` says what became of its norms.

    Raises:
        TypeError: the model is no module, or a scripted one.
    """
    convert(model)
    for module in reversed(list(model.modules())):
        if isinstance(module, torch.jit.ScriptModule) or is_wrapped(module):
            continue
        if isinstance(module, fx.GraphModule):
            fuse_graph(module)
        elif isinstance(module, nn.Sequential) and _has_stock_forward(module):
            fuse_sequential(module)
        elif module._modules and type(module).forward is not nn.Module.forward:
            fuse_owner(module)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Gives a model's modules the classes back that they had before `convert`, `fuse` and
    `convert_sync_batchnorm`, in place.

    `FusedBatchNorm*d` becomes `nn.BatchNorm*d`, even if the model was made with it, unless it
    has options that `nn.BatchNorm*d` does not have. In the same way `FusedSyncBatchNorm` becomes
    `nn.SyncBatchNorm`. Norms that were made as `FusedBatchNormAct*d` or `FusedSyncBatchNormAct`
    stay.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: the model is no module, or a scripted one.
    """
    _check_model(model)
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            revert_graph(module)
        revert_class(module)
        revert_sync_norm(module)
        revert_norm(module)
    return model


def _has_stock_forward(module: nn.Sequential) -> bool:
    return getattr(module, "_fastbn_original", type(module)).forward is nn.Sequential.forward


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, but got a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model must be a module in Python, but got a scripted one; fuse it before scripting"
        )

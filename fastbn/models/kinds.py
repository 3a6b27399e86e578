"""Says of which kind a module is: a norm or an activation, and what its calls do with memory.

The answer holds for the moment: a module with a hook, or with a `forward` of its own, is of no
kind.
"""

from __future__ import annotations

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..activations import activation_of, has_global_hooks, has_hooks, runs
from ..modules import _Fused, _FusedAct, fused_activation
from .generated import Generated

_NONE = ("none", None)
_STOCK_CALL = nn.Module.__call__


def is_unpatched(module: nn.Module) -> bool:
    return runs(module, type(module).forward)


def is_bare_norm(module: nn.Module) -> bool:
    """Says whether a module is one of fastbn's norms, and computes that norm and nothing else."""
    if not isinstance(module, _Fused):
        return False
    if isinstance(module, _FusedAct):
        return runs(module, _FusedAct.forward) and fused_activation(module) == _NONE
    return runs(module, _Fused.forward)


def ends_in_norm(module: nn.Module) -> bool:
    """Says whether something that follows a module may become part of its last norm."""
    return is_bare_norm(module) or (isinstance(module, Generated) and module._fastbn_ends_in_norm)


def is_activation(module: nn.Module) -> bool:
    """Says whether a module computes an activation that the kernels know."""
    return not isinstance(module, nn.Identity) and activation_of(module) is not None


_DROPS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
# Stochastic depth in torchvision and timm, with the names of their probabilities.
_DROP_PATHS = {
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): "p",
    ("timm.layers.drop", "DropPath"): "drop_prob",
}


# Modules of these classes leave their input alone and return new memory, if their `forward` is
# defined in one of these places.
_FRESH = (
    _ConvNd, nn.Linear, _BatchNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample,
)  # fmt: skip
_FRESH_PLACES = ("torch.nn.", "fastbn.", "timm.layers.", "torchvision.ops.")


def makes_fresh(module: nn.Module) -> bool:
    """Says whether a call of a module leaves its input alone and returns other memory."""
    if not _runs_its_class(module):
        return False
    if isinstance(module, nn.Sequential):
        return _is_stock_sequential(module) and makes_fresh(next(iter(module)))
    if isinstance(module, Generated):
        return module._fastbn_makes_fresh
    return isinstance(module, _FRESH) and type(module).forward.__module__.startswith(_FRESH_PLACES)


def lets_go(module: nn.Module) -> bool:
    """Says whether a call of a module returns new memory that nobody else keeps."""
    if not makes_fresh(module):
        return False
    if isinstance(module, nn.Sequential):
        # The layers after the last one that makes new memory must not keep it.
        rest = list(module)
        while rest and keeps_nothing(rest[-1]):
            rest.pop()
        return bool(rest) and lets_go(rest[-1])
    return module._fastbn_lets_go if isinstance(module, Generated) else True


def keeps_nothing(module: nn.Module) -> bool:
    """Says whether a call of a module may return its input, and keeps nothing of it."""
    return is_activation(module) or (may_pass_unchanged(module) and _runs_its_class(module))


def returns_tensor(module: nn.Module) -> bool:
    """Says whether a call of a module returns a tensor and nothing else."""
    if not _runs_its_class(module) or has_global_hooks():
        return False
    if isinstance(module, nn.Sequential):
        return _is_stock_sequential(module) and returns_tensor(list(module)[-1])
    returns_more = isinstance(module, nn.MaxPool2d) and module.return_indices
    is_stock = isinstance(module, _FRESH) and makes_fresh(module)
    return is_activation(module) or (is_stock and not returns_more)


def _runs_its_class(module: nn.Module) -> bool:
    """Says whether a call of a module runs the `forward` of its class, and nothing of its own."""
    stock = type(module).__call__ is _STOCK_CALL
    return stock and not has_hooks(module) and is_unpatched(module)


def _is_stock_sequential(module: nn.Sequential) -> bool:
    """Says whether a Sequential calls its modules one after the other, and has one."""
    forward = getattr(module, "_fastbn_original", type(module)).forward
    stock = forward is nn.Sequential.forward and type(module).__iter__ is nn.Sequential.__iter__
    return stock and len(module._modules) > 0


def may_pass_unchanged(module: nn.Module) -> bool:
    """Says whether a module is of a type that returns its input, always or in eval mode."""
    return type(module) in (nn.Identity, *_DROPS) or _name(module) in _DROP_PATHS


def passes_unchanged(layers: tuple[nn.Module, ...]) -> bool:
    """Says whether calls of all these layers would return their input."""
    for layer in layers:
        if has_hooks(layer) or not (may_pass_unchanged(layer) and is_unpatched(layer)):
            return False
        if type(layer) is not nn.Identity and layer.training:
            probability = _DROP_PATHS.get(_name(layer), "p")
            if getattr(layer, probability) != 0:
                return False
    return True


def is_harmless(module: nn.Module) -> bool:
    """Says whether a call of a module leaves its input alone."""
    return makes_fresh(module) or (type(module) is nn.Identity and passes_unchanged((module,)))


def _name(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__

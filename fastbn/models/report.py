"""Reports what became of a model's norms, and what memory traffic that saves."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from ..activations import saved_for
from ..kernels.device import H100
from ..kernels.plan import make_plan
from ..modules import _Fused
from ..runtime.layout import problem_of
from .chains import Fold, folds_in
from .kinds import ends_in_norm, is_activation, is_bare_norm, passes_unchanged
from .owners import FusedOwner, current_variants, plan_owner
from .sequential import FusedSequential

# Numbers of tensors that a separate addition and a separate activation read or write in a training
# step: the addition 3 forward and 0 backward, the activation 2 forward and 3 backward.
_ADDITION, _ACTIVATION = 3, 5

_KINDS = {
    "own act": "with an activation of their own",
    "act": "norm and activation",
    "add+act": "norm, addition and activation",
    "add": "norm and addition",
    "plain": "plain",
}


@dataclass(frozen=True)
class ModelExplanation:
    """The result of `explain` for a model, which prints as plain words.

    Attributes:
        kinds: for the path of each norm "act", "add+act", "add", "own act" or "plain": what
            is computed with it.
        reasons: for the path of each plain norm why it is plain.
        unknown: paths and class names of batch norms that fastbn does not take over.
        saved_bytes: bytes that a training step need not read or write, compared with the
            same norms followed by additions and activations of their own, each counted as if
            it was a ReLU; None without an input.
    """

    kinds: dict[str, str]
    reasons: dict[str, str]
    unknown: dict[str, str]
    saved_bytes: int | None = None

    def __str__(self) -> str:
        counts = Counter(self.kinds.values())
        lines = [f"{len(self.kinds)} batch norms are fastbn's."]
        lines += [f"{counts[kind]:5} {words}" for kind, words in _KINDS.items() if counts[kind]]
        for reason, number in Counter(self.reasons.values()).most_common():
            lines.append(f"{number:11} plain because {reason}")
        for path, name in self.unknown.items():
            lines.append(f"{path} stays a {name}.")
        if self.saved_bytes is not None:
            lines.append(f"A training step reads and writes {self.saved_bytes / 1e6:.1f} MB less.")
        return "\n".join(lines)


def explain_model(model: nn.Module, input: Any = None) -> ModelExplanation:
    """Explains a model; see `fastbn.explain`."""
    names = {module: path for path, module in model.named_modules()}
    norms = [module for module in names if isinstance(module, _Fused)]
    kinds = {names[norm]: "plain" if is_bare_norm(norm) else "own act" for norm in norms}
    reasons = {
        path: "no forward that was recorded calls it"
        for path, kind in kinds.items()
        if kind == "plain"
    }
    # Owners come after the modules in them, since only an owner sees what follows a module that
    # ends in a norm.
    for module in reversed(list(names)):
        for child, kind, reason in _folds(module):
            path = names.get(_last_norm(child))
            if path is None or kinds.get(path) == "own act":
                continue
            if kind != "plain":
                kinds[path] = kind
                reasons.pop(path, None)
            elif path in reasons:
                reasons[path] = reason
    unknown = {
        path: type(module).__name__
        for module, path in names.items()
        if isinstance(module, _BatchNorm) and not isinstance(module, _Fused)
    }
    saved = None if input is None else _saved_bytes(model, input, kinds)
    return ModelExplanation(kinds, reasons, unknown, saved)


def _folds(module: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Returns the children of a module that are norms or end in one, and what becomes of these."""
    children = list(module._modules.values())
    norms = [child for child in children if child is not None and ends_in_norm(child)]
    if isinstance(module, FusedSequential):
        followers = zip(children, [*children[1:], None])
        return [_fold_in_sequential(norm, after) for norm, after in followers if norm in norms]
    if isinstance(module, fx.GraphModule):
        return [_fold_in_owner(module, fold) for fold in folds_in(module.graph, module)]
    if isinstance(module, FusedOwner):
        found = current_variants(module)
        fusing = [variant for variant in found if variant.forward is not None] or found
        if fusing and fusing[0].folds:
            return [_fold_in_owner(module, fold) for fold in fusing[0].folds]
    stock = type(module).forward in (nn.Module.forward, nn.Sequential.forward)
    if not norms or stock:
        return []
    generated, reason = plan_owner(module)
    name = type(module).__name__
    if generated is not None and not isinstance(module, FusedOwner):
        reason = "the model is not fused"
    else:
        reason = f"{name} can't be traced: {reason}" if reason else f"nothing in {name} follows it"
    return [(norm, "plain", reason) for norm in norms]


def _fold_in_sequential(norm: Any, after: nn.Module | None) -> tuple[nn.Module, str, str]:
    if after is None:
        return norm, "plain", "nothing follows it in a Sequential"
    if is_activation(after):
        return norm, "act", ""
    return norm, "plain", f"next is {type(after).__name__}"


def _fold_in_owner(owner: nn.Module, fold: Fold) -> tuple[nn.Module, str, str]:
    norm = owner.get_submodule(fold.path)
    for path in fold.layers:
        layer = owner.get_submodule(path)
        if not passes_unchanged((layer,)):
            return norm, "plain", f"next is {type(layer).__name__}"
    return norm, fold.kind, fold.reason


def _last_norm(module: nn.Module) -> nn.Module | None:
    """Returns the norm that a module is or ends in."""
    if isinstance(module, _Fused):
        return module
    if isinstance(module, nn.Sequential):
        return _last_norm(list(module._modules.values())[-1])
    if isinstance(module, FusedOwner):
        for variant in current_variants(module):
            if variant.tail is not None:
                return _last_norm(module.get_submodule(variant.tail))
    return None


def _saved_bytes(model: nn.Module, input: Any, kinds: dict[str, str]) -> int:
    """Counts the bytes that the two-pass kernels save against a norm and separate operations."""
    inputs = input if isinstance(input, (tuple, list)) else (input,)
    shadow = copy.deepcopy(model).to("meta")
    saved = 0.0

    def count(path: str, norm: _Fused, x: Tensor) -> None:
        nonlocal saved
        kind = kinds[path]
        if kind == "plain":
            return
        adds, acts = kind.startswith("add"), kind != "add"
        saves = saved_for("relu" if acts else "none", adds)

        def units(residual: bool, saves: str | None) -> float:
            plan = make_plan(problem_of(x, True, residual, saves), H100, "two-pass")
            return plan.forward.units + plan.backward.units

        apart = units(False, None) + _ADDITION * adds + _ACTIVATION * acts
        saved += (apart - units(adds, saves)) * x.numel() * x.element_size()

    for path, module in shadow.named_modules():
        if path in kinds:
            module.register_forward_pre_hook(
                lambda norm, args, path=path: count(path, norm, args[0])
            )
    with torch.no_grad():
        shadow(*(x.to("meta") if isinstance(x, Tensor) else x for x in inputs))
    return round(saved)

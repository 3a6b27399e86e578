"""Calls recalled: one like an earlier one is neither checked nor planned again.

It goes straight to its kernels, past PyTorch's dispatcher, which takes three
microseconds. Calls are alike if they agree in kind (options, inference mode, which tensors are
None) and in all that PyTorch's guards compare of the others: type, what the dispatcher goes by
(device, lazy negation, batches, autocast), dtype, sizes, strides, need of a gradient.
Guards, made for `torch.compile`, take a third of a microsecond; to look at
every property from here takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._dynamo.guards import TensorGuards
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

from . import calls
from .backend import PLAIN, oddity, of_inference
from .calls import Call
from .layout import dense

# More kinds of calls than this are forgotten and found anew; of a kind, all but the latest.
_LIMIT = 1024
_LIMIT_OF_A_KIND = 32

# By what is quickly asked; what else tells calls apart is left to the guards.
_kept: dict[Hashable, list[tuple[TensorGuards, Call]]] = {}


def observed() -> bool:
    """Whether a compiler, a mode or the profiler is to see operators, unnoticed by guards.

    Then nothing is to be recalled or kept.
    """
    return is_compiling() or _len_torch_dispatch_stack() > 0 or _profiler_enabled()


def find(kind: Hashable, tensors: Sequence[Tensor | None]) -> Call | None:
    """What `keep` kept for a call like this, or None.

    Args:
        kind: at least what guards don't compare: options, inference mode for a call
            that writes or saves tensors, and which tensors are None.
        tensors: the first is not None.
    """
    # The sizes of others need not be hashable.
    if type(tensors[0]) not in PLAIN:
        return None
    kept = _kept.get(kind)
    if kept is not None:
        given = [t for t in tensors if t is not None]
        for guards, call in kept:
            if guards.check(*given):
                return call
    return None


def keep(
    kind: Hashable, tensors: Sequence[Tensor | None], plan: Callable[..., Call], *options: Hashable
) -> Call | None:
    """Plans a call, and keeps the plan.

    None if the call must go through the dispatcher: a tracer listens to it, or a
    tensor is not what it seems, or lies in memory as the kernels don't take it.
    """
    # Guards compare what tracers change, so they must not be made under one.
    if _get_tracing_state() is not None or _len_torch_dispatch_stack_pre_dispatch() > 0:
        return None
    given = [t for t in tensors if t is not None]
    if any(oddity(t, given[0].device) is not None or of_inference(t) for t in given):
        return None
    call = plan(tensors, *options)
    if any(dense(t, call.format) is not t for t in given):
        return None
    sizes, strides = [list(t.shape) for t in given], [list(t.stride()) for t in given]
    guards = TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    # They never match where one tensor is in two places.
    if guards.check(*given):
        if kind not in _kept and len(_kept) >= _LIMIT:
            _kept.clear()
        # A new list: another thread may be looking through the old one.
        _kept[kind] = [(guards, call), *_kept.get(kind, ())][:_LIMIT_OF_A_KIND]
    return call


def forget() -> None:
    """Forgets all calls and their plans."""
    _kept.clear()
    calls.forget()

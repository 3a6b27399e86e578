"""Caches execution plans, so that a call like an earlier one needs no checks and no planning.

Such a call goes straight to its kernels, without PyTorch's dispatcher, which takes three
microseconds. Two calls are alike if their keys are equal and PyTorch's guards find their
tensors alike. The key holds what guards don't compare: options, inference mode, and which
tensors are None. Guards compare each tensor's type, dispatch keys (device, lazy negation,
batching, autocast), dtype, sizes, strides and whether it requires a gradient.

Guards were made for `torch.compile` and take a third of a microsecond; comparing the same
properties in Python takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._dynamo.guards import TensorGuards
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

from . import execution_plan
from .execution_plan import ExecutionPlan
from .layout import dense
from .support import PLAIN_TYPES, not_plain_reason, unusable_inference_tensor

# With more keys than this the cache is emptied; with more entries under one key,
# the oldest of them is dropped.
_MAX_KEYS = 1024
_MAX_ENTRIES_OF_A_KEY = 32

_entries: dict[Hashable, list[tuple[TensorGuards, ExecutionPlan]]] = {}


def must_use_dispatcher() -> bool:
    """Says whether a compiler, a dispatch mode or the profiler wants to see the call's operators.

    Guards don't notice any of the three, so the cache must be neither read nor filled.
    """
    return is_compiling() or _len_torch_dispatch_stack() > 0 or _profiler_enabled()


def lookup(key: Hashable, tensors: Sequence[Tensor | None]) -> ExecutionPlan | None:
    """Returns the plan that `insert` stored for a call like this one, or None.

    Args:
        key: at least what guards don't compare: the call's options, inference mode if
            the call writes or saves tensors, and which tensors are None.
        tensors: the call's tensors, of which the first is not None.
    """
    # A tensor subclass may have sizes that can't be hashed, which a key must be.
    if type(tensors[0]) not in PLAIN_TYPES:
        return None
    entries = _entries.get(key)
    if entries is not None:
        given = [t for t in tensors if t is not None]
        for guards, plan in entries:
            if guards.check(*given):
                return plan
    return None


def insert(
    key: Hashable,
    tensors: Sequence[Tensor | None],
    planner: Callable[..., ExecutionPlan],
    *options: Hashable,
) -> ExecutionPlan | None:
    """Plans a call by `planner(tensors, *options)`, and stores the plan for calls like it.

    Returns None, and stores nothing, for a call that must go through the dispatcher:
    a tracer records it, one of its tensors is not plain memory, or one has strides
    that the kernels can't read.
    """
    # Guards compare state that a tracer changes, so guards made now would never match.
    if _get_tracing_state() is not None or _len_torch_dispatch_stack_pre_dispatch() > 0:
        return None
    given = [t for t in tensors if t is not None]
    device = given[0].device
    if any(not_plain_reason(t, device) or unusable_inference_tensor(t) for t in given):
        return None
    plan = planner(tensors, *options)
    if any(dense(t, plan.format) is not t for t in given):
        return None
    sizes, strides = [list(t.shape) for t in given], [list(t.stride()) for t in given]
    guards = TensorGuards(  # PyTorch's stub has one list for all tensors
        *given,
        dynamic_dims_sizes=sizes,  # type: ignore[arg-type]
        dynamic_dims_strides=strides,  # type: ignore[arg-type]
    )
    # Guards never match a call that passes one tensor twice: don't store such an entry.
    if guards.check(*given):
        if key not in _entries and len(_entries) >= _MAX_KEYS:
            _entries.clear()
        # Make a new list, since another thread may be reading the old one.
        _entries[key] = [(guards, plan), *_entries.get(key, ())][:_MAX_ENTRIES_OF_A_KEY]
    return plan


def clear() -> None:
    """Drops all stored plans, and the planner's own cached decisions."""
    _entries.clear()
    execution_plan.clear()

"""The operators `torch.ops.fastbn.*`: what `run.py` does, as PyTorch's machinery sees it.

They know nothing of gradients: `autograd.py` wraps them. What is not asked for
is None or, from an operator, whose schema has no optional results, an empty tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

from . import run
from .layout import mask_sizes, memory_format, statistics_dtype

_library = torch.library.Library("fastbn", "DEF")

_OWN = (Tensor, torch.nn.Parameter)

# Arguments of the backward that are tensors come first.
_TENSORS = 8


def _or_empty(tensor: Tensor | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(0, dtype=dtype) if tensor is None else tensor


def _forward_train(x, *args):
    _check_devices(x, *args[:6])
    *results, mask = run.forward_train(x, *args)
    return *results, _or_empty(mask, x, torch.uint8)


def _forward_eval(x, *args):
    _check_devices(x, *args[:5])
    y, mask = run.forward_eval(x, *args)
    return y, _or_empty(mask, x, torch.uint8)


def _backward(dy, x, residual, mask, weight, bias, *args):
    _check_devices(dy, x, residual, mask, weight, bias, *args[:2])
    dx, dw, db, dr = run.backward(dy, x, residual, mask, weight, bias, *args)
    dw = _or_empty(dw, x if weight is None else weight)
    db = _or_empty(db, x if bias is None else bias)
    return _or_empty(dx, x), dw, db, _or_empty(dr, x)


def _empty_like(x: Tensor, wanted: bool = True) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    return torch.empty_like(x, memory_format=memory_format(x))


def _empty_mask(x: Tensor, wanted: bool) -> Tensor:
    size = math.prod(mask_sizes(x)) if wanted else 0
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _empty_parameter(parameter: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    return (x if parameter is None else parameter).new_empty(x.shape[1] if wanted else 0)


def _fake_forward_train(
    x, residual, weight, bias, running_mean, running_var, batches_tracked, momentum, eps,
    activation, param, save_mask,
):  # fmt: skip
    statistics = x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x.dtype))
    return _empty_like(x), statistics, _empty_mask(x, save_mask)


def _fake_forward_eval(x, residual, weight, bias, mean, var, eps, activation, param, save_mask):
    return _empty_like(x), _empty_mask(x, save_mask)


def _fake_backward(
    dy, x, residual, mask, weight, bias, statistics, var, eps, activation, param, wanted
):
    want_dx, want_dw, want_db, want_dr = wanted
    dw, db = _empty_parameter(weight, x, want_dw), _empty_parameter(bias, x, want_db)
    return _empty_like(x, want_dx), dw, db, _empty_like(x, want_dr)


def _heard() -> bool:
    """Whether anybody listens to the dispatcher: a compiler, a tracer, a mode, the profiler."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_dispatch_stack_pre_dispatch() > 0
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def _plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors are what they seem: of one device, no subclass, not negated, no batch."""
    device = tensors[0].device
    for t in tensors:
        if t is not None and (type(t) not in _OWN or t.is_neg() or t.device != device):
            return False
    return not is_legacy_batchedtensor(tensors[0])  # of `is_grads_batched`


def _check_devices(*tensors: Tensor | None) -> None:
    """The operators' tensors may be anything; a launch from the cache would not look at them."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"expected all tensors on one device, but got {names}")


def _register(name: str, signature: str, implementation: Callable, fake: Callable) -> Callable:
    """Defines an operator and returns what to call for its results.

    PyTorch's dispatcher takes three microseconds to pass on a call. It is asked
    only where somebody listens to it, or for tensors that are not its own. What
    goes forward has been looked at (`backend.unserved`); a gradient, and what
    hooks make of saved tensors, may be anything.
    """
    _library.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"fastbn::{name}", fake, lib=_library)
    operator, direct = getattr(torch.ops.fastbn, name).default, getattr(run, name)
    unseen = _TENSORS if name == "backward" else 0

    def call(*args: Any) -> tuple[Tensor | None, ...]:
        if _heard() or (unseen and not _plain(args[:unseen])):
            return operator(*args)
        return direct(*args)

    return call


forward_train = _register(
    "forward_train",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps,"
    " str activation, float activation_param, bool save_mask)"
    " -> (Tensor output, Tensor statistics, Tensor mask)",
    _forward_train,
    _fake_forward_train,
)
forward_eval = _register(
    "forward_eval",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
    " float eps, str activation, float activation_param, bool save_mask)"
    " -> (Tensor output, Tensor mask)",
    _forward_eval,
    _fake_forward_eval,
)
backward = _register(
    "backward",
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor? mask, Tensor? weight,"
    " Tensor? bias, Tensor statistics, Tensor? var, float eps, str activation,"
    " float activation_param, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

"""The operators `torch.ops.fastbn.*`: allocate, plan, launch. Nothing else launches a kernel.

They know nothing of gradients: `autograd.py` wraps them. What an operator does
not return (no mask asked for, a gradient not wanted) is an empty tensor, since
operator schemas have no optional results.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels.backward import bn_apply_bwd_kernel, bn_reduce_bwd_kernel
from .kernels.forward import bn_apply_fwd_kernel, bn_stats_fwd_kernel
from .kernels.plan import Plan, Problem, Tile, make_plan
from .kernels.resident import bn_resident_bwd_kernel, bn_resident_fwd_kernel
from .launch import device_facts, on_device
from .layout import mask_sizes, memory_format, sizes

# Multiplications and additions are not contracted, so that the backward finds
# the activation's argument on the side of a kink where the forward left it.
# Triton's default is about to change (3.10), and differs between targets.
_OPTIONS = {"enable_fp_fusion": False}

_library = torch.library.Library("fastbn", "DEF")


def make_problem(
    x: Tensor, training: bool = True, residual: bool = False, saves: str | None = None
) -> Problem:
    """What the planner needs to know of a call."""
    n, c, s = sizes(x, memory_format(x))
    return Problem(n, c, s, x.element_size(), training, residual, saves)


def _plan(x: Tensor, training: bool) -> Plan:
    return make_plan(make_problem(x, training), device_facts(x.device))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A tensor in the memory format of `x`, by a copy if need be."""
    return None if tensor is None else tensor.contiguous(memory_format=memory_format(x))


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _empty_like(x: Tensor, wanted: bool = True) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    return torch.empty_like(x, memory_format=memory_format(x))


def _empty_mask(x: Tensor, wanted: bool) -> Tensor:
    size = math.prod(mask_sizes(x)) if wanted else 0
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _empty_parameter(parameter: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    """For the gradient of a weight or bias."""
    return (x if parameter is None else parameter).new_empty(x.shape[1] if wanted else 0)


def _arrivals(x: Tensor, blocks: int) -> Tensor:
    """Counters of the programs that have arrived, for one launch."""
    return torch.zeros(blocks, dtype=torch.int32, device=x.device)


def _given(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _extents(plan: Plan) -> tuple[int, int, int]:
    """N, C, S as the kernels take them: the contiguous one in units of plan.align."""
    n, c, s = plan.problem.n, plan.problem.c, plan.problem.s
    return (n, c // plan.align, s) if s == 1 else (n, c, s // plan.align)


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_N": tile.n, "BLOCK_C": tile.c, "BLOCK_S": tile.s, "num_warps": tile.warps, **_OPTIONS
    }  # fmt: skip


def _programs(tile: Tile, plan: Plan) -> tuple[int]:
    n, c, s = tile.grid(plan.problem)
    return (n * c * s,)


def _written(*tensors: Tensor | None) -> None:
    """Tells autograd, which checks saved tensors for changes, of a kernel's writes."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _forward_train(
    x, residual, weight, bias, running_mean, running_var, batches_tracked, momentum, eps,
    activation, param, save_mask,
):  # fmt: skip
    plan = _plan(x, training=True)
    c = x.shape[1]
    reduce, tile = plan.forward_reduce, plan.forward_apply
    blocks = reduce.tile.grid(plan.problem)[1]
    # All memory is there before anything is written: what runs out leaves no trace.
    x, residual, weight, bias = _like(x, x), _like(residual, x), _dense(weight), _dense(bias)
    y, mask = _empty_like(x), _empty_mask(x, save_mask)
    mean = torch.empty(c, dtype=_statistics_dtype(x), device=x.device)
    rstd = torch.empty_like(mean)
    cumulative = momentum is None and batches_tracked is not None
    momentum = 0.0 if momentum is None else momentum
    if plan.strategy == "resident":
        arrivals = _arrivals(x, 1) if cumulative else None
        with on_device(x.device):
            bn_resident_fwd_kernel[_programs(tile, plan)](
                x, residual, y, _given(mask), weight, bias, mean, rstd, running_mean, running_var,
                batches_tracked, arrivals, *_extents(plan), momentum, eps, param,
                ALIGN=plan.align, ACTIVATION=activation, CUMULATIVE=cumulative,
                **_blocks(tile),
            )  # fmt: skip
        _written(running_mean, running_var, batches_tracked)
        return y, mean, rstd, mask
    partials = torch.empty(reduce.splits * (2 * c + blocks), dtype=mean.dtype, device=x.device)
    arrivals = _arrivals(x, blocks)
    with on_device(x.device):
        bn_stats_fwd_kernel[(reduce.splits * blocks,)](
            x, mean, rstd, running_mean, running_var, batches_tracked if cumulative else None,
            partials, arrivals, *_extents(plan), reduce.splits, momentum, eps,
            ALIGN=plan.align, MERGE=reduce.merge, **_blocks(reduce.tile),
        )  # fmt: skip
        bn_apply_fwd_kernel[_programs(tile, plan)](
            x, residual, y, _given(mask), weight, bias, mean, rstd, batches_tracked,
            *_extents(plan), eps, param,
            ALIGN=plan.align, ACTIVATION=activation, FROZEN=False, **_blocks(tile),
        )  # fmt: skip
    _written(running_mean, running_var, batches_tracked)
    return y, mean, rstd, mask


def _forward_eval(x, residual, weight, bias, mean, var, eps, activation, param, save_mask):
    plan = _plan(x, training=False)
    tile = plan.forward_apply
    y, mask = _empty_like(x), _empty_mask(x, save_mask)
    with on_device(x.device):
        bn_apply_fwd_kernel[_programs(tile, plan)](
            _like(x, x), _like(residual, x), y, _given(mask), _dense(weight), _dense(bias),
            _dense(mean), _dense(var), None, *_extents(plan), eps, param,
            ALIGN=plan.align, ACTIVATION=activation, FROZEN=True, **_blocks(tile),
        )  # fmt: skip
    return y, mask


def _backward(
    dy, x, residual, mask, weight, bias, mean, rstd, eps, activation, param, frozen, wanted
):
    plan = _plan(x, training=not frozen)
    c = x.shape[1]
    want_dx, want_dw, want_db, want_dr = wanted
    dy, x, residual = _like(dy, x), _like(x, x), _like(residual, x)
    weight, bias, mean, rstd = _dense(weight), _dense(bias), _dense(mean), _dense(rstd)
    inputs = (dy, x, residual, _given(mask), weight, bias, mean, rstd)
    dx, dr = _empty_like(x, want_dx), _empty_like(x, want_dr)
    dw, db = _empty_parameter(weight, x, want_dw), _empty_parameter(bias, x, want_db)
    reduce, tile = plan.backward_reduce, plan.backward_apply
    blocks = reduce.tile.grid(plan.problem)[1]
    if not any(wanted):
        return dx, dw, db, dr
    if plan.strategy == "resident":
        with on_device(x.device):
            bn_resident_bwd_kernel[_programs(tile, plan)](
                *inputs, _given(dw), _given(db), _given(dx), _given(dr), *_extents(plan), param,
                ALIGN=plan.align, ACTIVATION=activation, **_blocks(tile),
            )  # fmt: skip
        return dx, dw, db, dr
    need_sums = want_dw or want_db or (want_dx and not frozen)
    sums = partials = arrivals = None
    if need_sums:
        sums = torch.empty(2 * c, dtype=_statistics_dtype(x), device=x.device)
        partials = torch.empty(2 * reduce.splits * c, dtype=sums.dtype, device=x.device)
        arrivals = _arrivals(x, blocks)
    with on_device(x.device):
        if need_sums or frozen:
            bn_reduce_bwd_kernel[(reduce.splits * blocks,)](
                *inputs, _given(dw), _given(db), sums,
                _given(dx) if frozen else None, _given(dr) if frozen else None,
                partials, arrivals, *_extents(plan), reduce.splits, eps, param,
                ALIGN=plan.align, MERGE=reduce.merge, ACTIVATION=activation, FROZEN=frozen,
                **_blocks(reduce.tile),
            )  # fmt: skip
        if (want_dx or want_dr) and not frozen:
            bn_apply_bwd_kernel[_programs(tile, plan)](
                *inputs, sums, _given(dx), _given(dr), *_extents(plan), param,
                ALIGN=plan.align, ACTIVATION=activation, **_blocks(tile),
            )  # fmt: skip
    return dx, dw, db, dr


def _fake_forward_train(
    x, residual, weight, bias, running_mean, running_var, batches_tracked, momentum, eps,
    activation, param, save_mask,
):  # fmt: skip
    mean = torch.empty(x.shape[1], dtype=_statistics_dtype(x), device=x.device)
    return _empty_like(x), mean, torch.empty_like(mean), _empty_mask(x, save_mask)


def _fake_forward_eval(x, residual, weight, bias, mean, var, eps, activation, param, save_mask):
    return _empty_like(x), _empty_mask(x, save_mask)


def _fake_backward(
    dy, x, residual, mask, weight, bias, mean, rstd, eps, activation, param, frozen, wanted
):
    want_dx, want_dw, want_db, want_dr = wanted
    dw, db = _empty_parameter(weight, x, want_dw), _empty_parameter(bias, x, want_db)
    return _empty_like(x, want_dx), dw, db, _empty_like(x, want_dr)


def _register(name: str, signature: str, implementation, fake):
    _library.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"fastbn::{name}", fake, lib=_library)
    return getattr(torch.ops.fastbn, name).default


forward_train = _register(
    "forward_train",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps,"
    " str activation, float activation_param, bool save_mask)"
    " -> (Tensor output, Tensor mean, Tensor rstd, Tensor mask)",
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
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor mask, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor rstd, float eps, str activation, float activation_param,"
    " bool frozen, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

"""A launcher starts the kernel that Triton would have started.

Triton's own binder says what a call is specialised on. Nothing is compiled or launched.
"""

import itertools

import pytest
import torch
from triton.runtime import JITFunction, driver

from fastbn.kernels import backward, forward, resident, ticketed
from fastbn.kernels.device import H100
from fastbn.runtime import execution_plan, torch_ops, workspace
from fastbn.runtime.device import limits_registers
from fastbn.runtime.layout import memory_format

from .compile_kernels import TARGETS, _Driver

KERNELS = {
    name: getattr(module, name)
    for module in (forward, backward, resident, ticketed)
    for name in vars(module)
    if name.startswith("bn_") and name.endswith("_kernel")
}


class Kernel(JITFunction):
    """A kernel that answers a launch with what Triton would specialise it on."""

    def __init__(self, kernel, dispatched, started):
        super().__init__(kernel.fn)
        self.dispatched, self.started = dispatched, started
        self.binder = self.create_binder()[-1]

    def specialisation(self, args, kwargs):
        _, specialisation, options = self.binder(*args, **kwargs)
        return str(specialisation), str(options)

    def run(self, *args, grid, warmup, **kwargs):
        self.dispatched.append((self.__name__, grid))
        kwargs = {"debug": False, **kwargs}
        return Compiled(self, self.specialisation(args, kwargs), kwargs)


class Compiled:
    def __init__(self, kernel, specialisation, kwargs):
        self.kernel, self.specialisation, self.kwargs = kernel, specialisation, kwargs

    def __getitem__(self, grid):
        return lambda *args: self.kernel.started.append((self, grid, args))


@pytest.fixture
def launches(monkeypatch, replan):
    """Lists the kernels that Triton dispatches, and those that launchers start from the cache."""
    monkeypatch.setattr(driver, "_active", _Driver(TARGETS["sm_90"]))
    dispatched, started = [], []
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(execution_plan, name, Kernel(kernel, dispatched, started))
    monkeypatch.setattr(execution_plan, "device_facts", lambda device: H100)
    monkeypatch.setattr(execution_plan, "limits_registers", lambda device: True)
    return dispatched, started


def offset(tensor, elements):
    """Returns a copy of a tensor that begins so many elements behind an aligned address."""
    memory = tensor.new_empty(tensor.numel() + elements)
    memory = memory[elements:].as_strided(tensor.shape, tensor.stride())
    return memory.copy_(tensor)


SHAPES = [(4, 16, 8, 8), (4, 17, 8, 8), (4, 16, 7, 7), (64, 1, 8, 8), (512, 64, 28, 28), (70, 48)]
HALF, FULL, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def training_calls():
    """Yields calls that differ from a first one in shape, in dtypes, or in one thing more."""
    for shape in SHAPES:
        for dtype, param in ((FULL, FULL), (HALF, FULL), (HALF, HALF), (DOUBLE, DOUBLE)):
            yield {"shape": shape, "dtype": dtype, "param": param}
    base = {"shape": SHAPES[0], "dtype": HALF, "param": FULL}
    for shape in (SHAPES[0], SHAPES[4]):
        for change in itertools.chain(
            ({"offset": name} for name in ("x", "weight", "mean", "dy")),
            ({"without": name} for name in ("weight", "bias", "statistics", "num_batches_tracked")),
            ({"wanted": wanted} for wanted in itertools.product([True, False], repeat=3)),
            ({"momentum": None}, {"activation": "silu"}, {"residual": True}, {"last": True}),
            ({"eps": 1.0}, {"dy_dtype": FULL}),
        ):
            yield base | {"shape": shape} | change


def call(
    shape, dtype, param, offset_of=None, without=None, wanted=(True, True, True), momentum=0.1,
    activation="relu", residual=False, last=False, eps=1e-5, dy_dtype=None,
):  # fmt: skip
    x = torch.empty(shape, dtype=dtype)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.empty_like(x, dtype=dy_dtype or dtype)
    weight, bias, mean, var = torch.empty(4, 2 * shape[1] + 16, dtype=param).unbind()
    weight, bias, mean, var = (t.clone()[: shape[1]] for t in (weight, bias, mean, var))
    num_batches_tracked = torch.zeros((), dtype=torch.int64)
    if offset_of == "x":
        x = offset(x, 1)
    if offset_of == "dy":
        dy = offset(dy, 1)
    if offset_of == "weight":
        weight = offset(weight, 1)
    if offset_of == "mean":
        mean = offset(mean, 1)
    if without == "weight":
        weight = None
    if without == "bias":
        bias = None
    if without == "statistics":
        mean = var = None
    if without == "num_batches_tracked":
        num_batches_tracked = None
    r = torch.empty_like(x) if residual else None
    want_dx, want_dw, want_db = wanted
    _, statistics, mask = torch_ops._forward_train(
        x,
        r,
        weight,
        bias,
        mean,
        var,
        num_batches_tracked,
        momentum,
        1.0,
        eps,
        activation,
        0.0,
        residual,
    )
    mask, format = (mask, memory_format(x)) if residual else (None, None)
    options = (eps, activation, 0.0, (want_dx, residual, want_dw, want_db), format)
    torch_ops._backward(dy, x, None, mask, weight, bias, statistics, None, *options)
    if mean is not None:
        _, mask = torch_ops._forward_eval(
            x, r, weight, bias, mean, var, eps, activation, 0.0, residual
        )
        mask = mask if residual else None
        torch_ops._backward(dy, x, None, mask, weight, bias, mean, var, *options)


def options_of(change):
    change = dict(change)
    return {"offset_of": change.pop("offset", None), **change}


def test_launcher_starts_the_kernel_that_triton_would(launches, monkeypatch):
    """Varies all that Triton specialises on: dtypes, alignment, sizes, None, constants, options."""
    dispatched, started = launches
    launch = execution_plan.Launcher.__call__
    checked = []

    def spy(self, tensors, *floats):
        before = len(started)
        launch(self, tensors, *floats)
        if len(started) > before:
            compiled, grid, args = started[-1]
            arguments = (*tensors, *self.integers, *floats)
            wanted = self.kernel.specialisation(arguments, {"debug": False, **self.constants})
            assert compiled.specialisation == wanted
            assert compiled.kernel is self.kernel
            # A multiprocessor's registers are shared by four programs, or kept for a resident one.
            warps, resident = compiled.kwargs["num_warps"], "resident" in self.kernel.__name__
            programs = 1 if resident else 4
            assert compiled.kwargs["maxnreg"] == min(255, 65536 // (32 * warps * programs))
            assert grid == self.grid
            pointers = [0 if t is None else t.data_ptr() for t in tensors]
            assert list(args) == [*pointers, *self.integers, *floats, *self._positional]
            checked.append(self.kernel.__name__)

    monkeypatch.setattr(execution_plan.Launcher, "__call__", spy)
    different = list(training_calls())
    # The calls run in order, in reverse and in order again, so that each follows different ones.
    for change in different + different[::-1] + different:
        call(**options_of(change))
    assert set(checked) == set(KERNELS)
    assert len(started) > 1.5 * len(dispatched)


@pytest.mark.parametrize(("device", "hip"), [("cuda", None), ("cuda", "6.4"), ("xpu", None)])
def test_registers_are_limited_on_nvidia_alone(device, hip, monkeypatch):
    """The compilers for other GPUs refuse the option `maxnreg`."""
    monkeypatch.setattr(torch.version, "hip", hip)
    assert limits_registers(torch.device(device)) == (device == "cuda" and hip is None)


def test_identical_calls_are_planned_once(launches):
    dispatched, started = launches
    change = {"shape": (4, 16, 8, 8), "dtype": HALF, "param": FULL}
    call(**change)
    found = (
        len(dispatched),
        execution_plan._plan_forward.cache_info(),
        execution_plan._plan_backward.cache_info(),
    )
    assert started == []
    call(**change)
    assert len(started) == len(dispatched) == found[0]
    assert execution_plan._plan_forward.cache_info().misses == found[1].misses
    assert execution_plan._plan_backward.cache_info().misses == found[2].misses


def test_failed_launch_discards_workspaces(launches, monkeypatch):
    change = {"shape": (512, 64, 28, 28), "dtype": HALF, "param": FULL}
    call(**change)
    assert workspace._workspaces

    def fail(self, *args, **kwargs):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(Kernel, "run", fail)
    execution_plan._plan_forward.cache_clear()
    with pytest.raises(RuntimeError, match="out of resources"):
        call(**change)
    assert not workspace._workspaces

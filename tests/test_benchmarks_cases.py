"""Tests the cases of benchmarks/, their inputs, the rivals, and the check for wrong results."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fastbn
from benchmarks import inputs, rivals
from benchmarks.check import worst_error
from benchmarks.inputs import make_inputs
from benchmarks.plans import device_plan, floor_units
from benchmarks.rivals import Rival
from benchmarks.shapes import BN, BN_ADD_RELU, BN_RELU, Case, cases
from fastbn.kernels.device import H100

CPU = torch.device("cpu")
TINY = Case("MLP", (8, 4), "rows", "float32", BN_RELU)
SMALL = [
    Case("CNN", (6, 8, 5, 5), "channels-first", "float32", BN),
    Case("CNN", (6, 8, 5, 5), "channels-last", "float32", BN_ADD_RELU),
    Case("CNN", (2, 12, 4, 4, 4), "channels-last", "bfloat16", BN_ADD_RELU),
    Case("CNN", (2, 12, 4, 4, 4), "channels-first", "float16", BN_RELU),
    Case("MLP", (64, 16), "rows", "float32", BN_RELU),
]


def test_cases_cover_all_dtypes_epilogues_and_networks():
    for gpu, main in ((True, "bfloat16"), (False, "float32")):
        every, quick = cases(gpu, quick=False), cases(gpu, quick=True)
        assert every[: len(quick)] == quick
        assert len(set(every)) == len(every)
        assert {case.dtype for case in every} == {"float32", "float16", "bfloat16"}
        assert {case.dtype for case in quick} == {main}
        for found in (every, quick):
            assert {case.epilogue for case in found} == {BN, BN_RELU, BN_ADD_RELU}
            for network in ("ResNet-18", "ResNet-50", "MobileNet", "U-Net 2", "U-Net 3", "MLP"):
                layouts = {case.layout for case in found if case.network.startswith(network)}
                both = {"channels-first", "channels-last"}
                assert layouts == ({"rows"} if network == "MLP" else both)
    biggest = max(case.tensor_bytes for case in cases(gpu=True, quick=False))
    assert biggest < 2**30
    assert max(case.tensor_bytes for case in cases(gpu=False, quick=False)) < 2**21


def test_floor_bytes_are_those_of_one_pass():
    unit = 8 * 4 * 4
    assert TINY.tensor_bytes == unit
    with_residual = replace(TINY, epilogue=BN_ADD_RELU)
    assert [TINY.floor_bytes(d) / unit for d in rivals.DIRECTIONS] == [2, 5]
    assert [with_residual.floor_bytes(d) / unit for d in rivals.DIRECTIONS] == [3, 7]


def test_a_round_keeps_all_its_results_alive(monkeypatch):
    """Checks the order too: all forwards come first, so that no backward finds `x` in the cache."""
    alive, order = [], []

    class Result:
        def __init__(self, kind):
            alive.append(weakref.ref(self))
            assert all(one() is not None for one in alive)
            order.append(kind)

    monkeypatch.setattr(rivals, "forward", lambda rival, inputs: Result("forward"))
    monkeypatch.setattr(rivals, "gradients", lambda rival, inputs, y: Result("backward"))
    rivals.DIRECTIONS["forward"](None, [None] * 3)
    assert order == ["forward"] * 3
    assert all(one() is None for one in alive)
    alive.clear()
    rivals.DIRECTIONS["forward+backward"](None, [None] * 3)
    assert order[3:] == ["forward"] * 3 + ["backward"] * 3


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_plan_is_of_the_problem_that_a_call_poses(case, device):
    made, norm = make_inputs(case, device), rivals.fused(case, device).norm
    problem = fastbn.explain(norm, made.x, made.residual).plan.problem
    assert device_plan(case, H100)["problem"] == vars(problem)


def test_floor_units_are_those_of_one_and_two_passes():
    mask = 1 / 32  # a bit for each element of 32; two passes read it twice
    with_residual = replace(TINY, epilogue=BN_ADD_RELU)
    assert [floor_units(TINY, d) for d in rivals.DIRECTIONS] == [(2, 3), (5, 8)]
    assert [floor_units(with_residual, d) for d in rivals.DIRECTIONS] == [
        (3 + mask, 4 + mask),
        (7 + 2 * mask, 10 + 3 * mask),
    ]


def test_input_sets_fill_three_times_the_cache(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1000)
    )
    monkeypatch.setattr(inputs, "make_inputs", lambda case, device: object())
    sets = inputs.input_sets(TINY, torch.device("cuda"))
    assert len(sets) * TINY.tensor_bytes >= 3 * 1000 > (len(sets) - 1) * TINY.tensor_bytes
    assert len(inputs.input_sets(TINY, CPU)) == 2


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_inputs_have_the_layout_and_dtype_of_the_case(case):
    made = make_inputs(case, CPU)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(made.x.dim())
    for tensor in (*made.leaves, made.dy):
        format = last if case.layout == "channels-last" else torch.contiguous_format
        assert tensor.is_contiguous(memory_format=format)
        assert tensor.dtype == getattr(torch, case.dtype)
        assert tensor.std() > 0.5


@pytest.mark.parametrize("name", ["eager", "fastbn"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_rivals_are_right(case, name):
    with fastbn.use_backend("torch"):
        rival = rivals.RIVALS[name](case, CPU)
        for _ in range(2):  # the second time the running statistics are no longer the initial ones
            assert worst_error(case, rival, make_inputs(case, CPU)) <= 1


def _scaled_gradient(norm, y):
    y.register_hook(lambda dy: 1.05 * dy)
    return y


WRONG = {
    "output": lambda norm, y: y + 0.5,
    "gradients": _scaled_gradient,
    "NaN": lambda norm, y: torch.where(y == y.max(), float("nan"), y),
    "running_mean": lambda norm, y: (norm.running_mean.data.add_(0.01), y)[1],
    "running_var": lambda norm, y: (norm.running_var.data.mul_(1.01), y)[1],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_check_finds_wrong_results(case, wrong):
    right = rivals.eager(case, CPU)
    rival = Rival(right.norm, lambda x, r: WRONG[wrong](right.norm, right.call(x, r)))
    assert worst_error(case, rival, make_inputs(case, CPU)) > 1


def test_the_check_finds_a_residual_without_gradient():
    case = SMALL[1]
    norm = rivals.eager(case, CPU).norm
    rival = Rival(norm, lambda x, r: F.relu(norm(x) + r.detach() + 0.9 * (r - r.detach())))
    assert worst_error(case, rival, make_inputs(case, CPU)) > 1


def test_compile_is_compiled_in_both_directions(monkeypatch):
    made, made_with = [], []

    def fake_compile(call, **options):
        made_with.append(options)
        return lambda x, residual: made.append(call(x, residual)) or made[-1]

    monkeypatch.setattr(torch, "compile", fake_compile)
    rival = rivals.compiled(TINY, CPU)
    assert isinstance(rival.norm, nn.BatchNorm1d)
    assert len(made) == 1
    assert made[0].grad_fn is not None
    rivals.cooperative(TINY, CPU)
    usual = {"fullgraph": True, "dynamic": False, "options": None}
    assert made_with == [usual, usual | {"options": {"triton.cooperative_reductions": True}}]


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fake_compile(function):
        raise RuntimeError("\nno C++ compiler\nsee elsewhere")

    monkeypatch.setattr(torch, "compile", fake_compile)
    assert rivals.no_compiler(CPU) == "RuntimeError: no C++ compiler"

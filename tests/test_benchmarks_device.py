"""benchmarks/: probes read what they should, facts follow from times, strategies can be forced."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

import fastbn
from benchmarks import facts, probes
from benchmarks.facts import Copy
from benchmarks.forced import STRATEGIES, forced
from benchmarks.plans import problem_of
from benchmarks.report import Report
from benchmarks.shapes import cases
from fastbn.kernels import plan
from fastbn.kernels.device import H100, Device
from fastbn.runtime.launcher import Launcher

from .test_benchmarks_cases import CPU

L2_BYTES = 2**18
GPU = {"gpu": "Some GPU", "multiprocessors": 7, "l2_bytes": L2_BYTES}


def numbers(*sizes, device):
    return torch.randint(-1000, 1000, sizes, dtype=torch.int32, device=device)


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("visits", [1, 2])
def test_slices_are_read_one_after_the_other(width, visits, device):
    matrix = numbers(512, 64, device=device)
    rows, columns = probes.TILE_BYTES // width, width // probes.ITEMSIZE
    tiles = matrix.view(512 // rows, rows, 64 // columns, columns)
    expected = tiles.sum((1, 3)).T.flatten().repeat(visits)
    assert probes.read_slices(matrix, width, visits).tolist() == expected.tolist()


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_slices_are_copied_and_each_is_read_so_often(reads, device):
    source = numbers(4 * 3 * probes.TILE, device=device)
    target = torch.zeros_like(source)
    sums = probes.copy_slices(source, target, 3 * probes.TILE_BYTES, reads)
    expected = source.view(4, 1, 3, probes.TILE).sum(-1).expand(-1, reads, -1)
    assert sums.tolist() == expected.flatten().tolist()
    assert target.equal(source)


def test_touch(device):
    flags = torch.zeros(5, dtype=torch.int32, device=device)
    probes.touch(flags)
    assert flags.tolist() == [1] * 5


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 1e12 bytes a second, and four times that from the cache.

    Rows of 32 bytes come at a quarter of the speed, of 64 bytes at half; rows
    of 128 seem faster than whole ones. Slices stay up to 0.6 of the cache. A
    launch takes 3 us.
    """
    speeds = {32: 0.25, 64: 0.5, 128: 1.01}

    def read_slices(matrix, width, visits=1):
        bytes = visits * matrix.numel() * probes.ITEMSIZE
        speed = 4 if matrix.numel() * probes.ITEMSIZE <= L2_BYTES / 2 else speeds.get(width, 1)
        return bytes / speed / 1e12

    def copy_slices(source, target, slice_bytes, reads):
        again = 0.25 if slice_bytes <= 0.6 * L2_BYTES else 1
        return source.numel() * probes.ITEMSIZE * (2 + (reads - 1) * again) / 1e12

    launches = []
    fake = SimpleNamespace(read_slices=read_slices, copy_slices=copy_slices, touch=launches.append)
    for name, probe in vars(fake).items():
        monkeypatch.setattr(probes, name, probe)
    monkeypatch.setattr(facts, "COPY_BYTES", 2**21)

    def seconds(play):
        launches.clear()
        took = play()
        return len(launches) * 3e-6 if launches else took

    monkeypatch.setattr(facts, "seconds", seconds)
    return fake


def test_facts(gpu):
    report = Report(CPU, budget=60.0)
    found = facts.device_facts(CPU, GPU, 0.9e12, report.attempt)
    assert report.failures == []
    assert eval(found["line"]) == Device(
        "Some GPU", 7, L2_BYTES, 0.9e12, l2_share=0.5, l2_speed=4.0, launch=3e-6,
        row_rates=((32, 0.25), (64, 0.5), (128, 1.0), (256, 1.0)),
    )  # fmt: skip
    assert [copy["share"] for copy in found["copies"]] == list(facts.SHARES)
    assert found["copies"][0]["twice"] == pytest.approx(1.125 * found["copies"][0]["once"])


def test_a_fact_that_cannot_be_had_is_left_out(gpu, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(probes, "copy_slices", refuse)
    report = Report(CPU, budget=60.0)
    found = facts.device_facts(CPU, GPU, None, report.attempt)
    assert [failure["part"] for failure in report.failures] == ["device facts, l2_share"]
    device = eval(found["line"])
    assert (device.bandwidth, device.l2_share) == (None, Device.l2_share)
    assert (device.l2_speed, device.launch) == (4.0, 3e-6)


@pytest.mark.parametrize(
    ("again", "share"),
    [
        ((0.0, 0.1, 0.6), 1.0),  # the cache holds no more than itself
        ((-0.1, 0.6, 1.0), 0.5),  # noise made the first one free
        ((0.1, 0.7, 0.1), 0.25),  # what comes after a gap does not count
        ((0.7, 0.7, 0.7), 0.0),
        ((), 0.0),
    ],
)
def test_share_kept(again, share):
    copies = [Copy(of, 2.0, 2.0 + a) for of, a in zip((0.25, 0.5, 1.5), again, strict=False)]
    assert facts.share_kept(copies) == share


def test_strategies_are_all_that_there_are():
    problems = [problem_of(case) for case in cases(gpu=True, quick=False)]
    found = [plan.schedules(p, H100, backward) for p, backward in product(problems, (False, True))]
    assert {name for schedules in found for name in schedules} == set(STRATEGIES)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched so far."""
    names, launch = [], Launcher.__call__

    def spy(self, tensors, *floats):
        names.append(self.kernel.fn.__name__)
        return launch(self, tensors, *floats)

    monkeypatch.setattr(Launcher, "__call__", spy)
    return names


KERNELS = {
    "two-pass": ["bn_stats_fwd_kernel", "bn_apply_fwd_kernel"],
    "resident": ["bn_resident_fwd_kernel"],
    "ticketed": ["bn_ticketed_fwd_kernel"],
}


def test_forced(device, launched):
    x = torch.randn(64, 16, device=device)

    def strategies():
        found = fastbn.explain(None, x).plan
        return found.forward.strategy, found.backward.strategy

    def kernels():
        launched.clear()
        fastbn.batch_norm(x, None, None, training=True)
        return list(launched)

    with fastbn.use_backend("triton"):
        chosen, usual = strategies(), kernels()
        for strategy in STRATEGIES:
            with forced(strategy):
                assert strategies() == (strategy, strategy)
                assert kernels() == KERNELS[strategy]
            assert (strategies(), kernels()) == (chosen, usual)


def test_the_planner_is_restored_after_an_exception():
    schedules, problem = plan.schedules, problem_of(cases(gpu=True, quick=True)[0])
    usual = plan.make_plan(problem, H100)
    other = next(name for name in STRATEGIES if name != usual.forward.strategy)

    def fail():
        with forced(other):
            raise RuntimeError("from within")

    with pytest.raises(RuntimeError, match="from within"):
        fail()
    assert plan.schedules is schedules
    assert plan.make_plan(problem, H100) == usual


def test_what_cannot_serve_is_not_forced():
    """256 images don't fit a program's registers, and fixed statistics have one strategy."""
    problem = problem_of(cases(gpu=True, quick=True)[0])
    fixed = plan.Problem(8, 4, 1, 4, training=False)
    usual = [plan.make_plan(p, H100) for p in (problem, fixed)]
    with forced("resident"):
        assert [plan.make_plan(p, H100) for p in (problem, fixed)] == usual

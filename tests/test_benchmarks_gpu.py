"""Tests how benchmarks/ measures rivals and strategies on a GPU.

No GPU is needed: fakes of `torch.cuda` check that its rules are kept.
"""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

import fastbn
from benchmarks import measure, rivals, timing
from benchmarks.gpu import strategies
from benchmarks.inputs import make_inputs
from benchmarks.measure import Machine
from benchmarks.plans import problem_of
from benchmarks.rivals import Rival
from fastbn.kernels import plan
from fastbn.runtime.device import device_facts
from fastbn.strategy import STRATEGIES

from .test_benchmarks_cases import CPU, TINY
from .test_benchmarks_device import Recorded


class FakeCuda:
    """A fake of those parts of `torch.cuda` that timing uses; it checks how they are used."""

    def __init__(self):
        self.streams = ["default"]
        self.now = 0.0  # ms
        self.captures = self.replays = self.synchronised = 0
        self.refuse = False
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = fake.now

            def elapsed_time(self, end):
                assert fake.synchronised, "read before the device is done"
                return end.time - self.time

        class CUDAGraph:
            def replay(self):
                assert fake.streams == ["default"]
                fake.replays += 1
                fake.now += 3.0

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def synchronize(self):
        self.synchronised += 1

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        yield
        self.streams = ["default"]

    @contextlib.contextmanager
    def graph(self, graph, stream):
        assert self.streams[-1] is stream
        self.captures += 1
        yield
        if self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in (
        "Event",
        "CUDAGraph",
        "synchronize",
        "Stream",
        "current_stream",
        "stream",
        "graph",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    memory = iter([100, 700] * 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(memory))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(memory))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    timing._capture_stream.cache_clear()
    yield fake
    timing._capture_stream.cache_clear()


class FakeGPU(Machine):
    """A machine that has its tensors on the CPU and everything else on a GPU."""

    gpu = True


def measure_on(monkeypatch, notes):
    monkeypatch.setattr(measure, "clock_of", lambda device: timing.CudaClock)
    monkeypatch.setattr(timing, "WINDOW", 0.01)
    sets = [make_inputs(TINY, CPU) for _ in range(3)]
    return list(measure.measure(TINY, "eager", sets, FakeGPU(CPU, 1e9), notes.append))


def advancing(fake, monkeypatch, ms):
    """Makes every eager forward take so many milliseconds on the device."""
    eager = rivals.eager

    def slow(case, device):
        right = eager(case, device)

        def call(x, residual):
            fake.now += ms
            return right.call(x, residual)

        return Rival(right.norm, call)

    monkeypatch.setitem(rivals.RIVALS, "eager", slow)


def test_a_gpu_is_timed_by_calls_and_by_graphs(cuda, monkeypatch):
    advancing(cuda, monkeypatch, ms=2.0)
    notes = []
    rows = measure_on(monkeypatch, notes)
    assert notes == []
    assert [(row.direction, row.method) for row in rows] == list(
        itertools.product(rivals.DIRECTIONS, ("calls", "graph"))
    )
    # A round of three calls takes 6 ms, and its graph 3 ms.
    assert [row.median_us for row in rows] == pytest.approx([2000, 1000] * 2)
    assert rows[1].gb_per_s == pytest.approx(2 * TINY.tensor_bytes / 1e-3 / 1e9)
    assert rows[1].fraction_of_copy == pytest.approx(rows[1].gb_per_s)
    assert rows[1].fraction_of_one_pass == pytest.approx(rows[1].gb_per_s)
    assert rows[1].fraction_of_two_pass == pytest.approx(rows[1].gb_per_s * 3 / 2)
    assert rows[3].fraction_of_two_pass == pytest.approx(rows[3].gb_per_s * 8 / 5)
    assert [row.peak_memory for row in rows] == [None, None, 600, 600]
    assert cuda.captures == 2
    assert cuda.streams == ["default"]


def test_what_cannot_be_captured_is_noted_and_still_timed(cuda, monkeypatch):
    advancing(cuda, monkeypatch, ms=2.0)
    cuda.refuse = True
    notes = []
    rows = measure_on(monkeypatch, notes)
    assert [row.method for row in rows] == ["calls", "calls"]
    assert len(notes) == 2
    assert "eager, forward: no CUDA graph: RuntimeError: operation not permitted" in notes[0]
    assert cuda.replays == 0


@pytest.fixture
def strategies_of_tiny(cuda, monkeypatch):
    """Returns a function that times each strategy as on a GPU, with interpreted kernels."""
    if not fastbn.explain(None, make_inputs(TINY, CPU).x).plan:
        pytest.skip("no kernels for the CPU here")
    monkeypatch.setattr(measure, "clock_of", lambda device: timing.CudaClock)
    monkeypatch.setattr(timing, "WINDOW", 0.01)
    monkeypatch.setattr(strategies, "Machine", FakeGPU)
    monkeypatch.setattr(strategies, "strategy_cases", lambda rehearse: [TINY])
    context = Recorded({"bandwidth": 1e9})

    def run():
        strategies.run(context)
        return context

    return run


def test_each_strategy_is_timed(strategies_of_tiny):
    context = strategies_of_tiny()
    assert context.of("failure") == context.of("note") == []
    found = context.of("strategy")
    served = [(one["forward"], one["backward"], one["direction"]) for one in found]
    assert served == [
        (strategy, None if direction == "forward" else strategy, direction)
        for strategy, direction in itertools.product(STRATEGIES, rivals.DIRECTIONS)
    ]
    chosen = plan.make_plan(problem_of(TINY), device_facts(CPU))
    for one in found:
        assert (one["rival"], one["method"], one["correct"]) == ("fastbn", "graph", True)
        assert one["median_us"] == pytest.approx(3000 / 2)  # a graph of two input sets
        assert one["predicted_us"] > 0
        assert one["chosen"] == (chosen.forward.strategy, chosen.backward.strategy)
    forward, both = found[:2]
    assert forward["predicted_us"] < both["predicted_us"]
    assert forward["fraction_of_two_pass"] == pytest.approx(3 * TINY.tensor_bytes / 1e9 / 1.5e-3)


def test_a_wrong_strategy_is_reported_and_the_rest_goes_on(strategies_of_tiny, monkeypatch):
    def fused(case, device):
        right = rivals.fused(case, device)

        def call(x, residual):
            plan = fastbn.explain(right.norm, x).plan
            return right.call(x, residual) * (1.01 if plan.forward.strategy == "resident" else 1)

        return Rival(right.norm, call)

    monkeypatch.setitem(rivals.RIVALS, "fastbn", fused)
    context = strategies_of_tiny()
    assert [failure["part"] for failure in context.of("failure")] == [f"{TINY}, resident"]
    assert [one["correct"] for one in context.of("strategy")] == [
        strategy != "resident" for strategy in STRATEGIES for _ in rivals.DIRECTIONS
    ]


def test_a_strategy_that_serves_nothing_is_not_timed(strategies_of_tiny, monkeypatch, replan):
    """One strategy serves the backward alone, and another one neither direction."""
    schedules = plan.schedules

    def some(problem, device, backward):
        found = schedules(problem, device, backward)
        del found["resident"]
        if not backward:
            del found["ticketed"]
        return found

    monkeypatch.setattr(plan, "schedules", some)
    replan()
    served = [(one["forward"], one["backward"]) for one in strategies_of_tiny().of("strategy")]
    assert served == [("two-pass", None), ("two-pass", "two-pass"), ("two-pass", "ticketed")]

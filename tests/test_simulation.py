"""Compares the planner's predictions with a simulation of one multiprocessor."""

from dataclasses import replace

import pytest

from benchmarks.plans import problem_of
from benchmarks.shapes import cases
from benchmarks.simulation import Multiprocessor, Server, simulate
from fastbn.kernels.device import H100
from fastbn.kernels.plan import make_schedule, schedules
from fastbn.kernels.tiling import Problem

IMAGES = Problem(256, 64, 56 * 56, 2)
ADDED = Problem(256, 64, 56 * 56, 2, residual=True, saves="mask")
BOTH = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@BOTH
def test_the_planner_agrees_with_the_simulation(backward):
    """They agree within 20 % on the planner's choice for each of the benchmarks' cases."""
    strategies = set()
    for case in cases(gpu=True, quick=False):
        problem = problem_of(case)
        schedule = make_schedule(problem, H100, backward)
        simulated = simulate(problem, H100, schedule, backward)
        assert simulated == pytest.approx(schedule.seconds, rel=0.2), case
        strategies.add(schedule.strategy)
    assert strategies == {"two-pass", "resident", "ticketed"}


@BOTH
@pytest.mark.parametrize("strategy", ["two-pass", "resident", "ticketed"])
@pytest.mark.parametrize("problem", [IMAGES, ADDED], ids=["", "add"])
def test_nothing_is_faster_than_memory(problem, strategy, backward):
    if strategy == "resident":
        problem = replace(problem, n=16, c=4096, s=256)
    schedule = schedules(problem, H100, backward)[strategy]
    for latency in (1e-9, 0.7e-6):
        device = replace(H100, latency=latency, cache_latency=latency / 2)
        # The second of two passes finds a part of the tensors in the cache.
        kept = H100.l2_share * H100.l2_bytes if strategy == "two-pass" else 0.0
        floor = (schedule.units * problem.tensor_bytes - kept) / H100.bandwidth
        assert simulate(problem, device, schedule, backward) > 0.98 * floor


@BOTH
@pytest.mark.parametrize("strategy", ["two-pass", "ticketed"])
@pytest.mark.parametrize(
    "facts",
    [
        {"bandwidth": H100.bandwidth / 4},
        {"issues": H100.issues / 4},
        {"latency": 4 * H100.latency, "cache_latency": 4 * H100.cache_latency},
    ],
    ids=["memory", "instructions", "latency"],
)
def test_a_slower_device_takes_longer(facts, strategy, backward):
    """The planner's prediction for the slower device agrees with the simulation too."""
    schedule = schedules(IMAGES, H100, backward)[strategy]
    device = replace(H100, **facts)
    slower = simulate(IMAGES, device, schedule, backward)
    assert slower > 1.3 * simulate(IMAGES, H100, schedule, backward)
    predicted = schedules(IMAGES, device, backward)[strategy]
    assert simulate(IMAGES, device, predicted, backward) == pytest.approx(
        predicted.seconds, rel=0.25
    )


def test_requests_are_served_one_after_the_other():
    server = Server(rate=2.0)
    assert server.serve(now=1.0, amount=4.0) == 3.0
    assert server.serve(now=2.0, amount=2.0) == 4.0
    assert server.serve(now=9.0, amount=2.0) == 10.0


def test_as_many_programs_run_as_there_are_slots():
    def program(length):
        for _ in range(3):
            yield multiprocessor.now + length

    multiprocessor = Multiprocessor(H100)
    assert multiprocessor.play(map(program, [1.0, 1.0, 1.0, 1.0]), slots=2) == 6.0
    multiprocessor = Multiprocessor(H100)
    assert multiprocessor.play(map(program, [4.0, 1.0, 1.0, 1.0]), slots=2) == 12.0

"""The planner: what always holds, and what it decides for an H100."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbn.kernels.device import H100, INTERPRETER
from fastbn.kernels.plan import (
    MAX_SPLITS,
    PROGRAMS_PER_SM,
    RESIDENT_ELEMENTS,
    TILE_BYTES,
    Problem,
    Tile,
    make_plan,
)

sizes = st.one_of(st.integers(1, 5000), st.sampled_from([7 * 7, 14 * 14, 56 * 56, 2**20, 2**33]))
problems = st.builds(
    Problem,
    n=sizes,
    c=sizes,
    s=sizes,
    itemsize=st.sampled_from([2, 4, 8]),
    training=st.booleans(),
    residual=st.booleans(),
    saves=st.sampled_from([None, "mask", "residual"]),
)


def tiles(plan):
    return [
        plan.forward_reduce.tile, plan.forward_apply, plan.backward_reduce.tile, plan.backward_apply
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(problem=problems)
def test_what_always_holds(problem):
    plan = make_plan(problem, H100)
    contiguous = problem.c if problem.s == 1 else problem.s
    assert contiguous % plan.align == 0
    assert plan.access_bytes in (2, 4, 8, 16)
    for tile in tiles(plan):
        for size in (tile.n, tile.c, tile.s):
            assert size & (size - 1) == 0
        assert (tile.s == 1) == (problem.s == 1)
        # Whole bytes of the packed mask along the contiguous axis.
        assert (tile.c if problem.s == 1 else tile.s) % 8 == 0
        if plan.strategy == "resident":
            assert tile.elements <= RESIDENT_ELEMENTS
        else:
            assert tile.elements * problem.itemsize <= TILE_BYTES
        # A tile never reaches 2^31 elements from its start, unless one row does.
        reach = ((tile.n - 1) * problem.c + tile.c - 1) * problem.s + tile.s
        assert reach < 2**31 or (tile.n, tile.c) == (1, 1)
    for reduce in (plan.forward_reduce, plan.backward_reduce):
        n, _, s = reduce.tile.grid(problem)
        assert 1 <= reduce.splits <= min(n * s, MAX_SPLITS)
        assert reduce.merge & (reduce.merge - 1) == 0
        # Even shares: with fewer programs the longest share would be longer.
        share = math.ceil(n * s / reduce.splits)
        assert share * (reduce.splits - 1) < n * s


@given(problem=problems)
def test_plans_are_frozen_and_cached(problem):
    plan = make_plan(problem, H100)
    assert make_plan(dataclasses.replace(problem), H100) is plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.align = 1


@pytest.mark.parametrize("c", [1, 3, 64])
@pytest.mark.parametrize("last", [False, True])
def test_few_channels_fill_the_device(c, last):
    """Where native batch norm launches one block a channel."""
    n, s = 256, 56 * 56
    problem = Problem(n * s, c, 1, 2) if last and c > 1 else Problem(n, c, s, 2)
    if c == 1:
        problem = Problem(1, 1, n * s, 2)
    plan = make_plan(problem, H100)
    for reduce in (plan.forward_reduce, plan.backward_reduce):
        programs = reduce.splits * reduce.tile.grid(problem)[1]
        assert programs >= 0.7 * PROGRAMS_PER_SM * H100.sm_count


# (problem, strategy, forward units, backward units) as in the design's table of traffic.
LARGE, SMALL = (64, 64, 3136, 2), (64, 64, 49, 2)
UNITS = [
    (Problem(*LARGE), "two-pass", 3, 5),
    (Problem(*LARGE, residual=True), "two-pass", 4, 5),
    (Problem(*LARGE, residual=True, saves="mask"), "two-pass", 4 + 1 / 16, 6 + 2 / 16),
    (Problem(*LARGE, residual=True, saves="residual"), "two-pass", 4, 8),
    (Problem(*SMALL), "resident", 2, 3),
    (Problem(*SMALL, residual=True, saves="mask"), "resident", 3 + 1 / 16, 4 + 1 / 16),
    (Problem(*SMALL, residual=True, saves="residual"), "resident", 3, 5),
    (Problem(*LARGE, training=False), "frozen", 2, 3),
    (
        Problem(*LARGE, training=False, residual=True, saves="mask"),
        "frozen",
        3 + 1 / 16,
        4 + 1 / 16,
    ),
]


@pytest.mark.parametrize(("problem", "strategy", "forward", "backward"), UNITS)
def test_strategy_and_units_of_traffic(problem, strategy, forward, backward):
    plan = make_plan(problem, H100)
    assert plan.strategy == strategy
    assert (plan.forward_units, plan.backward_units) == (forward, backward)
    assert plan.forward_launches == plan.backward_launches == 1 + (strategy == "two-pass")


def test_float64_is_never_resident():
    assert make_plan(Problem(8, 8, 1, 8), H100).strategy == "two-pass"


@pytest.mark.parametrize(
    ("problem", "tile"),
    [
        (Problem(64, 512, 49, 2), Tile(64, 1, 64, warps=4)),
        (Problem(128, 512, 49, 2), Tile(128, 1, 64, warps=8)),
        (Problem(512, 4096, 1, 2), Tile(512, 16, 1, warps=8)),
        (Problem(1024, 4096, 1, 4), Tile(1024, 8, 1, warps=8)),
        (Problem(32, 100, 1, 2), Tile(32, 16, 1, warps=4)),
        (Problem(2, 7, 4, 4), Tile(2, 1, 8, warps=4)),
    ],
)
def test_resident_tiles(problem, tile):
    """All values of a few channels, 32 to a thread."""
    plan = make_plan(problem, H100)
    assert plan.strategy == "resident"
    assert plan.forward_apply == plan.backward_apply == tile
    assert tile.grid(problem)[::2] == (1, 1)


# ResNet-50, batch 256, bf16: (problem, forward tile, splits, backward tile, splits, access).
DECISIONS = {
    "56x56 first": (Problem(256, 64, 3136, 2), (1, 1, 4096), 9, (1, 1, 2048), 9, 16),
    "56x56 last": (Problem(802816, 64, 1, 2), (64, 64, 1), 523, (32, 64, 1), 523, 16),
    "14x14 first": (Problem(256, 256, 196, 2), (16, 1, 256), 3, (8, 1, 256), 3, 8),
    "14x14 last": (Problem(50176, 256, 1, 2), (64, 64, 1), 131, (32, 64, 1), 131, 16),
    "7x7 first": (Problem(256, 2048, 49, 2), (2, 8, 64), 3, (2, 8, 64), 3, 2),
    "7x7 last": (Problem(12544, 2048, 1, 2), (64, 64, 1), 17, (32, 64, 1), 17, 16),
    "matrix": (Problem(1024, 4096, 1, 2), (32, 64, 1), 8, (32, 64, 1), 8, 16),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions_for_an_h100(name):
    problem, forward, forward_splits, backward, backward_splits, access = DECISIONS[name]
    plan = make_plan(problem, H100)
    assert plan.forward_reduce.tile == Tile(*forward)
    assert plan.backward_reduce.tile == Tile(*backward)
    assert (plan.forward_reduce.splits, plan.backward_reduce.splits) == (
        forward_splits,
        backward_splits,
    )
    assert plan.access_bytes == access


def test_the_interpreter_gets_few_programs():
    plan = make_plan(Problem(64, 3, 3136, 4), INTERPRETER)
    assert plan.forward_reduce.splits <= PROGRAMS_PER_SM

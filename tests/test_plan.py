"""The planner: what always holds, and what it decides for an H100."""

import dataclasses
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import plans
from benchmarks.plans import problem_of
from benchmarks.shapes import cases
from fastbn.kernels.device import A100, DEVICES, H100, INTERPRETER, L4
from fastbn.kernels.plan import (
    MAX_SPLITS,
    make_plan,
    make_schedule,
    resident,
    schedules,
    ticketed,
    two_pass,
)
from fastbn.kernels.tiling import (
    PROGRAMS_PER_SM,
    RESIDENT_ELEMENTS,
    TILE_BYTES,
    Problem,
    Tile,
    reduce_tile,
    resident_fits,
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


every_schedule = st.builds(
    lambda problem, device, backward: (problem, device, schedules(problem, device, backward)),
    problems,
    st.sampled_from(DEVICES),
    st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(found=every_schedule)
def test_what_always_holds(found):
    problem, device, found = found
    for schedule in found.values():
        assert schedule.seconds > 0
        for tile in (schedule.reduce.tile, schedule.apply):
            check_tile(problem, tile, schedule.strategy)
        reduce = schedule.reduce
        n, blocks, s = reduce.tile.grid(problem)
        assert 1 <= reduce.splits <= min(n * s, MAX_SPLITS)
        assert reduce.splits == 1 or reduce.splits * problem.c < 2**31
        assert reduce.merge & (reduce.merge - 1) == 0
        # Even shares: with fewer programs the longest share would be longer.
        share = math.ceil(n * s / reduce.splits)
        assert share * (reduce.splits - 1) < n * s
        if schedule.strategy == "ticketed":
            slices = math.ceil(blocks / schedule.slice_blocks)
            assert schedule.slice_blocks * (slices - 1) < blocks
            assert schedule.tickets(problem) == (2 * slices * schedule.slice_blocks * reduce.splits)
            slice_channels = schedule.slice_blocks * reduce.tile.c
            bytes = slice_channels * problem.n * problem.s * problem.itemsize
            assert 2 * bytes * schedule.cached_units <= device.l2_share * device.l2_bytes
            if problem.s == 1 and problem.c * problem.itemsize >= 64:
                assert slice_channels * problem.itemsize >= 64


def check_tile(problem, tile, strategy):
    contiguous = problem.c if problem.s == 1 or tile.flat else problem.s
    assert contiguous % tile.align == 0
    assert tile.access_bytes(problem.itemsize) in (2, 4, 8, 16)
    for size in (tile.n, tile.c, tile.s):
        assert size & (size - 1) == 0
    assert (tile.s == 1) == (problem.s == 1)
    # Whole bytes of the packed mask along the contiguous axis.
    assert (tile.c if problem.s == 1 else tile.s) % 8 == 0
    if tile.flat:
        # Whole planes, and blocks of channels that start aligned.
        assert tile.s >= problem.s > 1
        assert tile.c % tile.align == 0
    if strategy == "resident" and tile.n >= problem.n and tile.s >= problem.s:
        assert tile.elements <= RESIDENT_ELEMENTS
    else:
        assert tile.elements * problem.itemsize <= TILE_BYTES
    # A tile never reaches 2^31 elements from its start, unless one row does.
    reach = ((tile.n - 1) * problem.c + tile.c - 1) * problem.s + tile.s
    assert reach < 2**31 or (tile.n, tile.c) == (1, 1)


@given(problem=problems)
def test_schedules_are_immutable_and_cached(problem):
    schedule = make_schedule(problem, H100, backward=False)
    assert make_schedule(dataclasses.replace(problem), H100, backward=False) is schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.launches = 1


@pytest.mark.parametrize("c", [1, 3, 64])
@pytest.mark.parametrize("last", [False, True])
def test_few_channels_fill_the_device(c, last):
    """Where native batch norm launches one block a channel."""
    n, s = 256, 56 * 56
    problem = Problem(n * s, c, 1, 2) if last and c > 1 else Problem(n, c, s, 2)
    if c == 1:
        problem = Problem(1, 1, n * s, 2)
    for backward in (False, True):
        reduce = two_pass(problem, H100, backward).reduce
        programs = reduce.splits * reduce.tile.grid(problem)[1]
        assert programs >= 0.7 * PROGRAMS_PER_SM * H100.sm_count


# Forward and backward units of each strategy, as in the design's table of traffic.
PLAIN, RESIDUAL = {}, {"residual": True}
MASK, KEPT = {"residual": True, "saves": "mask"}, {"residual": True, "saves": "residual"}
UNITS = [
    (two_pass, PLAIN, 3, 5),
    (two_pass, RESIDUAL, 4, 5),
    (two_pass, MASK, 4 + 1 / 16, 6 + 2 / 16),
    (two_pass, KEPT, 4, 8),
    (resident, PLAIN, 2, 3),
    (resident, MASK, 3 + 1 / 16, 4 + 1 / 16),
    (resident, KEPT, 3, 5),
    (ticketed, PLAIN, 2, 3),
    (ticketed, MASK, 3 + 1 / 16, 4 + 1 / 16),
    (ticketed, KEPT, 3, 5),
]


@pytest.mark.parametrize(("strategy", "epilogue", "forward", "backward"), UNITS)
def test_units_of_traffic(strategy, epilogue, forward, backward):
    problem = Problem(64, 64, 49, 2, **epilogue)
    for units, back in ((forward, False), (backward, True)):
        schedule = strategy(problem, H100, back)
        assert schedule.units == units
        assert schedule.launches == (2 if strategy is two_pass else 1)
        # What two passes read twice from memory, tickets read once from the cache.
        again = two_pass(problem, H100, back).units - units
        assert schedule.cached_units == (again if strategy is ticketed else 0)


def test_fixed_statistics_leave_no_choice():
    plan = make_plan(Problem(64, 64, 49, 2, training=False), H100)
    assert (plan.forward.strategy, plan.backward.strategy) == ("fixed-stats", "fixed-stats")
    assert (plan.forward.units, plan.backward.units) == (2, 3)


def test_float64_is_never_resident():
    assert not resident_fits(Problem(8, 8, 1, 8))
    assert resident_fits(Problem(8, 8, 1, 4))


@pytest.mark.parametrize(
    ("problem", "tile"),
    [
        (Problem(64, 512, 49, 2), Tile(64, 1, 64, warps=4)),
        (Problem(128, 512, 49, 2), Tile(128, 1, 64, warps=8)),
        (Problem(512, 4096, 1, 2), Tile(512, 16, 1, align=16, warps=8)),
        (Problem(1024, 4096, 1, 4), Tile(1024, 8, 1, align=16, warps=8)),
        (Problem(32, 100, 1, 2), Tile(32, 16, 1, align=4, warps=4)),
        (Problem(2, 7, 4, 4), Tile(2, 1, 8, align=4, warps=4)),
    ],
)
def test_resident_tiles(problem, tile):
    """All values of a few channels, 32 to a thread, which may use all registers that there are."""
    assert resident_fits(problem)
    assert resident(problem, H100, False).apply == replace(tile, registers=255)
    assert tile.grid(problem)[::2] == (1, 1)


@pytest.mark.parametrize(
    ("problem", "flat", "access"),
    [
        (Problem(256, 2048, 49, 2), True, 16),
        (Problem(256, 2048, 49, 4), True, 16),
        (Problem(256, 2044, 49, 2), False, 2),  # rows of 2044 planes don't start aligned
        (Problem(256, 2044, 49, 4), True, 16),
        (Problem(256, 64, 14 * 14, 2), False, 8),  # wide enough
        (Problem(256, 64, 35 * 35, 2), False, 2),  # eight planes are more than a tile
        (Problem(256, 64, 9, 2), True, 16),
        (Problem(256, 64, 1, 2), False, 16),
    ],
)
def test_odd_planes_are_flattened(problem, flat, access):
    tile = reduce_tile(problem, H100, reads=1)
    assert tile.flat == flat
    assert tile.access_bytes(problem.itemsize) == access


# What the planner chooses on an H100, forward/backward: two-pass 2, ticketed t, resident r.
# In bf16, BN+ReLU, channels-first and channels-last (or rows).
CHOICES = {
    "256x256x56x56": "t/t 2/2",
    "512x64x32x32": "t/t 2/2",
    "256x24x56x56": "t/t 2/2",
    "16x64x256x256": "t/t 2/2",
    "2x32x128x128x128": "t/2 2/2",
    "8192x1024": "2/t",
    "256x64x112x112": "t/t 2/2",
    "256x64x56x56": "t/t 2/2",
    "256x512x28x28": "t/t t/2",
    "256x1024x14x14": "t/t t/t",
    "256x2048x7x7": "t/t t/t",
    "256x128x16x16": "t/t 2/t",
    "128x512x4x4": "r/r t/t",
    "256x96x112x112": "t/t 2/2",
    "256x144x56x56": "t/t 2/2",
    "256x672x14x14": "t/t t/t",
    "256x960x7x7": "t/t t/t",
    "16x256x64x64": "t/t 2/t",
    "16x1024x16x16": "r/r t/2",
    "2x64x64x64x64": "t/t 2/2",
    "2x320x8x8x8": "r/r t/t",
    "1024x4096": "t/2",
    "65536x256": "2/t",
}
INITIAL = {"two-pass": "2", "ticketed": "t", "resident": "r"}


def test_choices_for_an_h100():
    found = {}
    for case in cases(gpu=True, quick=False):
        if case.dtype == "bfloat16" and case.epilogue.name == "BN+ReLU":
            plan = make_plan(problem_of(case), H100)
            letters = INITIAL[plan.forward.strategy] + "/" + INITIAL[plan.backward.strategy]
            found.setdefault(case.shape, []).append(letters)
    assert {shape: " ".join(letters) for shape, letters in found.items()} == CHOICES


# (problem, forward tile, splits, slice blocks, backward tile, splits, slice blocks), ticketed.
TICKETED = {
    "56x56 first": (Problem(256, 64, 3136, 2), (1, 1, 4096), 256, 5, (1, 1, 2048), 512, 3),
    "14x14 first": (Problem(256, 256, 196, 2), (16, 1, 256), 16, 64, (8, 1, 256), 32, 32),
    "14x14 last": (Problem(50176, 1024, 1, 2), (64, 64, 1), 392, 2, (32, 64, 1), 784, 1),
    "7x7 first": (Problem(256, 2048, 49, 2), (8, 8, 64), 32, 32, (4, 8, 64), 64, 16),
    "7x7 last": (Problem(12544, 2048, 1, 2), (64, 64, 1), 98, 8, (32, 64, 1), 196, 4),
}


@pytest.mark.parametrize("name", TICKETED)
def test_slices_for_an_h100(name):
    problem, *expected = TICKETED[name]
    found = []
    for backward in (False, True):
        schedule = ticketed(problem, H100, backward)
        tile = schedule.reduce.tile
        found += [(tile.n, tile.c, tile.s), schedule.reduce.splits, schedule.slice_blocks]
    assert found == expected


def test_a_slice_has_work_for_all_programs():
    """Fewer tickets to a phase, and those that apply would wait for those that reduce."""
    for case in cases(gpu=True, quick=False):
        problem = problem_of(case)
        for backward in (False, True):
            found = schedules(problem, H100, backward).get("ticketed")
            if found and found.tickets(problem) >= 8 * PROGRAMS_PER_SM * H100.sm_count:
                phase = found.slice_blocks * found.reduce.splits
                assert phase >= 0.9 * PROGRAMS_PER_SM * H100.sm_count, case


def test_what_does_not_fit_the_cache_takes_two_passes():
    """Channels last and many rows: a slice 64 bytes wide has 51 MB."""
    problem = Problem(802816, 256, 1, 2)
    assert set(schedules(problem, H100, False)) == {"two-pass"}
    # Half the rows, half the bytes: twice, they fit the cache that can be counted on.
    assert "ticketed" not in schedules(replace(problem, n=401408), H100, False)
    assert "ticketed" in schedules(replace(problem, n=200704), H100, False)
    # Backward reads two tensors.
    assert "ticketed" not in schedules(replace(problem, n=200704), H100, True)
    assert "ticketed" not in schedules(replace(problem, n=200704), A100, False)


def test_facts_of_the_device_decide():
    problem = Problem(256, 512, 28 * 28, 2)
    assert make_plan(problem, H100).forward.strategy == "ticketed"
    assert make_plan(problem, replace(H100, l2_share=1e-4)).forward.strategy == "two-pass"
    # Where the cache is slower than memory, nobody goes there for a second reading.
    slow = replace(H100, l2_speed=0.3)
    assert make_plan(problem, slow).forward.strategy == "two-pass"
    narrow = Problem(50176, 32, 1, 2)
    rows = replace(H100, row_rates=((64, 0.1),))
    assert ticketed(narrow, rows, False).seconds > ticketed(narrow, H100, False).seconds
    # A slow device takes longer, however it is done.
    for found in (two_pass, ticketed):
        assert found(problem, L4, False).seconds > found(problem, H100, False).seconds


def test_the_fastest_is_chosen():
    for case in cases(gpu=True, quick=False):
        problem = problem_of(case)
        found = schedules(problem, H100, False)
        chosen = make_plan(problem, H100).forward
        assert chosen in found.values()
        assert chosen.seconds == min(schedule.seconds for schedule in found.values())


def test_the_interpreter_gets_few_programs():
    schedule = two_pass(Problem(64, 3, 3136, 4), INTERPRETER, False)
    assert schedule.reduce.splits <= PROGRAMS_PER_SM


def test_the_table_is_printed_for_a_device_named_in_part(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plans", "--device", "a100"])
    assert plans.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Predicted, not measured, for {A100.name}")
    case = next(case for case in cases(gpu=True, quick=False) if case.size[1:] == (2048, 7, 7))
    plan = make_plan(problem_of(case), A100)
    entry = printed[printed.index(f"{case.shape} {case.layout} {case.dtype} {case.epilogue}\n") :]
    for line, direction in zip(entry.splitlines()[1:3], ("forward", "backward"), strict=True):
        schedule = getattr(plan, direction)
        found, strategy, *_, units, _, seconds, _ = line.split()
        assert (found, strategy, float(units)) == (direction, schedule.strategy, schedule.units)
        assert float(seconds) == pytest.approx(schedule.seconds * 1e6, abs=0.1)


@pytest.mark.parametrize("name", ["NVIDIA", "V100"])
def test_a_device_must_be_one_of_those_known(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plans", "--device", name])
    with pytest.raises(SystemExit):
        plans.main()
    assert "NVIDIA L4, NVIDIA GeForce RTX 4090" in capsys.readouterr().err

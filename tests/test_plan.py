"""Tests what holds for every plan, and what the planner decides for an H100."""

import dataclasses
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import plans
from benchmarks.plans import problem_of
from benchmarks.shapes import cases
from fastbn.kernels.device import A100, DEVICES, H100, INTERPRETER, L4
from fastbn.kernels.passes import MAX_MERGES
from fastbn.kernels.plan import make_plan, make_schedule, schedules
from fastbn.kernels.schedules import resident, ticketed, two_pass
from fastbn.kernels.tiling import (
    PROGRAMS_PER_SM,
    RESIDENT_ELEMENTS,
    Problem,
    Tile,
    choose_tile,
    group_width,
    mask_by_rows,
    plane_extent,
    resident_tile,
    warps_of,
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
def test_schedules_cover_all_columns_and_fit_the_device(found):
    problem, device, found = found
    for schedule in found.values():
        assert schedule.seconds > 0
        check_pass(problem, device, schedule.apply, schedule.strategy == "resident")
        reduce = schedule.reduce
        check_pass(problem, device, reduce)
        tile, rows = reduce.tile, reduce.rows(problem)
        assert rows * problem.c < 2**31 or reduce.length == tiles_along(problem, tile)
        if tile.layout == "channels":
            assert rows <= MAX_MERGES * tile.merge_rows
        if schedule.strategy == "ticketed":
            groups = reduce.groups(problem)
            slices = math.ceil(groups / schedule.slice_groups)
            assert schedule.slice_groups * (slices - 1) < groups
            phase = schedule.slice_groups * reduce.tiles() * reduce.splits
            assert schedule.tickets(problem) == 2 * slices * phase
            columns = schedule.slice_groups * min(reduce.width, problem.c * problem.s)
            bytes = columns * problem.n * problem.itemsize
            assert 2 * bytes * schedule.cached_units <= device.l2_share * device.l2_bytes
            if problem.s == 1 and problem.c * problem.itemsize >= 64:
                assert columns * problem.itemsize >= 64


def tiles_along(problem, tile):
    if tile.layout == "planes":
        # The tiles of a plane begin up to `lead` columns before it, where an access may begin.
        lead = max(c * problem.s % tile.align for c in range(tile.align))
        return math.ceil((problem.s + lead) / tile.q)
    return math.ceil(problem.n / tile.n)


def check_pass(problem, device, work, resident=False):
    """Checks that runs have each element once, and begin where accesses may begin."""
    tile, columns = work.tile, problem.c * problem.s
    for size in (tile.n, tile.q, tile.merge_rows, tile.merge_channels):
        assert size & (size - 1) == 0
    assert (tile.layout == "channels") == (problem.s == 1)
    assert columns % tile.align == 0
    assert tile.access_bytes(problem.itemsize) in (2, 4, 8, 16)
    # A row of a tile has whole bytes of the packed mask.
    assert tile.q % 8 == 0
    if tile.layout in ("planes", "flat"):
        assert work.width == problem.s
    else:
        assert work.width % tile.align == 0
    if tile.layout == "columns":
        assert work.width % problem.s == work.width % 8 == columns % 8 == 0
        assert work.width <= 2**20
    if resident:
        pieces = math.ceil(plane_extent(problem) / tile.q) if tile.layout == "flat" else 1
        assert problem.n * pieces <= tile.n
        assert tile.elements in RESIDENT_ELEMENTS
        assert (work.length, work.splits, work.tiles()) == (1, 1, 1)
        assert math.ceil(tile.n / pieces) * columns < 2**31
        return
    assert tile.elements * problem.itemsize <= device.tile_bytes
    along = tiles_along(problem, tile)
    across = math.ceil(problem.n / tile.n) if tile.layout == "planes" else 1
    runs = math.ceil(along / work.length)
    assert work.splits == runs * across
    # Runs are as even as they can be: if they had a tile less, there would be more of them.
    assert work.length == math.ceil(along / runs)
    assert work.groups(problem) == math.ceil(columns / work.width)
    # A tile never reaches 2^31 elements from its start, unless one row does.
    assert (tile.n - 1) * columns + tile.q < 2**31 or tile.n == 1


@given(problem=problems)
def test_schedules_are_immutable_and_cached(problem):
    schedule = make_schedule(problem, H100, backward=False)
    assert make_schedule(dataclasses.replace(problem), H100, backward=False) is schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.launches = 1


@pytest.mark.parametrize("c", [1, 3, 64])
@pytest.mark.parametrize("last", [False, True])
def test_few_channels_fill_the_device(c, last):
    """Checks few channels, for which PyTorch's own batch norm starts only one block each."""
    n, s = 256, 56 * 56
    problem = Problem(n * s, c, 1, 2) if last and c > 1 else Problem(n, c, s, 2)
    if c == 1:
        problem = Problem(1, 1, n * s, 2)
    for backward in (False, True):
        programs = two_pass(problem, H100, backward).reduce.programs(problem)
        assert programs >= 0.7 * PROGRAMS_PER_SM * H100.sm_count


# A unit is a tensor read or written once. Each strategy is listed with its epilogue and the units
# of its forward and backward.
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
def test_each_strategy_has_its_units_of_traffic(strategy, epilogue, forward, backward):
    problem = Problem(32, 64, 49, 2, **epilogue)
    for units, back in ((forward, False), (backward, True)):
        schedule = strategy(problem, H100, back)
        assert schedule.units == units
        assert schedule.launches == (2 if strategy is two_pass else 1)
        # A ticketed launch reads from the cache what two passes read from memory a second time.
        again = two_pass(problem, H100, back).units - units
        assert schedule.cached_units == (again if strategy is ticketed else 0)


def test_fixed_statistics_leave_no_choice():
    plan = make_plan(Problem(64, 64, 49, 2, training=False), H100)
    assert (plan.forward.strategy, plan.backward.strategy) == ("fixed-stats", "fixed-stats")
    assert (plan.forward.units, plan.backward.units) == (2, 3)


@pytest.mark.parametrize(
    ("problem", "tile", "warps"),
    [
        # Pieces have eight columns, and planes begin up to seven columns behind a piece's start.
        (Problem(64, 512, 49, 2), Tile(1024, 8, "flat", 8, 1, 1), 16),
        (Problem(32, 512, 49, 2), Tile(256, 8, "flat", 8, 1, 1), 4),
        (Problem(146, 512, 49, 2), Tile(1024, 8, "flat", 8, 1, 1), 16),
        (Problem(147, 512, 49, 2), None, 0),
        (Problem(2, 7, 4, 4), Tile(256, 8, "flat", 4, 1, 1), 4),
        (Problem(2, 7, 5, 4), Tile(256, 8, "flat", 1, 1, 1), 4),
        (Problem(512, 4096, 1, 2), Tile(512, 16, "channels", 8, 1, 1), 16),
        (Problem(513, 4096, 1, 2), None, 0),
        (Problem(1024, 4096, 1, 4), Tile(1024, 8, "channels", 4, 1, 1), 16),
        (Problem(32, 100, 1, 2), Tile(128, 16, "channels", 4, 1, 1), 4),
        (Problem(8, 8, 1, 8), None, 0),
        # Channels would share bytes of a mask whose bits run along rows, so that there is no tile.
        (Problem(64, 512, 49, 2, saves="mask"), None, 0),
        (Problem(64, 512, 16, 2, saves="mask"), Tile(256, 8, "flat", 8, 1, 1), 4),
        (Problem(32, 512, 49, 2, saves="mask"), Tile(256, 8, "flat", 8, 1, 1), 4),
    ],
)
def test_resident_tiles_hold_all_values_of_channels(problem, tile, warps):
    """A tile has all values of a channel, or of the channels of a sector: 16 for each thread."""
    assert resident_tile(problem) == tile
    if tile:
        assert resident(problem, H100, False).apply.tile == tile
        assert warps_of(tile, "resident") == warps


@pytest.mark.parametrize(
    ("problem", "n", "q", "layout", "access", "width"),
    [
        # These have planes side by side, in groups of whole channels that use most of each tile.
        (Problem(256, 2048, 49, 2), 8, 256, "columns", 16, 4312),
        (Problem(256, 2048, 49, 4), 8, 128, "columns", 16, 3920),
        (Problem(256, 64, 14 * 14, 2), 8, 256, "columns", 16, 4312),
        (Problem(64, 64, 21 * 21, 2), 8, 256, "columns", 16, 17640),
        (Problem(256, 64, 28 * 28, 2), 8, 256, "columns", 16, 7840),
        (Problem(256, 64, 32 * 32, 2), 8, 256, "columns", 16, 1024),
        (Problem(256, 64, 9, 2), 8, 256, "columns", 16, 504),
        # Here rows don't begin at whole bytes of a mask, so that each plane has its own tiles.
        (Problem(256, 2044, 49, 2), 2, 256, "planes", 2, 49),
        (Problem(256, 2044, 49, 4), 8, 128, "planes", 16, 49),
        # These have planes of more than four tiles, few images, or channels last.
        (Problem(256, 64, 33 * 33, 2), 8, 256, "planes", 16, 33 * 33),
        (Problem(256, 64, 56 * 56, 2), 8, 256, "planes", 16, 56 * 56),
        (Problem(63, 64, 49, 2), 8, 256, "planes", 16, 49),
        (Problem(8, 64, 2**20, 2), 8, 256, "planes", 16, 2**20),
        (Problem(2, 64, 2**20, 2), 1, 2048, "planes", 16, 2**20),
        (Problem(2, 64, 2**20 - 1, 2), 1, 2048, "planes", 16, 2**20 - 1),
        (Problem(2, 63, 2**20 - 1, 2), 1, 512, "planes", 2, 2**20 - 1),
        (Problem(256, 64, 1, 2), 32, 64, "channels", 16, 64),
        (Problem(256, 20, 1, 2), 64, 32, "channels", 8, 32),
        # Runs with fixed statistics have little fixed work, so that they may be short.
        (Problem(1, 64, 49, 2, training=False), 2, 1024, "columns", 16, 1960),
        (Problem(1, 64, 49, 2, training=False, saves="mask"), 1, 2048, "planes", 16, 49),
    ],
)
def test_reductions_have_the_expected_tiles(problem, n, q, layout, access, width):
    tile = choose_tile(problem, H100, 128)
    assert (tile.layout, tile.access_bytes(problem.itemsize)) == (layout, access)
    assert (tile.n, tile.q, group_width(problem, tile)) == (n, q, width)


def test_fixed_statistics_leave_a_mask_where_it_is():
    """The order of a mask's bits may not depend on which statistics the backward is planned for."""
    for n in (1, 8, 63, 64, 256):
        problem = Problem(n, 64, 49, 2, residual=True, saves="mask")
        assert mask_by_rows(problem) == (n >= 64)
        assert mask_by_rows(replace(problem, training=False)) == (n >= 64)


# Networks whose sizes change at every step. Each has a function that draws sizes, the number of
# steps to try, and the number of kernels that they may compile at most.
EVER_NEW_SIZES = {
    "point clouds": (lambda draw: (draw(10_000, 200_000), 64, 1), 3000, 12),
    "detection": (lambda draw: (2, 256, draw(7, 200) * draw(7, 200)), 3000, 12),
    "audio": (lambda draw: (16, 80, draw(1, 3000)), 3000, 12),
    "pixels": (lambda draw: (32 * draw(1, 64) * draw(1, 64), 256, 1), 300, 12),
    "few images": (lambda draw: (draw(1, 7), 64, draw(7, 400) * draw(7, 400)), 300, 12),
    "some images": (lambda draw: (draw(8, 63), 256, draw(2, 64) * draw(2, 64)), 300, 12),
    "rows": (lambda draw: (draw(1, 10_000), 512, 1), 300, 12),
    "many images": (lambda draw: (256, 64, draw(2, 64) * draw(2, 64)), 300, 16),
    "odd channels": (lambda draw: (16, 3, draw(2, 30_000)), 300, 20),
    "many images, 12 channels": (lambda draw: (256, 12, draw(2, 4096)), 300, 22),
    "any batch": (lambda draw: (draw(1, 256), 64, draw(2, 4096)), 300, 18),
    "any batch, 12 channels": (lambda draw: (draw(1, 256), 12, draw(2, 4096)), 300, 30),
}


@pytest.mark.parametrize("network", EVER_NEW_SIZES)
@pytest.mark.parametrize("epilogue", [PLAIN, MASK], ids=["plain", "mask"])
def test_ever_new_sizes_compile_few_kernels(network, epilogue):
    """Counts forward and backward kernels by all that differs for Triton between these calls."""
    sizes, steps, most = EVER_NEW_SIZES[network]
    draw = random.Random(0).randint
    found = set()
    for _ in range(steps):
        plan = make_plan(Problem(*sizes(draw), 2, **epilogue), H100)
        for schedule in (plan.forward, plan.backward):
            found |= set(compiled(schedule, schedule is plan.backward))
    assert most / 3 <= len(found) <= most


def compiled(schedule, backward):
    """Yields what tells the kernels of a schedule from others of the same direction."""
    if schedule.strategy != "resident":
        yield backward, schedule.strategy == "ticketed", "reduce", schedule.reduce.tile
    if schedule.strategy != "ticketed":
        yield backward, schedule.strategy == "resident", schedule.warps, schedule.apply.tile


# The strategies that the planner chooses on an H100 for BN+ReLU in bfloat16, as forward/backward,
# for channels-first and then for channels-last (or for rows): 2 stands for two-pass, t for ticketed
# and r for resident.
CHOICES = {
    "256x256x56x56": "t/2 2/2",
    "512x64x32x32": "t/t 2/2",
    "256x24x56x56": "t/t 2/2",
    "16x64x256x256": "t/t 2/2",
    "2x32x128x128x128": "t/2 2/2",
    "8192x1024": "t/t",
    "256x64x112x112": "t/t 2/2",
    "256x64x56x56": "t/2 2/2",
    "256x512x28x28": "t/t t/2",
    "256x1024x14x14": "t/t t/t",
    "256x2048x7x7": "t/t t/t",
    "256x128x16x16": "t/t 2/t",
    "128x512x4x4": "r/r t/t",
    "256x96x112x112": "t/t 2/2",
    "256x144x56x56": "t/t 2/2",
    "256x672x14x14": "t/t t/t",
    "256x960x7x7": "2/t t/t",
    "16x256x64x64": "t/t 2/t",
    "16x1024x16x16": "2/2 t/t",
    "2x64x64x64x64": "t/t 2/2",
    "2x320x8x8x8": "r/r t/t",
    "1024x4096": "t/t",
    "65536x256": "2/t",
}
INITIAL = {"two-pass": "2", "ticketed": "t", "resident": "r"}


def test_an_h100_gets_the_expected_strategies():
    found = {}
    for case in cases(gpu=True, quick=False):
        if case.dtype == "bfloat16" and case.epilogue.name == "BN+ReLU":
            plan = make_plan(problem_of(case), H100)
            letters = INITIAL[plan.forward.strategy] + "/" + INITIAL[plan.backward.strategy]
            found.setdefault(case.shape, []).append(letters)
    assert {shape: " ".join(letters) for shape, letters in found.items()} == CHOICES


# A problem, and for its ticketed forward and then its backward: the tile, the tiles of a run, the
# splits, and the groups of a slice.
TICKETED = {
    "56x56 first": (Problem(256, 64, 3136, 2), (8, 256), 7, 64, 6, (8, 256), 5, 96, 4),
    "14x14 first": (Problem(256, 256, 196, 2), (8, 256), 8, 4, 4, (8, 256), 5, 7, 3),
    "14x14 last": (Problem(50176, 1024, 1, 2), (32, 64), 11, 143, 2, (32, 64), 5, 314, 1),
    "7x7 first": (Problem(256, 2048, 49, 2), (8, 256), 11, 3, 5, (8, 256), 5, 7, 3),
    "7x7 last": (Problem(12544, 2048, 1, 2), (32, 64), 11, 36, 8, (32, 64), 5, 79, 4),
}


@pytest.mark.parametrize("name", TICKETED)
def test_an_h100_gets_the_expected_slices(name):
    problem, *expected = TICKETED[name]
    found = []
    for backward in (False, True):
        schedule = ticketed(problem, H100, backward)
        reduce = schedule.reduce
        size = (reduce.tile.n, reduce.tile.q)
        found += [size, reduce.length, reduce.splits, schedule.slice_groups]
    assert found == expected


def test_a_slice_has_work_for_all_programs():
    """A slice is reduced while another one is applied, so each needs work for half the programs."""
    for case in cases(gpu=True, quick=False):
        problem = problem_of(case)
        for backward in (False, True):
            found = schedules(problem, H100, backward).get("ticketed")
            if found and found.tickets(problem) >= 8 * PROGRAMS_PER_SM * H100.sm_count:
                reduce = found.reduce
                phase = found.slice_groups * reduce.tiles() * reduce.splits
                assert phase >= 0.4 * PROGRAMS_PER_SM * H100.sm_count, case


def test_what_does_not_fit_the_cache_takes_two_passes():
    """Takes channels last with so many rows that a slice of 64 bytes in width has 51 MB."""
    problem = Problem(802816, 256, 1, 2)
    assert set(schedules(problem, H100, False)) == {"two-pass"}
    # Two slices must fit the share of the cache that can be counted on: a quarter of the rows does.
    assert "ticketed" not in schedules(replace(problem, n=401408), H100, False)
    assert "ticketed" in schedules(replace(problem, n=200704), H100, False)
    # A backward reads two tensors, and an A100 has a smaller cache.
    assert "ticketed" not in schedules(replace(problem, n=200704), H100, True)
    assert "ticketed" not in schedules(replace(problem, n=200704), A100, False)


def test_facts_of_the_device_decide():
    problem = Problem(256, 1024, 14 * 14, 2)
    assert make_plan(problem, H100).forward.strategy == "ticketed"
    assert make_plan(problem, replace(H100, l2_share=1e-4)).forward.strategy == "two-pass"
    # If the cache is slower than memory, reading from it a second time gains nothing.
    slow = replace(H100, l2_speed=0.3)
    assert make_plan(problem, slow).forward.strategy == "two-pass"
    narrow = Problem(50176, 32, 1, 2)
    rows = replace(H100, row_rates=((64, 0.1),))
    assert ticketed(narrow, rows, False).seconds > ticketed(narrow, H100, False).seconds
    # A slower device takes longer by every strategy.
    for found in (two_pass, ticketed):
        assert found(problem, L4, False).seconds > found(problem, H100, False).seconds


def test_one_pass_is_chosen_if_it_gains_enough():
    for case in cases(gpu=True, quick=False):
        problem = problem_of(case)
        found = schedules(problem, H100, False)
        chosen = make_plan(problem, H100).forward
        assert chosen in found.values()
        fastest = min(schedule.seconds for schedule in found.values())
        safe = found["two-pass"].seconds
        assert chosen.seconds == (fastest if fastest < 0.95 * safe else safe)


def test_the_interpreter_gets_few_programs():
    problem = Problem(64, 3, 3136, 4)
    reduce = two_pass(problem, INTERPRETER, False).reduce
    assert reduce.length == tiles_along(problem, reduce.tile)


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
        what, limits = line.split(":")
        found, strategy, *_, units, _, seconds, _ = what.split()
        assert (found, strategy, float(units)) == (direction, schedule.strategy, schedule.units)
        assert float(seconds) == pytest.approx(schedule.seconds * 1e6, abs=0.1)
        for limit in limits.split(","):
            name, seconds = limit.split()
            expected = getattr(schedule.prediction, name) * 1e6
            assert float(seconds) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", ["NVIDIA", "V100"])
def test_a_device_must_be_one_of_those_known(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plans", "--device", name])
    with pytest.raises(SystemExit):
        plans.main()
    assert "NVIDIA L4, NVIDIA GeForce RTX 4090" in capsys.readouterr().err

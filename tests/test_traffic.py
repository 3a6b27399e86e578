"""The bytes loaded and stored, as `traffic.py` counts them, are those of the plan."""

import pytest
import torch

from fastbn.kernels import ticketed
from fastbn.kernels.passes import PARTIALS_SHARE
from fastbn.kernels.schedules import SLICES_IN_CACHE

if torch.cuda.is_available():
    pytest.skip("only the interpreter counts", allow_module_level=True)

from .traffic import LARGE, LAYOUTS, READ_AGAIN, Case, measure

# The units from memory and from the cache, of batch norm alone, for forward and backward.
UNITS = {
    "two-pass": ((3, 0), (5, 0)),
    "resident": ((2, 0), (3, 0)),
    "ticketed": ((2, 1), (3, 2)),
    "fixed-stats": ((2, 0), (3, 0)),
}
# The most that plans may leave out, as a fraction of what they count: of first touches, and of all
# accesses. It is much because the tensors here are small: each program reads the vectors of its
# channels or columns, which are as long as a few rows of its tiles.
OTHER = {
    "planes": (0.03, 0.1), "channels": (0.06, 0.4), "columns": (0.06, 0.4), "masked": (0.06, 0.4),
}  # fmt: skip


CASES = [
    (layout, strategy, *epilogue)
    for strategy in UNITS
    for layout in LAYOUTS
    for epilogue in (("fp32", "none", False), ("bf16", "relu", True), ("bf16", "silu", True))
    if layout == "columns" or "silu" not in epilogue
    if (strategy, layout) != ("resident", "columns")
]


@pytest.mark.parametrize(("layout", "strategy", "dtype", "activation", "residual"), CASES)
def test_counted_units_are_the_plans(layout, strategy, dtype, activation, residual):
    case = Case(*LAYOUTS[layout], strategy, dtype, activation, residual)
    for traffic, plain in zip(measure(case), UNITS[strategy]):
        schedule, problem = traffic.schedule, traffic.problem
        assert schedule.strategy == strategy
        if strategy != "resident":
            assert schedule.tile.layout == ("planes" if layout == "masked" else layout)
        units, cached = schedule.units, schedule.cached_units
        if activation == "none":
            assert (units, cached) == plain
        if activation == "relu" and strategy != "two-pass":
            tensors = {"forward": 3, "backward": 4}[traffic.direction]
            assert units == tensors + 1 / (8 * problem.itemsize)
        assert traffic.units == units + cached
        # Every element of every large tensor is accessed.
        for name in traffic.sizes.keys() & LARGE:
            assert traffic.fresh[name] == traffic.sizes[name]
        if strategy != "two-pass":
            assert traffic.units_of_memory == units
        if strategy == "ticketed":
            apart = traffic.distance(READ_AGAIN[traffic.direction])
            assert 0 < apart <= SLICES_IN_CACHE * traffic.slice_bytes
        memory, all_of_it = OTHER[layout]
        assert traffic.other_of_memory <= memory
        assert traffic.other <= all_of_it


def test_partial_results_are_few():
    """With more values to a channel, plans leave out little even with channels last."""
    for traffic in measure(Case((8, 64, 12, 12), True, "ticketed", "bf16")):
        assert traffic.other_of_memory < PARTIALS_SHARE
        assert traffic.other < 0.15


def test_order_of_slices_matters(monkeypatch):
    """In the order of two passes, the second reading comes too late to find data in the cache."""

    def reduce_all_first(ticket, slices, slice_groups, tiles, splits):
        groups = slices * slice_groups
        phase = groups * tiles * splits
        column = ticket % phase // groups
        return ticket >= phase, ticket % groups, column % tiles, column // tiles

    monkeypatch.setattr(ticketed, "work_of", reduce_all_first)
    for traffic in measure(Case(*LAYOUTS["planes"], "ticketed")):
        apart = traffic.distance(READ_AGAIN[traffic.direction])
        assert apart > SLICES_IN_CACHE * traffic.slice_bytes

"""Tests the speed-ups of benchmarks/, their means, the tables and the plot on made-up figures."""

from dataclasses import replace

import pytest

import fastbn
from benchmarks import report
from benchmarks.measure import Row
from benchmarks.plans import device_plan
from benchmarks.plot import draw
from benchmarks.summary import speed_ups, summarise
from benchmarks.table import markdown
from fastbn.kernels.device import H100

from .test_benchmarks_cases import CPU, TINY

ROW = Row(
    "N", "8x4", "rows", "bfloat16", "BN+ReLU", "forward", "graph", "fastbn", 10.0, 0.02, 5.0, 0.5,
    0.5, 0.75, None, True,
)  # fmt: skip


def made_up_rows():
    """Returns rows with speed-ups of 2 and 8 over eager, and of 0.5 over compile.

    The times of rows that must not be compared are absurdly long, so that a mistake shows.
    """
    second = replace(ROW, shape="16x4")
    return [
        ROW,
        replace(ROW, rival="eager", median_us=20.0),
        replace(ROW, rival="compile", median_us=5.0),
        second,
        replace(second, rival="eager", median_us=80.0),
        replace(second, rival="compile", median_us=1e6, correct=False),
        replace(ROW, rival="eager", method="calls", median_us=1e6),
        replace(ROW, rival="eager", epilogue="BN", median_us=1e6),
    ]


def test_summary_has_geometric_means_and_slower_cases():
    found = summarise(made_up_rows())
    means = {one["against"]: (one["speed_up"], one["cases"]) for one in found["geometric_means"]}
    assert means == {"eager": (pytest.approx(4.0), 2), "compile": (pytest.approx(0.5), 1)}
    assert [(one["against"], one["shape"], one["factor"]) for one in found["slower"]] == [
        ("compile", "8x4", 0.5)
    ]


def test_the_slowest_comes_first():
    rows = [ROW, replace(ROW, rival="eager", median_us=9.0)]
    rows += [replace(row, layout="other", median_us=row.median_us ** (row.rival == "fastbn"))
             for row in rows]  # fmt: skip
    assert [one["factor"] for one in summarise(rows)["slower"]] == [0.1, 0.9]


def test_a_plan_of_this_gpu_is_named_beside_the_figures():
    """A plan for another GPU is not named."""
    planned = device_plan(TINY, H100) | {"network": "N", "dtype": "bfloat16"}
    strategy = planned["forward"]["strategy"]
    found = report.Report(CPU, budget=1.0)
    found.rows, found.plans = made_up_rows(), [planned]
    found.environment["gpu"] = H100.name
    row = "| N | 8x4 | rows | bfloat16 | BN+ReLU | forward |"
    expected = f"{row} graph | fastbn ({strategy}) | 10.0 | 2% | 5.0 | 50% | 50% | 75% |"
    assert expected in markdown(found.as_dict(), found.rows)
    found.environment["gpu"] = "another"
    assert f"fastbn ({strategy})" not in markdown(found.as_dict(), found.rows)


def test_a_gpu_run_has_a_table_and_a_plot(tmp_path):
    rows = [replace(row, direction="forward+backward", peak_memory=10**9) for row in made_up_rows()]
    found = report.Report(CPU, budget=1.0)
    found.environment["gpu"] = "NVIDIA H100"
    found.rows, found.bandwidth = rows, 2.5e12
    table = markdown(found.as_dict(), rows)
    assert table.startswith(f"# fastbn {fastbn.__version__} on NVIDIA H100\n")
    assert "CPU run" not in table
    assert "2,500 GB/s" in table
    assert table.index("## Slower") < table.index("## Geometric") < table.index("## Figures")
    assert (
        "| N | 8x4 | rows | bfloat16 | BN+ReLU | forward+backward | graph | compile | 0.50x |"
        in (table)
    )
    draw("made up", rows, tmp_path / "plot.png")
    assert len((tmp_path / "plot.png").read_bytes()) > 10_000
    assert len(speed_ups(rows)) == 3

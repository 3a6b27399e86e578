"""benchmarks/: what is measured, the clocks, the check, the sums, and whole runs on the CPU.

A GPU's part is played by stand-ins for `torch.cuda`, which keep its rules.
"""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fastbn
from benchmarks import environment, inputs, measure, report, rivals, timing
from benchmarks.check import worst_error
from benchmarks.inputs import make_inputs
from benchmarks.measure import Machine, Row
from benchmarks.plans import device_plan
from benchmarks.plot import draw
from benchmarks.rivals import Rival
from benchmarks.shapes import BN, BN_ADD_RELU, BN_RELU, Case, cases
from benchmarks.summary import speed_ups, summarise
from benchmarks.table import markdown
from fastbn.kernels.device import H100

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = Case("MLP", (8, 4), "rows", "float32", BN_RELU)
SMALL = [
    Case("CNN", (6, 8, 5, 5), "channels-first", "float32", BN),
    Case("CNN", (6, 8, 5, 5), "channels-last", "float32", BN_ADD_RELU),
    Case("CNN", (2, 12, 4, 4, 4), "channels-last", "bfloat16", BN_ADD_RELU),
    Case("CNN", (2, 12, 4, 4, 4), "channels-first", "float16", BN_RELU),
    Case("MLP", (64, 16), "rows", "float32", BN_RELU),
]


def run_module(*command, **env):
    """A subprocess on the CPU, free of this suite's interpreter."""
    # Nor does a worker of this suite count as one of the subprocess's.
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    plain = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = {**inherited, **plain, **env}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def here(monkeypatch):
    """The report on tiny cases in this process, quickly, on the CPU and without the compiler."""
    monkeypatch.setattr(report, "cases", lambda gpu, quick: [TINY, replace(TINY, epilogue=BN)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(timing, "WINDOW", 0.0)
    monkeypatch.setattr(report, "no_compiler", lambda device: "there is none")


def run_here(out, *options):
    """Exit status and JSON."""
    return report.main([f"--out={out}", *options]), json.loads((out / "report.json").read_text())


def test_report_on_a_cpu(tmp_path):
    """Whole, as users call it; without a C++ compiler it does without torch.compile."""
    done = run_module(
        "-W", "error", "-m", "benchmarks.report", "--quick", "--budget", "100", "--out", tmp_path,
        CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    table = (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "CPU run; no statement about any GPU" in found["title"]
    assert table.startswith(f"# {found['title']}\n")
    assert found["failures"] == []
    assert [line for line in found["skipped"] if "torch.compile" in line] == found["skipped"]
    assert "torch.compile" in table

    env = found["environment"]
    assert env["gpu"] is None
    assert env["torch"] == torch.__version__
    assert env["fastbn"] == fastbn.__version__
    copy = found["copy_bandwidth"]["gb_per_s"]
    measured = {str(case): case for case in cases(gpu=False, quick=True)}
    seen = set()
    for row in found["rows"]:
        name = " ".join(row[k] for k in ("network", "shape", "layout", "dtype", "epilogue"))
        seen.add((name, row["direction"], row["rival"]))
        moved = measured[name].floor_bytes(row["direction"])
        assert row["gb_per_s"] * 1e3 * row["median_us"] == pytest.approx(moved)
        assert row["fraction_of_copy"] == pytest.approx(row["gb_per_s"] / copy)
        assert row["spread"] >= 0
        assert row["correct"]
        assert row["method"] == "calls"
        assert row["peak_memory"] is None
    assert seen == set(itertools.product(measured, rivals.DIRECTIONS, ("eager", "fastbn")))
    assert len(found["plans"]) == len(cases(gpu=True, quick=True))
    for plan in found["plans"]:
        assert "H100" in plan["device"]
        assert plan["shape"] in table
        assert 0 < plan["forward"]["seconds"] < plan["backward"]["seconds"]


def test_pytest_benchmarks(tmp_path):
    """As users call it, under the project's own options."""
    done = run_module(
        "-m", "pytest", "benchmarks", "--benchmark-only", "-k", "MLP and float16",
        f"--benchmark-json={tmp_path / 'found.json'}", "-p", "no:cacheprovider",
        CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert {one["params"]["name"] for one in found} == {"eager", "fastbn"}
    for one in found:
        assert one["group"].startswith("CPU run")
        assert one["extra_info"]["gb_per_s"] > 0
        assert one["extra_info"]["fraction_of_copy"] > 0


def test_a_failing_rival_is_reported_and_the_rest_goes_on(here, monkeypatch, tmp_path, capsys):
    def broken(case, device):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(rivals.RIVALS, "eager", broken)
    status, found = run_here(tmp_path)
    assert status == 1
    assert found["failures"] == [
        {"part": f"{case}, eager", "error": "RuntimeError: no such kernel"}
        for case in report.cases(False, False)
    ]
    assert {row["rival"] for row in found["rows"]} == {"fastbn"}
    assert len(found["rows"]) == 4
    assert "no such kernel" in (tmp_path / "report.md").read_text()
    assert "Traceback" in capsys.readouterr().out


def test_a_wrong_rival_has_no_speed(here, monkeypatch, tmp_path):
    def wrong(case, device):
        right = rivals.eager(case, device)
        return Rival(right.norm, lambda x, residual: 1.01 * right.call(x, residual))

    monkeypatch.setitem(rivals.RIVALS, "eager", wrong)
    status, found = run_here(tmp_path)
    assert status == 1
    assert len(found["failures"]) == 2
    assert {(row["rival"], row["correct"]) for row in found["rows"]} == {
        ("eager", False),
        ("fastbn", True),
    }
    assert found["summary"] == {"slower": [], "geometric_means": []}
    assert "wrong" in (tmp_path / "report.md").read_text()


def test_a_failing_plot_does_not_take_the_figures_with_it(here, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plot")
    status, found = run_here(tmp_path)
    assert status == 1
    assert [failure["part"] for failure in found["failures"]] == ["plot"]
    assert len(found["rows"]) == 8
    assert "matplotlib.figure" in (tmp_path / "report.md").read_text()


def test_no_budget_no_figures(here, tmp_path):
    status, found = run_here(tmp_path, "--budget=0")
    assert status == 0
    assert found["rows"] == []
    assert found["copy_bandwidth"] is None
    assert str(TINY) in found["skipped"]
    assert str(TINY) in (tmp_path / "report.md").read_text()


def test_parts_run_while_the_longest_so_far_would_fit():
    now = [0.0]
    found = report.Report(CPU, budget=30.0 + report.WRITING, clock=lambda: now[0])

    def taking(seconds):
        def work():
            now[0] += seconds

        return work

    found.part("short", taking(1))
    found.part("long", taking(12))
    found.part("fits", taking(12))
    found.part("might not fit", taking(0))
    assert found.skipped == ["might not fit"]
    assert now[0] <= 30


def test_nothing_runs_on_a_lost_device(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found = report.Report(CPU, budget=60.0)
    found.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    found.part("bad", lambda: 1 / 0)
    found.part("next", lambda: pytest.fail("ran"))
    assert found.failures[0]["part"] == "bad"
    assert "illegal memory access" in found.failures[1]["error"]
    assert found.skipped == ["next"]


ROW = Row(
    "N", "8x4", "rows", "bfloat16", "BN+ReLU", "forward", "graph", "fastbn", 10.0, 0.02, 5.0, 0.5,
    None, True,
)  # fmt: skip


def made_up_rows():
    """Against eager 2x and 8x, against compile 0.5x; what must not be compared is absurd."""
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


def test_summary():
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


def test_table_and_plot_of_a_gpu_run(tmp_path):
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


def test_cases_cover_what_was_asked_for():
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


def test_bytes_of_the_floor():
    unit = 8 * 4 * 4
    assert TINY.tensor_bytes == unit
    with_residual = replace(TINY, epilogue=BN_ADD_RELU)
    assert [TINY.floor_bytes(d) / unit for d in rivals.DIRECTIONS] == [2, 5]
    assert [with_residual.floor_bytes(d) / unit for d in rivals.DIRECTIONS] == [3, 7]


def test_inputs_fill_three_caches(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1000)
    )
    monkeypatch.setattr(inputs, "make_inputs", lambda case, device: object())
    sets = inputs.input_sets(TINY, torch.device("cuda"))
    assert len(sets) * TINY.tensor_bytes >= 3 * 1000 > (len(sets) - 1) * TINY.tensor_bytes
    assert len(inputs.input_sets(TINY, CPU)) == 2


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_inputs_lie_as_they_should(case):
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
        for _ in range(2):  # running statistics that are no longer new
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
def test_the_check_finds(case, wrong):
    right = rivals.eager(case, CPU)
    rival = Rival(right.norm, lambda x, r: WRONG[wrong](right.norm, right.call(x, r)))
    assert worst_error(case, rival, make_inputs(case, CPU)) > 1


def test_the_check_finds_a_residual_without_gradient():
    case = SMALL[1]
    norm = rivals.eager(case, CPU).norm
    rival = Rival(norm, lambda x, r: F.relu(norm(x) + r.detach() + 0.9 * (r - r.detach())))
    assert worst_error(case, rival, make_inputs(case, CPU)) > 1


def test_compile_is_compiled_in_both_directions(monkeypatch):
    made = []

    def fake_compile(call, **options):
        assert options == {"fullgraph": True, "dynamic": False}
        return lambda x, residual: made.append(call(x, residual)) or made[-1]

    monkeypatch.setattr(torch, "compile", fake_compile)
    rival = rivals.compiled(TINY, CPU)
    assert isinstance(rival.norm, nn.BatchNorm1d)
    assert len(made) == 1
    assert made[0].grad_fn is not None


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fake_compile(function):
        raise RuntimeError("\nno C++ compiler\nsee elsewhere")

    monkeypatch.setattr(torch, "compile", fake_compile)
    assert rivals.no_compiler(CPU) == "RuntimeError: no C++ compiler"


class FakeClock:
    """Laps of 2, 4, 6, ... seconds, over and over."""

    def __init__(self):
        self.marks = 0

    def mark(self):
        self.marks += 1

    def laps(self):
        return [2.0 * (1 + index % 7) for index in range(self.marks - 1)]


def test_statistics_of_rounds(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (7, 7))
    played = []
    found = timing.time_rounds(lambda: played.append(1), calls=4, clock=FakeClock)
    assert found.median == 8.0 / 4
    assert found.spread == pytest.approx((12 - 4) / 8)
    assert len(played) == 1 + 3 + 7


@pytest.mark.parametrize(("window", "rounds"), [(0, 10), (80, 20), (1e6, 200)])
def test_rounds_fill_the_window(monkeypatch, window, rounds):
    monkeypatch.setattr(timing, "WINDOW", window)  # the median of three laps is 4 s
    played = []
    timing.time_rounds(lambda: played.append(1), 1, FakeClock)
    assert len(played) == 1 + 3 + rounds


def test_results_of_a_round_are_alive_together():
    import weakref

    alive = []

    class Result:
        pass

    def step(_):
        made = Result()
        alive.append(weakref.ref(made))
        assert all(one() is not None for one in alive)
        return made

    timing.one_round(step, [None] * 3)()
    assert all(one() is None for one in alive)


class FakeCuda:
    """Streams, events, graphs and memory: enough of `torch.cuda` to see them used rightly."""

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
    """Every forward of eager's takes so long on the device."""
    eager = rivals.eager

    def slow(case, device):
        right = eager(case, device)

        def call(x, residual):
            fake.now += ms
            return right.call(x, residual)

        return Rival(right.norm, call)

    monkeypatch.setitem(rivals.RIVALS, "eager", slow)


def test_measuring_on_a_gpu(cuda, monkeypatch):
    advancing(cuda, monkeypatch, ms=2.0)
    notes = []
    rows = measure_on(monkeypatch, notes)
    assert notes == []
    assert [(row.direction, row.method) for row in rows] == list(
        itertools.product(rivals.DIRECTIONS, ("calls", "graph"))
    )
    # A round of three calls takes 6 ms, its graph 3.
    assert [row.median_us for row in rows] == pytest.approx([2000, 1000] * 2)
    assert rows[1].gb_per_s == pytest.approx(2 * TINY.tensor_bytes / 1e-3 / 1e9)
    assert rows[1].fraction_of_copy == pytest.approx(rows[1].gb_per_s)
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


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_plan_is_of_the_problem_that_a_call_poses(case):
    made, norm = make_inputs(case, CPU), rivals.fused(case, CPU).norm
    if not fastbn.explain(norm, made.x).plan:
        pytest.skip("no kernels for the CPU here")
    problem = fastbn.explain(norm, made.x, made.residual).plan.problem
    assert device_plan(case, H100)["problem"] == vars(problem)


def test_driver_version(monkeypatch, tmp_path):
    proc = tmp_path / "version"
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu 2025\nGCC 12\n")
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment.driver_version(proc) == "570.86.15"
    assert environment.driver_version(tmp_path / "none") is None


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1000)
    monkeypatch.setattr(timing, "clock_of", lambda device: FakeClock)
    monkeypatch.setattr(timing, "ROUNDS", (7, 7))
    assert timing.copy_bandwidth(CPU) == 2 * 1000 / 8.0
    assert math.isfinite(timing.copy_bandwidth(CPU))

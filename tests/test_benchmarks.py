"""Tests the report of benchmarks/ part by part, and in whole runs on the CPU."""

import faulthandler
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastbn
from benchmarks import environment, report, rivals, timing
from benchmarks.rivals import Rival
from benchmarks.shapes import BN, cases

from .test_benchmarks_cases import CPU, TINY

ROOT = Path(__file__).parent.parent


def run_module(*command, **env):
    """Runs Python in a subprocess on the CPU, without Triton's interpreter."""
    # Without pytest's variables, a pytest in the subprocess doesn't take itself for a worker.
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    plain = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = {**inherited, **plain, **env}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def here(monkeypatch):
    """Makes reports in this process quick: tiny cases on the CPU, without `torch.compile`."""
    monkeypatch.setattr(report, "cases", lambda gpu, quick: [TINY, replace(TINY, epilogue=BN)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(timing, "WINDOW", 0.0)
    monkeypatch.setattr(report, "no_compiler", lambda device: "there is none")


def run_here(out, *options):
    """Runs the report in this process and returns its exit status and its JSON."""
    return report.main([f"--out={out}", *options]), json.loads((out / "report.json").read_text())


def test_a_report_on_a_cpu_has_all_its_parts(tmp_path):
    """Runs the command as users do; without a C++ compiler it leaves out torch.compile."""
    done = run_module(
        "-W", "error", "-m", "benchmarks.report", "--quick", "--budget", "100", "--out", tmp_path,
        CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    table = (tmp_path / "report.md").read_text()
    assert "On a CPU fastbn is PyTorch's own batch norm" in table
    assert "On a CPU fastbn is PyTorch's own batch norm" in done.stdout
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "CPU run; no statement about any GPU" in found["title"]
    assert table.startswith(f"# {found['title']}\n")
    assert found["failures"] == []
    (without_a_compiler,) = found["skipped"]
    assert "torch.compile" in without_a_compiler
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
        assert row["fraction_of_one_pass"] >= row["fraction_of_copy"] * 0.999
        assert row["fraction_of_two_pass"] > row["fraction_of_one_pass"]
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


def test_pytest_benchmark_measures_eager_and_fastbn(tmp_path):
    """Runs the command as users do, under the project's own options of pytest."""
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


def test_a_wrong_rival_is_left_out_of_the_speed_ups(here, monkeypatch, tmp_path):
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


def test_a_failing_plot_leaves_the_figures(here, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plot")
    (tmp_path / "report.png").write_text("of an earlier run")
    watched = []
    cancel = faulthandler.cancel_dump_traceback_later
    monkeypatch.setattr(
        faulthandler, "cancel_dump_traceback_later", lambda: (watched.append(1), cancel())
    )
    status, found = run_here(tmp_path)
    assert watched
    assert found["running"] is None
    assert not (tmp_path / "report.png").exists()
    assert status == 1
    assert [failure["part"] for failure in found["failures"]] == ["plot"]
    assert len(found["rows"]) == 8
    assert "matplotlib.figure" in (tmp_path / "report.md").read_text()


def test_a_hanging_part_ends_the_report_with_results_on_disk(tmp_path):
    hang = f"""
import time
from benchmarks import report

report.HANGING = 1
report.copy_bandwidth = lambda device: 7e9
report.no_compiler = lambda device: time.sleep(60)
report.main(["--quick", "--out={tmp_path}"])
"""
    done = run_module("-c", hang)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in compiler" in done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["running"] == "torch.compile"
    assert found["copy_bandwidth"] == {"gb_per_s": 7.0}
    assert found["plans"]


def test_without_a_budget_nothing_is_measured(here, tmp_path):
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


def test_a_gpu_run_measures_all_rivals(here, monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(report, "copy_bandwidth", lambda device: done.append("bandwidth"))
    monkeypatch.setattr(report, "no_compiler", lambda device: None)
    monkeypatch.setattr(report, "_one_case", lambda found, case, names: done.append(list(names)))
    found = report.Report(CPU, budget=60.0)
    found.device = torch.device("cuda")
    report.run(found, tmp_path, quick=True)
    assert found.failures == []
    assert found.skipped == []
    assert done == ["bandwidth", *[["eager", "compile", "cooperative", "fastbn"]] * 2]


def test_driver_version_is_read_from_proc(monkeypatch, tmp_path):
    proc = tmp_path / "version"
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu 2025\nGCC 12\n")
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment.driver_version(proc) == "570.86.15"
    assert environment.driver_version(tmp_path / "none") is None

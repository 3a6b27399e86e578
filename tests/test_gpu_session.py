"""benchmarks/gpu/: whatever a step does, the next one runs, and what was found is kept."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import session
from benchmarks.gpu.digest import SECTIONS, digest, ended_well
from benchmarks.gpu.session import Session
from benchmarks.gpu.steps import BUDGET, STEPS, Step

ROOT = Path(__file__).parent.parent


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Makes a step of each piece of code, which is its module's `run`."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(session, "GRACE", 1.0)

    def make(*codes, seconds=10.0):
        found = []
        for index, code in enumerate(codes):
            body = "".join(f"    {line}\n" for line in code.splitlines())
            (tmp_path / f"step{index}.py").write_text(
                f"import os, time\n\ndef run(context):\n{body}"
            )
            found.append(Step(f"step{index}", f"step{index}", seconds, "a test"))
        return found

    return make


FINE = 'context.record("fine")'


def run(steps, tmp_path, budget=60.0):
    found = Session(tmp_path, budget, rehearse=True)
    found.run(steps, say=lambda text: None)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["steps"] == found.steps
    return found


def kinds(found, step):
    return [record["kind"] for record in found.steps[step]["records"]]


BAD = {
    "raises": ("1 / 0", "failed: exit status 1", ["failure"]),
    "does not import": ("import no_such_module", "failed: exit status 1", ["failure"]),
    "exits": ("context.record('one'); os._exit(3)", "failed: exit status 3", ["one"]),
    "crashes": ("os.kill(os.getpid(), 11)", "crashed: SIGSEGV", []),
    "writes rubbish": (
        "print('{rubbish'); os.write(context._descriptor, b'\\xff{\\n[1]\\n{}\\n')",
        "done",
        ["rubbish"] * 3,
    ),
    "fails in part": (
        "context.attempt('part', lambda: 1 / 0); context.record('two')",
        "done",
        ["failure", "two"],
    ),
}


def test_bad_steps_are_noted_and_the_next_ones_run(steps, tmp_path):
    found = run(steps(*(code for code, _, _ in BAD.values()), FINE), tmp_path, budget=120.0)
    *bad, fine = found.steps
    for step, (_, status, records) in zip(bad, BAD.values(), strict=True):
        assert (found.steps[step]["status"], kinds(found, step)) == (status, records)
    assert found.steps[fine]["status"] == "done"
    assert kinds(found, fine) == ["fine"]
    for step in bad:
        assert not ended_well({"steps": {step: found.steps[step]}})
    assert ended_well({"steps": {fine: found.steps[fine]}})


def test_a_step_that_hangs_is_killed_with_all_that_it_started(steps, tmp_path):
    hangs = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
context.record("child", pid=child.pid)
time.sleep(600)
"""
    before = time.monotonic()
    found = run(steps(hangs, FINE), tmp_path, budget=16.0)
    assert found.steps["step0"]["status"] == "killed: it did not end in time"
    assert kinds(found, "step1") == ["fine"]
    assert time.monotonic() - before < 16
    (child,) = found.steps["step0"]["records"]
    state = Path(f"/proc/{child['pid']}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_a_step_leaves_the_next_one_has(steps, tmp_path):
    left = "context.record('left', seconds=context.left())"
    found = run(steps(FINE, left, seconds=50.0), tmp_path, budget=100.0)
    (record,) = found.steps["step1"]["records"]
    assert 50 < record["seconds"] < 100


def test_without_time_a_step_does_not_run(steps, tmp_path):
    found = run(steps(FINE, FINE), tmp_path, budget=0.5)
    assert [step["status"] for step in found.steps.values()] == ["no time"] * 2
    assert not ended_well(found.as_dict())


def test_later_steps_know_what_earlier_ones_found(steps, tmp_path):
    found = run(
        steps("context.know(bandwidth=7.5)", "context.record('knows', **context.known)"), tmp_path
    )
    assert found.steps["step1"]["records"] == [{"kind": "knows", "bandwidth": 7.5}]


def test_items_are_worked_on_while_one_more_fits(steps, tmp_path):
    code = """
for item in context.while_time_is_left(range(100), keep=context.left() - 1.0):
    time.sleep(0.4)
    context.record("item", item=item)
"""
    found = run(steps(code), tmp_path)
    *items, skipped = found.steps["step0"]["records"]
    done = len(items)
    assert 1 <= done <= 2
    assert skipped == {"kind": "skipped", "count": 100 - done, "first": str(done)}


def test_a_full_disk_costs_the_file_and_not_the_findings(steps, tmp_path):
    """The last file that could be written stays, and the table says so."""
    many = "for i in range(200): context.record('many', text='x' * 1000)"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        found = Session(tmp_path, 60.0, rehearse=True)
        found.run(steps(many, FINE), say=lambda text: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step["status"] for step in found.steps.values()] == ["done"] * 2
    assert kinds(found, "step0") == ["many"] * 200
    assert kinds(found, "step1") == ["fine"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert 0 < len(written["steps"]["step0"]["records"]) < 200
    assert "NOT SAVED: gpu.json is not up to date" in digest(found.as_dict(), found.unsaved)[2]


def rehearse(out, *options):
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", f"--out={out}", *options],
        cwd=ROOT, env=inherited | {"TRITON_INTERPRET": "0"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_the_frame_rehearsed(tmp_path):
    """As users call it, with the two shortest steps."""
    process = rehearse(tmp_path, "--only", "machine", "host")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    table = output[output.index("fastbn on no GPU. REHEARSAL") :].splitlines()
    assert table[1].startswith("2 of 2 steps done")
    assert any(line.startswith("forward+backward: ") and "ratio" in line for line in table)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["steps"]) == ["machine", "host"]
    assert found["known"]["environment"]["gpu"] is None
    assert found["known"]["bandwidth"] > 0
    host = [one for one in found["steps"]["host"]["records"] if one["kind"] == "host"]
    assert len(host) == 4
    assert all(one["us"] > 1 for one in host)


def test_a_run_that_is_stopped_prints_what_it_found(tmp_path):
    process = rehearse(tmp_path, "--only", "machine", "strategies")
    seen = ""
    with process:
        for line in process.stdout:
            seen += line
            if line.startswith("== strategies"):
                process.send_signal(signal.SIGTERM)
                break
        seen += process.stdout.read()
    assert process.returncode == 1
    assert "stopped from outside" in seen
    assert "## strategies: running" in seen
    assert "copy bandwidth" in seen


@pytest.mark.parametrize("options", [["--rehearse", "--only", "nonsense"], ["--only", "machine"]])
def test_bad_options_are_refused(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_has_gpu", lambda: False)
    with pytest.raises(SystemExit) as refused:
        command.main([*options, f"--out={tmp_path}"])
    assert refused.value.code == 2
    assert ("nonsense" if "nonsense" in options else "--rehearse") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_shares_fill_the_budget():
    assert sum(step.seconds for step in STEPS) == BUDGET
    assert {step.name for step in STEPS} == set(SECTIONS)


def results(**steps):
    return {
        "rehearsal": False, "budget": 540, "seconds": 500.0, "known": {},
        "steps": {
            name: {"status": "done", "seconds": 1.0, "records": records}
            for name, records in steps.items()
        },
    }  # fmt: skip


def strategy(name, direction, us, chosen=("two-pass", "resident"), correct=True, shape="8x4"):
    return {
        "kind": "strategy", "shape": shape, "layout": "channels-last", "epilogue": "BN+ReLU",
        "direction": direction, "forward": name, "backward": name, "strategy": name,
        "median_us": us, "correct": correct, "chosen": chosen, "fraction_of_one_pass": 0.5,
    }  # fmt: skip


def test_the_table_names_wrong_choices_and_their_loss():
    lines = digest(
        results(
            strategies=[
                strategy("two-pass", "forward", 30.0),
                strategy("two-pass", "forward+backward", 100.0),
                strategy("ticketed", "forward", 20.0),
                strategy("ticketed", "forward+backward", 120.0),
                strategy("resident", "forward", 1.0, correct=False),
                strategy("resident", "forward+backward", 2.0, correct=False),
                strategy("two-pass", "forward", 30.0, shape="16x4"),
            ]
        )
    )
    text = "\n".join(lines)
    assert "1 wrong choices in 2 cases" in text
    assert "1.50x 8x4 NHWC BN+ReLU forward: chose two-pass, best ticketed" in text
    assert "8x4 NHWC BN+ReLU: for 2p 30 tick 20; bac 2p 70 tick 100 us; best 50% of floor" in text
    assert "backward: chose" not in text  # what was chosen was wrong, so nothing is lost by it


def row(rival, us, shape="8x4", method="graph", correct=True):
    return {
        "kind": "row", "shape": shape, "layout": "rows", "epilogue": "BN", "rival": rival,
        "method": method, "median_us": us, "correct": correct,
    }  # fmt: skip


def test_the_table_holds_fastbn_to_the_fastest_rival_and_starts_with_the_slowest():
    lines = digest(
        results(
            rivals=[
                row("eager", 80.0), row("compile", 40.0), row("cooperative", 20.0),
                row("fastbn", 10.0),
                row("eager", 30.0, "16x4"), row("compile", 5.0, "16x4"),
                row("fastbn", 10.0, "16x4"),
                row("cooperative", 1.0, "16x4", correct=False), row("eager", 1.0, method="calls"),
            ]
        )
    )  # fmt: skip
    means, cases = lines[3:7], lines[7:]
    assert means[0].startswith("1.00x as fast as the fastest rival (geometric mean, 2 cases")
    assert [mean.split()[0] for mean in means[1:]] == ["4.90x", "1.41x", "2.00x"]
    assert cases[0] == "0.50x 16x4 BN: compile 5 us, ours 10"
    assert cases[1] == "2.00x 8x4 BN: cooperative 20 us, ours 10"


def test_the_table_is_short_and_starts_with_what_failed():
    failures = [{"kind": "failure", "part": f"case {i}", "error": "E" * 200} for i in range(50)]
    every = {step.name: list(failures) for step in STEPS}
    every["strategies"] += [
        strategy(name, direction, 1.0 + index, shape=f"{size}x4")
        for size in range(60)
        for index, name in enumerate(("two-pass", "ticketed"))
        for direction in ("forward", "forward+backward")
    ]
    every["rivals"] += [
        row(rival, 5.0, f"{i}x4") for rival in ("eager", "fastbn") for i in range(60)
    ]
    found = results(**every)
    lines = digest(found, "gpu.json is not up to date: no space")
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 100
    assert lines[3] == "## right: done, 1 s"
    assert lines[4].startswith("FAILED case 0: EEE")
    assert not ended_well(found)


SAME_LAUNCHES = """
import torch, fastbn
from unittest import mock
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from benchmarks.gpu import compile_ahead, right
import fastbn
from benchmarks.host import no_launches
from fastbn.kernels.device import H100
from fastbn.runtime import execution_plan
from tests import oracle

seen = set()

def key(kernel, arguments, options):
    # Kernels are not compiled anew for the value of a float.
    of = {torch.Tensor: lambda t: str(t.dtype), float: lambda number: "float"}
    tensors = tuple(of.get(type(a), lambda other: other)(a) for a in arguments)
    ours = sorted((k, str(v)) for k, v in options.items() if k not in ("grid", "warmup"))
    constants = tuple(ours)
    return kernel.fn.__name__, tensors, constants

class Nothing:
    def __getitem__(self, grid):
        return lambda *arguments: None

def note(kernel, *arguments, **options):
    seen.add(key(kernel, arguments, options))
    return Nothing()

with mock.patch.object(JITFunction, "warmup", note):
    for job in compile_ahead.launches(True):
        compile_ahead.compile_launches(job, 90, H100)
ahead, seen = set(seen), set()

def run(kernel, *arguments, **options):
    return note(kernel, *arguments, **options)

with no_launches(), mock.patch.object(JITFunction, "run", run), mock.patch.object(
    execution_plan, "limits_registers", return_value=True
):
    for case in right.all_cases(True):
        arguments = oracle.make_arguments(case, torch.device("cpu"))
        for strategy in right.serving(arguments):
            with fastbn.use_strategy(strategy):
                oracle.run_fastbn(arguments)
assert len(seen) > 10, len(seen)
print(len(seen), len(seen - ahead))
for one in list(seen - ahead)[:5]:
    print(one)
"""


def test_what_is_checked_was_compiled_ahead():
    """Kernel for kernel: the same dtypes, integers, constants and options."""
    plain = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SAME_LAUNCHES], cwd=ROOT, env=os.environ | plain,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[1] == "0", done.stdout

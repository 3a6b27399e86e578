"""With a GPU the tests run on it; without one the kernels run in Triton's interpreter."""

import contextlib
import os
import traceback
from collections import Counter

# There is a worker for each core, and more threads would only take turns.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when Keras is imported.
os.environ["KERAS_BACKEND"] = "torch"

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    # What fastbn is compared with shall be exact, and the same from run to run.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.backends.cudnn.deterministic = True
else:
    # Read when Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    from .interpreter import mend

    mend()


# It tests the tests, and runs where it is asked for by name, as in CI.
collect_ignore = ["test_breakage.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--compile",
        choices=("few", "all", "others"),
        default="few",
        help="what test_compiled.py compiles: a few cases for sm_90 (the default), all of them,"
        " or a few for the other targets",
    )


def pytest_report_header():
    where = "on this GPU" if HAS_GPU else "in Triton's interpreter"
    return f"fastbn: kernels run {where}; all tests take about ten minutes on two cores"


def pytest_terminal_summary(terminalreporter):
    """Says in three lines what was skipped and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    (first, *others) = [f"{count} because {reason}" for reason, count in reasons.most_common()]
    terminalreporter.write_line(f"skipped {len(skipped)}: {first}")
    if others:
        terminalreporter.write_line(f"    {others[0]}")
    if others[1:]:
        rest = sum(list(reasons.values())) - sum(n for _, n in reasons.most_common(2))
        terminalreporter.write_line(f"    {rest} for other reasons, which pytest -rs lists")


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_errors(pytestconfig):
    """A kernel's invalid access shows late, and for good: it ends this process, in its own test."""
    yield
    if HAS_GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            capture = pytestconfig.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():
                traceback.print_exc()
            os.abort()


@pytest.fixture
def replan():
    """Drops all plans, now and after the test."""
    from fastbn.runtime import plan_cache

    plan_cache.clear()
    yield plan_cache.clear
    plan_cache.clear()


@pytest.fixture
def force_strategy(replan):
    """Makes the kernels take one strategy wherever it can serve."""
    from fastbn import use_strategy

    with contextlib.ExitStack() as stack:
        yield lambda strategy: stack.enter_context(use_strategy(strategy))


@pytest.fixture
def few_programs(monkeypatch, replan):
    """Plans on a GPU as for the interpreter: few programs, each with many tiles."""
    from fastbn.kernels.device import INTERPRETER
    from fastbn.runtime import execution_plan

    monkeypatch.setattr(execution_plan, "device_facts", lambda device: INTERPRETER)
    replan()


@pytest.fixture
def tiny_tiles(monkeypatch, few_programs, replan):
    """Tiles so small that small tensors take many of them, and many splits and slices."""
    from dataclasses import replace

    from fastbn.kernels import passes, schedules, tiling
    from fastbn.kernels.device import INTERPRETER
    from fastbn.runtime import execution_plan

    device = replace(INTERPRETER, tile_bytes=256)
    monkeypatch.setattr(execution_plan, "device_facts", lambda _: device)
    monkeypatch.setattr(tiling, "ROW_BYTES", 64)
    monkeypatch.setattr(tiling, "FEW_ROWS", 3)
    monkeypatch.setattr(tiling, "MANY_ROWS", 12)
    monkeypatch.setattr(tiling, "MERGE_ELEMENTS", 16)
    monkeypatch.setattr(tiling, "MERGE_CHANNELS", 4)
    for module in (passes, schedules, execution_plan):
        monkeypatch.setattr(module, "PROGRAMS_PER_SM", 24)
    monkeypatch.setattr(schedules, "TICKETS_PER_PROGRAM", (1 / 24,))
    replan()

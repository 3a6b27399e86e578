"""`use_strategy` makes the kernels take one strategy, and cached plans don't hide it."""

import subprocess
import sys

import pytest
import torch

import fastbn
from fastbn.kernels.device import H100
from fastbn.kernels.plan import Problem, make_plan
from fastbn.runtime.launcher import Launcher
from fastbn.strategy import STRATEGIES, get_strategy

KERNELS = {
    "two-pass": ["bn_stats_fwd_kernel", "bn_apply_fwd_kernel"],
    "resident": ["bn_resident_fwd_kernel"],
    "ticketed": ["bn_ticketed_fwd_kernel"],
}
BACKWARD = {
    "two-pass": ["bn_reduce_bwd_kernel", "bn_apply_bwd_kernel"],
    "resident": ["bn_resident_bwd_kernel"],
    "ticketed": ["bn_ticketed_bwd_kernel"],
}


@pytest.fixture(autouse=True)
def backend():
    with fastbn.use_backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """Lists the names of the kernels that are launched."""
    names = []
    launch = Launcher.__call__

    def spy(self, tensors, *floats):
        names.append(self.kernel.fn.__name__)
        return launch(self, tensors, *floats)

    monkeypatch.setattr(Launcher, "__call__", spy)
    return names


def test_the_chosen_strategy_runs_whatever_is_cached(device, launched):
    x = torch.randn(64, 16, device=device)

    def kernels():
        launched.clear()
        fastbn.batch_norm(x, None, None, training=True)
        return list(launched)

    usual = kernels()
    for strategy in 2 * STRATEGIES:
        with fastbn.use_strategy(strategy):
            assert kernels() == KERNELS[strategy]
            with fastbn.use_strategy("auto"):
                assert kernels() == usual
        assert kernels() == usual


def test_the_backward_runs_by_the_strategy_in_force_then(device, launched):
    x = torch.randn(64, 16, device=device, requires_grad=True)
    y = fastbn.batch_norm(x, None, None, training=True)
    for strategy in 2 * STRATEGIES:
        launched.clear()
        with fastbn.use_strategy(strategy):
            torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert launched == BACKWARD[strategy]


def test_compiled_calls_run_by_the_strategy_too(device, launched):
    compiled = torch.compile(fastbn.FusedBatchNorm1d(16).to(device), backend="aot_eager")
    x = torch.randn(64, 16, device=device)
    compiled(x)
    for strategy in STRATEGIES:
        launched.clear()
        with fastbn.use_strategy(strategy), torch.no_grad():
            compiled(x)
        assert launched == KERNELS[strategy]


def test_what_cannot_be_served_takes_two_passes():
    """256 images don't fit a program's registers, and fixed statistics have one strategy."""
    problem = Problem(256, 1024, 14 * 14, 2)
    found = make_plan(problem, H100, "resident")
    assert (found.forward.strategy, found.backward.strategy) == ("two-pass", "two-pass")
    assert make_plan(problem, H100).forward.strategy == "ticketed"
    fixed = Problem(256, 64, 56 * 56, 2, training=False)
    assert make_plan(fixed, H100, "ticketed") == make_plan(fixed, H100)


def test_explain_says_what_runs_and_why(device):
    x = torch.randn(64, 16, 16, 16, device=device)
    norm = fastbn.FusedBatchNorm2d(16).to(device)
    with fastbn.use_strategy("resident"):
        text = str(fastbn.explain(norm, x))
        assert text.count("ward:  two-pass (since resident can't serve it), 2 launches") == 1
        assert text.count("ward: two-pass (since resident can't serve it), 2 launches") == 1
        assert "since" not in str(fastbn.explain(norm.eval(), x))
        assert "ward:  resident, 1" in str(fastbn.explain(norm.train(), x[:2, :, :4]))


def test_use_strategy_ends_with_its_block_and_after_an_error():
    def fail():
        with fastbn.use_strategy("ticketed"):
            assert get_strategy() == "ticketed"
            raise RuntimeError("from within")

    before = get_strategy()
    with pytest.raises(RuntimeError, match="from within"):
        fail()
    with (
        pytest.raises(
            ValueError, match=r"strategy must be one of auto, two-pass, .* but got 'one'"
        ),
        fastbn.use_strategy("one"),
    ):
        pass
    assert get_strategy() == before == "auto"


def test_environment_variable_sets_the_strategy(monkeypatch):
    code = "from fastbn.strategy import get_strategy; print(get_strategy())"
    run = [sys.executable, "-c", code]
    monkeypatch.setenv("FASTBN_STRATEGY", "ticketed")
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout.strip() == "ticketed"
    monkeypatch.setenv("FASTBN_STRATEGY", "fast")
    done = subprocess.run(run, capture_output=True, text=True)
    assert "FASTBN_STRATEGY must be one of auto, two-pass, ticketed, resident" in done.stderr

"""Tests how a backend is chosen, what each of them refuses, and what `explain` says."""

import contextlib
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fastbn
from fastbn import FusedBatchNorm2d, FusedBatchNormAct2d, batch_norm, explain, functional
from fastbn.functional import tracked_batch_norm
from fastbn.runtime import support


@pytest.fixture(autouse=True)
def restored():
    before = fastbn.get_backend()
    yield
    fastbn.set_backend(before)


def run(code, **environment):
    """Runs Python code in a process of its own."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTBN_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=inherited | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_use_backend_ends_with_its_block_and_after_an_error():
    assert fastbn.get_backend() == "auto"
    fastbn.set_backend("torch")
    with fastbn.use_backend("triton"):
        assert fastbn.get_backend() == "triton"
        with fastbn.use_backend("auto"):
            assert fastbn.get_backend() == "auto"
    assert fastbn.get_backend() == "torch"
    with pytest.raises(ZeroDivisionError), fastbn.use_backend("auto"):
        _ = 1 / 0
    assert fastbn.get_backend() == "torch"


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, but got"):
        fastbn.set_backend(name)
    with pytest.raises(ValueError, match="backend must be one of"), fastbn.use_backend(name):
        pass
    assert fastbn.get_backend() == "auto"


def test_environment_variable_sets_the_backend():
    code = "import fastbn; print(fastbn.get_backend())"
    assert run(code, FASTBN_BACKEND="torch").stdout == "torch\n"
    assert run(code).stdout == "auto\n"
    wrong = run(code, FASTBN_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "FASTBN_BACKEND must be one of auto, triton, torch, but got 'gpu'" in wrong.stderr


def test_cpu_tensors_go_to_pytorch_unless_interpreted():
    code = (
        "import torch, fastbn;"
        "print(fastbn.explain(None, torch.randn(2, 3)).backend, torch.cuda.is_initialized())"
    )
    assert run(code).stdout == "torch False\n"
    assert run(code, TRITON_INTERPRET="1").stdout == "triton False\n"


def test_cpu_tensors_cost_at_most_5_percent_more():
    """Compares with nn.BatchNorm2d at (32, 64, 56, 56).

    What a call costs on top doesn't depend on the size, so it is measured on a small input.
    """
    code = """
from timeit import repeat
import torch
from fastbn import FusedBatchNorm2d

def seconds(norm, x, number):
    return min(repeat(lambda: norm(x), number=number, repeat=5)) / number

small = torch.randn(2, 64, 1, 1)
on_top = seconds(FusedBatchNorm2d(64), small, 100) - seconds(torch.nn.BatchNorm2d(64), small, 100)
print(on_top / seconds(torch.nn.BatchNorm2d(64), torch.randn(32, 64, 56, 56), 1))
"""
    done = run(code)
    assert float(done.stdout) < 0.05, done.stderr


def test_triton_on_a_cpu_tensor_says_why():
    done = run(
        "import torch, fastbn; fastbn.FusedBatchNorm2d(3)(torch.randn(2, 3, 4, 4))",
        FASTBN_BACKEND="triton",
    )
    assert "RuntimeError: backend 'triton' can't serve this call because" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_without_triton_pytorch_serves():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'triton' else find(name)\n"
        "import torch, fastbn\n"
        "y = fastbn.FusedBatchNormAct2d(3)(torch.randn(2, 3, 4, 4)); print(y.min().item())\n"
        "print(fastbn.explain(None, torch.randn(2, 3)).reason)"
    )
    done = run(code)
    assert done.stdout == "0.0\nTriton is not installed\n", done.stderr


class Tagged(torch.Tensor):
    pass


def served(device, **kwargs):
    arguments = {
        "input": torch.randn(4, 3, 5), "running_mean": torch.zeros(3), "running_var": torch.ones(3),
        "num_batches_tracked": None, "weight": None, "bias": None, "training": True,
        "momentum": 0.1, "eps": 1e-5,
    }  # fmt: skip
    arguments |= kwargs
    for name, value in arguments.items():
        if callable(value):
            arguments[name] = value(device)
        elif isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(device)
    with fastbn.use_backend("triton"):
        return tracked_batch_norm(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"input": torch.randn(4, 3, 5).int()}, "dtype is torch.int32"),
        ({"input": torch.randn(0, 3, 5)}, "empty"),
        ({"input": torch.eye(3).to_sparse()}, "input is of layout torch.sparse_coo"),
        ({"weight": torch.ones(3).half()}, "weight of torch.float16 does not go with an input of"),
        ({"weight": torch.ones(3, 1)}, "weight is not one-dimensional"),
        ({"bias": torch.ones(3).double()}, "bias of torch.float64 does not go with an input"),
        ({"running_var": torch.ones(3).half()}, "running_mean is of torch.float32 and running_var"),
        ({"residual": torch.randn(4, 3, 5).double()}, "residual's dtype is torch.float64"),
        ({"residual": torch.randn(4, 3, 5).to_sparse()}, "residual is of layout torch.sparse_coo"),
        ({"residual": torch.randn(4, 3, 5).as_subclass(Tagged)}, "residual is a tensor subclass"),
        ({"weight": torch.ones(3, device="meta")}, "weight is on meta and not, as the input, on"),
        ({"weight": torch.ones(3).as_subclass(Tagged)}, "weight is a tensor subclass, Tagged"),
        (
            {"weight": lambda device: torch._efficientzerotensor(3, device=device)},
            "weight is lazily negated, or lazily zero",
        ),
        (
            {"bias": lambda device: torch._neg_view(torch.ones(3, device=device))},
            "bias is lazily negated",
        ),
        (
            {"running_var": lambda device: torch.ones(6, device=device)[::2]},
            "running_var is not contiguous",
        ),
        ({"running_var": torch.ones(3, requires_grad=True)}, "running_var requires a gradient"),
        ({"num_batches_tracked": torch.tensor(0, device="meta")}, "num_batches_tracked is on meta"),
        (
            {"num_batches_tracked": torch.tensor(0).as_subclass(Tagged)},
            "tracked is a tensor subclass",
        ),
        ({"num_batches_tracked": torch.tensor(0.0)}, "not a single int64"),
        ({"input": torch.randn(4, 3, 5, device="meta")}, "device type 'meta'"),
        ({"momentum": torch.tensor([0.1])}, "momentum or eps is not a number"),
        ({"eps": "small"}, "momentum or eps is not a number"),
    ],
)
def test_triton_refuses_what_it_cannot_serve(kwargs, why, device):
    with pytest.raises(RuntimeError, match=f"'triton' can't serve this call because .*{why}"):
        served(device, **kwargs)


def test_subclasses_go_to_pytorch(device):
    x = torch.randn(4, 3, 5, device=device).as_subclass(Tagged)
    with pytest.raises(RuntimeError, match="subclass"):
        served(device, input=x)
    y = batch_norm(x, None, None, training=True)
    assert type(y) is Tagged
    plain = batch_norm(x.as_subclass(torch.Tensor), None, None, training=True)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), plain)


def test_falling_back_warns_once_a_reason(monkeypatch):
    monkeypatch.setattr(functional, "_warned", set())
    with pytest.warns(RuntimeWarning, match="falls back to PyTorch's batch norm because it rains"):
        functional.warn_fallback("it rains")
    functional.warn_fallback("it rains")
    with pytest.warns(RuntimeWarning, match="because it snows"):
        functional.warn_fallback("it snows")


def test_the_warning_points_to_the_callers_code(monkeypatch, device, replan):
    """Calls the function directly, and by way of a module in a module."""
    monkeypatch.setattr(functional, "_warned", set())
    # The function is made within the package, as a frame of this file would count as the caller's.
    reason = eval("lambda *call: warn_fallback(f'of {len(_warned)}')", vars(functional))
    monkeypatch.setattr(support, "unsupported_reason", reason)
    x = torch.randn(4, 3, device=device)
    network = torch.nn.Sequential(fastbn.FusedBatchNorm1d(3)).to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch_norm(x, None, None, training=True)
        network(x)
    assert [warning.filename for warning in caught] == [__file__] * 2


@pytest.mark.gpu
def test_falling_back_on_a_gpu_causes_a_warning(monkeypatch):
    monkeypatch.setattr(functional, "_warned", set())
    x, weight = torch.randn(4, 3, device="cuda"), torch.ones(3, device="cuda", dtype=torch.half)
    with (
        pytest.warns(RuntimeWarning, match="weight of torch.float16 does not go with an input of"),
        contextlib.suppress(RuntimeError),  # PyTorch may refuse it
    ):
        batch_norm(x, None, None, weight, training=True)


def test_noncontiguous_statistics_are_updated_all_the_same(device):
    mean, var = torch.zeros(6, device=device)[::2], torch.ones(6, device=device)[::2]
    x = torch.randn(8, 3, device=device) + 2
    with (
        fastbn.use_backend("triton"),
        pytest.raises(RuntimeError, match="running_mean is not contiguous"),
    ):
        batch_norm(x, mean, var, training=True)
    batch_norm(x, mean, var, training=True)
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


@pytest.mark.parametrize("name", ["triton", "torch"])
class TestBadEpilogues:
    """Epilogues that are refused before any buffer of the module is written."""

    @pytest.fixture
    def bn(self, name):
        fastbn.set_backend(name)
        bn = FusedBatchNormAct2d(3)
        before = {k: v.clone() for k, v in bn.state_dict().items()}
        yield bn
        for k, v in bn.state_dict().items():
            assert v.cpu().equal(before[k])

    def test_a_residual_of_another_shape_is_refused(self, bn):
        with pytest.raises(
            ValueError, match=r"residual must have the input's shape \(2, 3, 4, 4\), but got \(3,"
        ):
            bn(torch.randn(2, 3, 4, 4), torch.randn(3, 1, 1))

    def test_a_residual_on_another_device_is_refused(self, bn, device):
        x = torch.randn(2, 3, 4, 4, device=device)
        with pytest.raises(ValueError, match=f"on the input's device {x.device}, but got meta"):
            bn.to(device)(x, x.to("meta"))

    @pytest.mark.parametrize("activation", ["mish", ["relu"], 3])
    def test_an_unknown_activation_is_refused(self, bn, activation):
        with pytest.raises(ValueError, match="activation must be None or one of relu") as e:
            batch_norm(
                torch.randn(2, 3),
                bn.running_mean,
                bn.running_var,
                training=True,
                activation=activation,
            )
        assert str(e.value).endswith(f"but got {activation!r}")

    @pytest.mark.parametrize(
        ("activation", "param", "kind", "why"),
        [
            ("relu", 0.1, ValueError, "must be None for activation 'relu', but got 0.1"),
            (None, 0.1, ValueError, "must be None for activation None, but got 0.1"),
            ("elu", "1", TypeError, "must be a number or None, but got '1'"),
            (
                "leaky_relu",
                torch.ones(1, requires_grad=True),
                TypeError,
                "must be a number or None",
            ),
        ],
    )
    def test_a_wrong_activation_parameter_is_refused(self, bn, activation, param, kind, why):
        with pytest.raises(kind, match=f"activation_param {why}"):
            batch_norm(
                torch.randn(2, 3), bn.running_mean, bn.running_var,
                training=True, activation=activation, activation_param=param,
            )  # fmt: skip


def test_explain_states_plan_and_traffic_in_words(device, force_strategy):
    force_strategy("resident")
    text = str(explain(FusedBatchNormAct2d(6).to(device), torch.randn(2, 6, 8, 8, device=device)))
    assert "Triton kernels serve this call" in text
    assert "channels-first, seen as (N, C, S) = (2, 6, 64)." in text
    forward = "Forward:  resident, 1 launch, 16-byte accesses; 2 tensors read or written = 6.14 kB"
    assert forward in text
    assert "Backward: resident, 1 launch, 16-byte accesses; 3 tensors" in text
    assert "After the kernels" not in text


@pytest.mark.parametrize("strategy", ["two-pass", "resident", "ticketed"])
def test_explain_names_the_strategy_that_runs(strategy, device, force_strategy):
    force_strategy(strategy)
    x = torch.randn(2, 16, 5, 5, device=device)
    found = explain(FusedBatchNorm2d(16).to(device), x)
    assert found.plan.forward.strategy == found.plan.backward.strategy == strategy
    assert str(found).count(strategy) == 2
    assert ("from the cache" in str(found)) == (strategy == "ticketed")
    assert "16-byte accesses" in str(found)


def test_explain_counts_what_the_call_moves(device, force_strategy):
    force_strategy("resident")
    x = torch.randn(2, 6, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    bn = FusedBatchNormAct2d(6).to(device)
    found = explain(bn, x, x)
    assert found.backend == "triton"
    assert found.plan.problem.layout == "channels-last"
    assert found.forward_bytes == round((3 + 1 / 32) * x.nbytes)
    assert found.backward_bytes == round((4 + 1 / 32) * x.nbytes)
    found = explain(bn.eval(), x)
    assert found.plan.forward.strategy == "fixed-stats"
    assert found.forward_bytes == 2 * x.nbytes


def test_explain_agrees_with_what_happens_after_the_kernels(device):
    x = torch.randn(2, 6, 8, 8, device=device)
    for bn, after in (
        (FusedBatchNormAct2d(6, drop_layer=torch.nn.Dropout), ("Dropout", "residual", "ReLU")),
        (FusedBatchNormAct2d(6, act_layer=torch.nn.Mish), ("residual", "Mish")),
    ):
        found = explain(bn.to(device), x, x)
        assert found.plan.problem.saves is None
        assert not found.plan.problem.residual
        last = f"After the kernels, in PyTorch: {', '.join(after)}."
        assert str(found).endswith(last)


@pytest.mark.parametrize("chosen", ["auto", "triton", "torch"])
def test_explain_repeats_the_error_of_a_refused_call(chosen, device):
    fastbn.set_backend(chosen)
    bn = FusedBatchNormAct2d(6).to(device)
    x = torch.randn(2, 6, 4, 4, device=device)
    shapes = ((1, 6, 1, 1), (2, 5, 4, 4), (2, 6), (6,))
    for wrong in (*(torch.randn(s, device=device) for s in shapes), x.int(), x.to_sparse()):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            bn(wrong)
        assert explain(bn, wrong).reason == str(raised.value).rstrip(".")
        assert str(explain(bn, wrong)).startswith("This call is an error: ")
    for wrong in (x[:1], x.to("meta"), 1.0):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
            bn(x, wrong)
        assert explain(bn, x, wrong).reason == str(raised.value).rstrip(".")
    bn.running_mean.requires_grad_()
    with pytest.raises(RuntimeError) as raised:
        bn(x)
    assert explain(bn, x).reason == str(raised.value).rstrip(".")


def test_explain_says_that_a_module_takes_no_residual(device):
    x = torch.randn(2, 6, 4, 4, device=device)
    found = explain(FusedBatchNorm2d(6).to(device), x, x)
    assert str(found) == "This call is an error: FusedBatchNorm2d takes no residual."


@pytest.mark.parametrize("module", [1, "BatchNorm2d"])
def test_explain_refuses_what_is_no_module(module):
    message = f"module must be a module or None, but got a {type(module).__name__}"
    with pytest.raises(TypeError, match=message):
        explain(module, torch.randn(2, 6, 4, 4))


@pytest.mark.parametrize("module", [None, FusedBatchNorm2d(6)])
def test_explain_refuses_an_input_that_is_no_tensor(module):
    with pytest.raises(TypeError, match="input must be a tensor, but got a list"):
        explain(module, [1.0])


def test_explain_says_why_pytorch_serves(device):
    x = torch.randn(2, 6, 8, 8, device=device)
    bn = FusedBatchNorm2d(6).to(device)
    before = {name: value.clone() for name, value in bn.state_dict().items()}
    fastbn.set_backend("torch")
    assert str(explain(bn, x)) == (
        "PyTorch's own batch norm serves this call: the backend is set to 'torch'."
    )
    fastbn.set_backend("auto")
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode AD" in explain(bn, x).reason
    assert "is empty" in explain(None, x[:0]).reason
    for name, value in bn.state_dict().items():
        assert value.equal(before[name]), name


def test_explain_predicts_the_time_at_full_bandwidth(monkeypatch, device):
    from fastbn.kernels.device import H100

    module = sys.modules["fastbn.explain"]
    monkeypatch.setattr(module, "device_facts", lambda device: H100)
    found = explain(None, torch.randn(8, 64, 56, 56, device=device))
    assert found.forward_seconds == found.forward_bytes / H100.bandwidth
    assert "5.8 us at full bandwidth" in str(found)


def test_threads_do_not_disturb_one_another(device):
    x = torch.randn(4, 6, 5, 5, device=device)
    expected = batch_norm(x, None, None, training=True)
    results = [None] * 4

    def work(i):
        for _ in range(3):
            results[i] = batch_norm(x, None, None, training=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result.equal(expected)

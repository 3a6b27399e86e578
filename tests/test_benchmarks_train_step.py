"""Tests benchmarks/train_step.py with a network that has one block in each stage."""

import contextlib
import json

import pytest
import torch

import fastbn
from benchmarks import timing, train_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_step, "LAYERS", (1, 1, 1, 1))
    monkeypatch.setattr(train_step, "CLASSES", 10)
    monkeypatch.setattr(train_step, "no_compiler", lambda device: "there is none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "WINDOW", 0.0)
    monkeypatch.setattr(timing, "ROUNDS", (2, 2))
    with fastbn.use_backend("torch"):  # the interpreter would take minutes
        yield


def test_both_networks_train_alike():
    """Compares outputs, and gradients and statistics by their names, in float64."""
    native, fused = (make().double() for make in train_step.NETWORKS.values())
    fused.load_state_dict(native.state_dict())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    outputs = [net(images) for net in (native, fused)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    grads = [{name: p.grad for name, p in net.named_parameters()} for net in (native, fused)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(fused.state_dict(), native.state_dict())
    act = fastbn.FusedBatchNormAct2d
    assert sum(isinstance(module, act) for module in fused.modules()) == 1 + 3 * 4


def test_the_command_reports_both_networks(tmp_path, capsys, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def kernels_only(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(train_step, "kernels_only", kernels_only)
    assert train_step.main([f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "train_step.json").read_text())
    assert [(row["norm"], row["compiled"]) for row in found["rows"]] == [
        ("torch", False), ("fused", False),
    ]  # fmt: skip
    native, fused = found["rows"]
    assert fused["losses"] == pytest.approx(native["losses"], rel=train_step.TOLERANCE)
    assert native["losses"][-1] < native["losses"][0]
    assert found["environment"]["gpu"] is native["peak_memory"] is None
    assert entered == [CPU, "left"]
    printed = capsys.readouterr().out
    assert "no statement about any GPU" in printed
    assert "does not work here: there is none" in printed
    for row in found["rows"]:
        assert f"{row['images_per_second']:,.1f} images/s" in printed


def test_compiled_rows_are_compiled(monkeypatch):
    # With two images rounding soon decides where training goes, so only the first loss is compared.
    monkeypatch.setattr(train_step, "STEPS", 1)
    compiled = []

    def compile(net, **options):
        compiled.append((type(net.layer1[0]), options))

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    rows = list(train_step.compare(2, 32, CPU, compile=True))
    assert [(row.norm, row.compiled) for row in rows] == [
        ("torch", False), ("fused", False), ("torch", True), ("fused", True),
    ]  # fmt: skip
    options = {"fullgraph": True, "dynamic": False}
    blocks = train_step.Bottleneck, train_step.FusedBottleneck
    assert compiled == [(block, options) for block in blocks]


def test_no_gradient_is_left_for_the_next_step(monkeypatch):
    made = []

    class Network(train_step.ResNet):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def forward(self, x):
            assert all(p.grad is None for p in self.parameters())
            return super().forward(x)

    monkeypatch.setattr(train_step, "ResNet", Network)
    next(train_step.compare(2, 32, CPU, compile=False))
    assert len(made) == 1


def test_networks_that_do_not_train_alike_are_an_error(monkeypatch, tmp_path):
    """Both networks have the same outputs, but the second one's gradients are wrong."""
    forward = train_step.FusedBottleneck.forward
    monkeypatch.setattr(
        train_step.FusedBottleneck,
        "forward",
        lambda block, x: forward(block, x).detach() + 0 * x.sum(),
    )
    with pytest.raises(ArithmeticError, match="norm='fused'"):
        train_step.main([f"--out={tmp_path}"])
    found = json.loads((tmp_path / "train_step.json").read_text())
    assert [row["norm"] for row in found["rows"]] == ["torch"]

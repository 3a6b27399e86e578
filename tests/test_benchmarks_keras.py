"""Tests the benchmark that times Keras's layer and fastbn's in turn."""

import pytest
import torch

pytest.importorskip("keras")

from benchmarks import keras_layers

SHAPE = (4, 3, 3, 5)


def test_both_layers_take_the_same_step():
    theirs, ours = (keras_layers.call_of(name, SHAPE)() for name in ("keras", "fastbn"))
    assert [tuple(grad.shape) for grad in ours] == [SHAPE, (5,), (5,)]
    for found, expected in zip(ours, theirs):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_table_has_each_shapes_times_and_ratio(monkeypatch, capsys):
    monkeypatch.setattr(keras_layers, "SHAPES", (SHAPE, (8, 5)))
    monkeypatch.setattr(keras_layers, "times", lambda shape: {"keras": 3e-3, "fastbn": 1.5e-3})
    keras_layers.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["| (4, 3, 3, 5) | 3.00 | 1.50 | 2.0 |", "| (8, 5) | 3.00 | 1.50 | 2.0 |"]
    if not torch.cuda.is_available():
        assert "a CPU run; no statement about any GPU" in lines[0]


def test_layers_take_turns(monkeypatch):
    played = []
    monkeypatch.setattr(keras_layers, "call_of", lambda name, shape: lambda: played.append(name))
    found = keras_layers.times(SHAPE, rounds=3)
    assert played == ["keras", "fastbn"] * 4
    assert all(seconds > 0 for seconds in found.values())

"""Runs examples/keras_mlp.py and keras_cifar.py at tiny sizes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastbn

keras = pytest.importorskip("keras")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import cifar_data  # noqa: E402
import keras_cifar  # noqa: E402
import keras_mlp  # noqa: E402


@pytest.fixture(autouse=True)
def plain_cpu(tmp_path, monkeypatch):
    """Sets one thread and PyTorch's batch norm; a test may choose the kernels instead."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastbn.use_backend("torch"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_images(monkeypatch):
    """Cuts off the network, and returns a function that sets the numbers of stand-in images."""

    def fail(url):
        raise OSError("no network")

    monkeypatch.setattr(cifar_data, "probe", fail)
    return lambda *counts: monkeypatch.setattr(cifar_data, "STAND_IN_SIZES", counts)


def run(main, *options):
    assert main([*options, "--output-dir=out"]) == 0
    return json.loads(Path("out/metrics.json").read_text())


def test_circles_are_the_same_by_either_layer(capsys):
    tiny = ["--epochs=3", "--samples=40", "-b=16"]
    curves = run(keras_mlp.main, "--norm", "none", "keras", "fastbn", *tiny)
    for key, values in curves["keras"].items():
        assert len(values) == 3
        assert curves["fastbn"][key] == pytest.approx(values, rel=1e-4), key
    assert curves["none"]["train_loss"] != curves["keras"]["train_loss"]
    assert Path("out/circles.png").stat().st_size > 10_000
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [row[0] for row in rows] == ["none", "keras", "fastbn"]
    assert rows[2][2] == f"{curves['fastbn']['val_loss'][-1]:.4f}"


def test_circles_through_the_kernels_agree_with_keras():
    """Leaves out the picture, for which the interpreter would take a minute."""
    args = keras_mlp.parse_args(["--epochs=2", "-b=16"])
    data = keras_mlp.make_circles(40, seed=0) * 2
    with fastbn.use_backend("triton"):
        theirs, ours = (keras_mlp.train(norm, data, args)[1] for norm in ("keras", "fastbn"))
    for key, values in theirs.items():
        assert ours[key] == pytest.approx(values, rel=1e-4), key


def test_circles_come_from_a_file_unless_it_is_too_short(capsys):
    path = Path("points.csv")
    path.write_text("X,Y,class\n" + "".join(f"{i},{-i},{i % 2}\n" for i in range(10)))
    curves = run(keras_mlp.main, "--norm", "fastbn", "--csv=points.csv", "--epochs=2")
    assert len(curves["fastbn"]["val_loss"]) == 2
    path.write_text("X,Y,class\n1,2,0\n")
    assert keras_mlp.main(["--csv=points.csv", "--output-dir=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keras_mlp.py: error: points.csv: 1 rows")
    assert not Path("none").exists()


@pytest.mark.parametrize("model", ["cnn", "gap"])
def test_cifar_is_the_same_by_either_layer(model, few_images, capsys):
    few_images(24, 12)
    tiny = ["--epochs=2", "-b=8", f"--model={model}"]
    metrics = run(keras_cifar.main, "--norm", "none", "keras", "fastbn", *tiny)
    assert metrics["data"] == cifar_data.STAND_IN
    theirs, ours = (metrics["norms"][norm]["history"] for norm in ("keras", "fastbn"))
    for a, b in zip(theirs, ours, strict=True):
        # Adam's first steps depend on the gradient's sign alone, which amplifies rounding a little.
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-2)
    assert metrics["norms"]["none"]["history"][0]["train_loss"] != theirs[0]["train_loss"]
    assert Path("out/curves.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count("loaded again") == 3
    assert "CIFAR-10 cannot be downloaded" in out


def test_augmentation_is_the_same_by_either_layer(few_images):
    few_images(24, 12)
    tiny = ["--epochs=1", "-b=8", "--model=gap", "--norm", "keras", "fastbn"]
    losses = []
    for options in ([], ["--augment"]):
        norms = run(keras_cifar.main, *tiny, *options)["norms"]
        theirs, ours = (norms[norm]["history"][0]["train_loss"] for norm in ("keras", "fastbn"))
        assert ours == pytest.approx(theirs, rel=1e-3)
        losses.append(ours)
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_cifar_comes_from_keras_where_it_can(monkeypatch):
    images = np.arange(4 * 32 * 32 * 3, dtype="uint8").reshape(4, 32, 32, 3)
    labels = np.array([[3], [1], [4], [1]], dtype="uint8")
    monkeypatch.setattr(cifar_data, "probe", lambda url: None)
    monkeypatch.setattr(
        keras.datasets.cifar10, "load_data", lambda: ((images, labels), (images[:2], labels[:2]))
    )
    data = cifar_data.load_data(None, 0, None, keras_cifar.download)
    assert (data.label, data.classes[3]) == ("CIFAR-10", "cat")
    found, classes = keras_cifar.arrays(data.val)
    np.testing.assert_allclose(found, images[:2] / np.float32(255))
    assert classes.tolist() == [3, 1]


def test_keras_reports_bad_data_in_one_line_and_writes_nothing(capsys):
    assert keras_cifar.main(["--data-path=gone", "--output-dir=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keras_cifar.py: error: --data-path: expected gone to hold")
    assert not Path("none").exists()

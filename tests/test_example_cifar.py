"""examples/train_cifar.py, run for real: data, fairness, curves, files, resuming, and bad input."""

import functools
import http.server
import itertools
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image

from fastbn import FusedBatchNormAct2d, use_backend
from fastbn.runtime.support import INTERPRETING

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import cifar_data  # noqa: E402
import cifar_models  # noqa: E402
import cifar_results  # noqa: E402
import train_cifar  # noqa: E402

LABEL = "procedural stand-in, not CIFAR-10"


@pytest.fixture(autouse=True)
def plain_cpu():
    """One thread, and PyTorch's batch norm: only the first test is about the interpreter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_backend("torch"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The folder data/ of whoever runs the tests must not be seen, nor filled."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """An image folder: 96 images for training, 15 for testing, of three classes."""
    root = tmp_path_factory.mktemp("pictures")
    for seed, (part, count) in enumerate({"train": 320, "test": 50}.items()):
        images, labels = cifar_data.draw_stand_in(count, seed)
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if label < 3:
                path = root / part / cifar_data.CLASSES[label] / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


def run_script(*options, **env):
    """In a process of its own, with a proxy that refuses connections in place of the network."""
    # Triton 3.6's interpreter itself does what NumPy has deprecated.
    warnings = ["-W", "error", "-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    command = [sys.executable, *warnings, EXAMPLES / "train_cifar.py", *options]
    proxy = {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **proxy, **env}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)


def run(*options, out="out"):
    """In this process; the metrics that it wrote."""
    assert train_cifar.main([*map(str, options), "--device=cpu", f"--output-dir={out}"]) == 0
    return json.loads(Path(out, "metrics.json").read_text())


def curves(metrics, norm):
    """The history of a norm without the clock's part in it."""
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}
        for row in metrics["norms"][norm]["history"]
    ]


@pytest.mark.skipif(not INTERPRETING, reason="this process does not interpret kernels")
def test_fused_equals_torch_through_the_interpreter(pictures, capsys):
    for part in ("train", "test"):  # an image a class: the interpreter takes its time
        for folder in (pictures / part).iterdir():
            path = min(folder.iterdir())
            few = Path("few", part, folder.name, path.name)
            few.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, few)
    tiny = ["--max-train-samples=2", "-b=2", "--epochs=1"]
    with use_backend("triton"):
        metrics = run("--data-path=few", "--norm", "torch", "fused", *tiny)
    assert "Triton's interpreter computed the fused norm" in capsys.readouterr().out
    (expected,), (row,) = curves(metrics, "torch"), curves(metrics, "fused")
    # Adam's first steps are the sign of the gradient, which amplifies rounding a little.
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-2)
    weights = [torch.load(f"out/{norm}.pt")["weights"] for norm in ("torch", "fused")]
    assert weights[0].keys() == weights[1].keys()
    assert weights[1]["1.0.num_batches_tracked"] == 1
    for name in ("1.0.running_mean", "1.0.running_var"):
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-2, atol=1e-3)


def test_no_arguments_and_no_network_end_on_the_stand_in():
    done = run_script("--max-train-samples=256", "--epochs=1", "-b=64", "--device=cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "CIFAR-10 cannot be downloaded" in done.stdout
    assert "PyTorch computed the fused norm" in done.stdout
    assert f"{LABEL}: 256 training and 2,000 validation images" in done.stdout
    out = Path("runs/cifar")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["data"] == LABEL
    assert list(metrics["norms"]) == ["none", "fused"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for norm, result in metrics["norms"].items():
        best = max(row["val_accuracy"] for row in result["history"])
        assert result["best_val_accuracy"] == best
        assert len(result["history"]) == 1
        (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith(norm + "  ")]
        assert row[1:3] == [f"{best:.1%}", f"{result['final_val_accuracy']:.1%}"]
        assert f"{out / norm}.pt: loaded again, {row[2]}" in done.stdout
    assert not Path("data").exists()


def test_batch_norm_is_ahead_on_the_stand_in(monkeypatch):
    monkeypatch.setattr(cifar_data, "download_cifar10", lambda: None)
    monkeypatch.setattr(cifar_data, "STAND_IN_SIZES", (1500, 500))
    norms = run("--epochs=3", "-b=50")["norms"]
    assert norms["fused"]["best_val_accuracy"] > norms["none"]["best_val_accuracy"] + 0.1
    assert norms["fused"]["best_val_accuracy"] > 0.25
    assert norms["none"]["epochs_to_reach_best_of"] == {"fused": None}
    assert norms["fused"]["epochs_to_reach_best_of"]["none"] <= 2


def test_norms_do_not_depend_on_each_other_and_the_seed_repeats(pictures):
    tiny = ["--data-path", pictures, "-b=16", "--epochs=2", "--augment"]
    both = run("--norm", "none", "torch", *tiny)
    swapped = run("--norm", "fused", "none", *tiny)
    other = run("--norm", "none", *tiny, "--seed=1")
    assert curves(both, "none") == curves(swapped, "none")
    assert curves(both, "torch") == curves(swapped, "fused")
    assert curves(both, "none") != curves(both, "torch")
    assert curves(both, "none") != curves(other, "none")


@pytest.mark.parametrize("model", cifar_models.MODELS)
def test_shared_weights_start_equal_and_a_bias_replaces_the_norm(model):
    none, native, fused = (
        cifar_models.build_model(model, norm, 10, seed=3) for norm in cifar_models.NORMS
    )
    assert native.state_dict().keys() == fused.state_dict().keys()
    layers = [
        [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        for net in (none, native, fused)
    ]
    for plain, *normed in zip(*layers, strict=True):
        assert all(torch.equal(plain.weight, layer.weight) for layer in normed)
        assert all((plain.bias is None) == (plain is None) for layer in normed)
        if normed[0].bias is None:
            assert not plain.bias.any()
    norms = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in native.modules())
    without_bias = sum(layer.bias is None for layer in layers[1])
    assert norms == without_bias == {"cnn": 3, "gap": 1, "resnet18": 20}[model]
    names = {type(m).__name__ for m in fused.modules()}
    assert not names & {"BatchNorm1d", "BatchNorm2d"}


def test_norms_with_relu_and_sum_inside_make_the_same_resnet():
    native, fused = (
        cifar_models.build_model("resnet18", norm, 10, seed=3).double()
        for norm in ("torch", "fused")
    )
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for _ in range(2):
        outputs = [net(images) for net in (native, fused)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
    pairs = zip(native.named_parameters(), fused.named_parameters(), strict=True)
    for (name, right), (fused_name, got) in pairs:
        assert name == fused_name
        torch.testing.assert_close(got.grad, right.grad)
    torch.testing.assert_close(fused.state_dict(), native.state_dict())
    torch.testing.assert_close(fused.eval()(images), native.eval()(images))
    inside = [module for module in fused.modules() if isinstance(module, FusedBatchNormAct2d)]
    assert len(inside) == 1 + 2 * 8
    names = torchvision.models.resnet18(num_classes=10).state_dict().keys()
    assert fused.state_dict().keys() == names


def test_resnet_keeps_the_resolution_of_small_images():
    net = cifar_models.build_model("resnet18", "torch", 10, seed=0).eval()
    with torch.no_grad():
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(torch.randn(1, 3, 32, 32))))))
    assert x.shape == (1, 64, 32, 32)


@pytest.mark.parametrize("norms", [("fused", "fused"), ("torch", "fused"), ("none", "none")])
def test_resume_goes_on_exactly(pictures, norms):
    first, second = norms
    tiny = ["--data-path", pictures, "-b=16", "--augment"]
    whole = run("--norm", first, "--epochs=2", *tiny, out="whole")
    run("--norm", first, "--epochs=1", *tiny, out="half")
    resume = f"--resume=half/{first}.pt"
    resumed = run("--norm", second, "--epochs=2", resume, *tiny, out="half")
    assert curves(resumed, second) == curves(whole, first)
    ends = [torch.load(path) for path in (f"whole/{first}.pt", f"half/{second}.pt")]
    for key in ("weights", "optimizer"):
        torch.testing.assert_close(*(end[key] for end in ends), rtol=0, atol=0)


def test_test_only_scores_a_folder_of_checkpoints_and_writes_nothing(pictures, capsys):
    trained = run("--norm", "none", "fused", "--data-path", pictures, "-b=16", "--epochs=1")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    options = ["--resume=out", "--test-only", "--device=cpu", f"--data-path={pictures}"]
    assert train_cifar.main(options) == 0
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    _, *lines = capsys.readouterr().out.splitlines()
    for norm, line in zip(["none", "fused"], lines, strict=True):
        assert line.startswith(norm)
        assert line.endswith(f"accuracy {trained['norms'][norm]['final_val_accuracy']:.1%}")


@pytest.mark.parametrize("options", [["--amp=bf16", "--channels-last"], ["--amp=fp16"]])
def test_mixed_precision_follows_the_full_one(pictures, options):
    tiny = ["--data-path", pictures, "--norm", "torch", "--model=gap", "-b=16", "--epochs=2"]
    full, mixed = curves(run(*tiny), "torch"), curves(run(*tiny, *options), "torch")
    for key in ("train_loss", "val_loss"):
        assert mixed[-1][key] == pytest.approx(full[-1][key], rel=0.05)
        assert mixed[-1][key] != full[-1][key]


def torchrun(*options, processes=2):
    """Several processes on this CPU, in a group of their own."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [EXAMPLES / "train_cifar.py", *options, "--device=cpu", "--workers=1"]
    return subprocess.run(
        [sys.executable, *command, *map(str, script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip


def test_processes_that_share_statistics_train_what_one_process_does(pictures):
    """Batches of 31 images in parts of 16 and 15, drawn and augmented as in one process."""
    options = [f"--data-path={pictures}", "--norm=fused", "--epochs=1", "-b=31", "--augment"]
    one = run(*options, out="one")["norms"]["fused"]
    done = torchrun(*options, "--sync-bn", "--output-dir=two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fused 1/1") == 1  # only the first process prints
    assert "cpu, 2 processes" in done.stdout
    metrics = json.loads(Path("two", "metrics.json").read_text())
    assert metrics["options"]["sync_bn"]
    two = metrics["norms"]["fused"]
    for name in ("train_loss", "val_loss"):
        assert two["history"][0][name] == pytest.approx(one["history"][0][name], rel=1e-4)
    weights = [torch.load(Path(out, "fused.pt"))["weights"] for out in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-3)
    assert Path("two", "curves.png").stat().st_size > 10_000


def test_pytorchs_shared_statistics_need_a_gpu(pictures, capsys):
    options = [f"--data-path={pictures}", "--norm", "torch", "--sync-bn", "--device=cpu"]
    assert train_cifar.main(options) == 2
    assert "--sync-bn: expected no torch in --norm" in capsys.readouterr().err


def test_compiled_networks_save_what_plain_ones_do(pictures, monkeypatch):
    # The eager backend takes the same path through torch.compile and needs no C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    tiny = ["--data-path", pictures, "--norm", "torch", "--model=gap", "-b=16", "--epochs=1"]
    plain, compiled = run(*tiny, out="plain"), run(*tiny, "--compile", out="compiled")
    assert curves(compiled, "torch") == curves(plain, "torch")
    ends = [torch.load(f"{out}/torch.pt")["weights"] for out in ("plain", "compiled")]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def write_cifar10(root, count=6):
    """``count`` images in each of the five batches and in the test batch; returns all of them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6 * count, 3072), dtype=np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for index, name in enumerate(names):
        rows = slice(index * count, (index + 1) * count)
        batch = {"data": images[rows], "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    classes = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}, protocol=2))
    return torch.from_numpy(images).view(-1, 3, 32, 32)


def test_cifar_10_batches_are_read_and_trained_on(tmp_path):
    images = write_cifar10(tmp_path / "real")
    data = cifar_data.load_data(tmp_path / "real", workers=1, max_train_samples=None)
    assert (data.label, data.classes[9]) == ("CIFAR-10", "class 9")
    assert torch.equal(data.val[0], images[30:])
    assert data.val[1].tolist() == [0, 1, 2, 3, 4, 5]
    rows = [(image == images).flatten(1).all(1).nonzero().item() for image in data.train[0]]
    assert sorted(rows) == list(range(30))
    assert [row % 6 for row in rows] == data.train[1].tolist()
    metrics = run("--data-path=real", "-b=8", "--max-train-samples=20", "--epochs=1", "--norm=none")
    assert (metrics["data"], metrics["train_images"], metrics["val_images"]) == ("CIFAR-10", 20, 6)


def test_image_folders_are_read_in_every_mode_and_size(tmp_path):
    for part in ("train", "test"):
        for label, mode in enumerate(("L", "RGB", "RGBA", "P")):
            path = tmp_path / "mixed" / part / f"class{label}"
            path.mkdir(parents=True)
            color = Image.new("RGBA", (16 * (label + 1), 40), (10, 10, 10, 255))
            color.convert(mode).save(path / "image.png")
    Image.new("RGB", (32, 32), (250, 100, 0)).save(tmp_path / "mixed/test/class1/red.png")
    data = cifar_data.load_data(tmp_path / "mixed", workers=2, max_train_samples=None)
    assert data.classes == ["class0", "class1", "class2", "class3"]
    assert (data.train[0] == 10).all()
    assert sorted(data.train[1].tolist()) == [0, 1, 2, 3]
    assert data.val[1].tolist() == [0, 1, 1, 2, 3]
    assert data.val[0][2].float().mean((1, 2)).tolist() == [250, 100, 0]


def test_the_stand_in_is_always_the_same_and_balanced():
    images, labels = cifar_data.draw_stand_in(200, seed=1)
    assert (images.shape, images.dtype) == ((200, 3, 32, 32), torch.uint8)
    assert torch.equal(cifar_data.draw_stand_in(200, seed=1)[0], images)
    assert not torch.equal(cifar_data.draw_stand_in(200, seed=2)[0], images)
    assert labels.bincount().tolist() == [20] * 10
    assert len(set(cifar_data.CLASSES)) == 10


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    split = (
        torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32),
        torch.arange(10),
    )

    def order(size, seed):
        batches = list(cifar_data.train_batches(split, size, seed, augmented=False))
        for images, labels in batches:
            torch.testing.assert_close((images[:, 0, 0, 0] * 0.25 + 0.5) * 255, labels.float())
        return [labels.tolist() for _, labels in batches]

    assert sorted(itertools.chain(*order(5, seed=0))) == list(range(10))
    assert order(5, seed=0) == order(5, seed=0) != order(5, seed=1)
    assert [len(batch) for batch in order(4, seed=0)] == [4, 4]
    assert [len(batch) for batch in order(64, seed=0)] == [10]


def test_augmentation_flips_turns_and_crops_within_its_limits():
    # In images of their own coordinates, the result tells where each pixel came from.
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = torch.stack([x, y, x]).expand(500, -1, -1, -1)
    moved = cifar_data.augment(images, torch.Generator().manual_seed(0))[:, :2, 13:19, 13:19]
    along_x = (moved[:, :, :, -1] - moved[:, :, :, 0]).mean(2) / 5
    along_y = (moved[:, :, -1] - moved[:, :, 0]).mean(2) / 5
    matrix = torch.stack([along_x, along_y], dim=2)
    torch.testing.assert_close(
        matrix @ matrix.mT, torch.eye(2).expand(500, 2, 2), atol=1e-4, rtol=0
    )
    flipped = torch.linalg.det(matrix) < 0
    assert 200 < flipped.sum() < 300
    degrees = torch.atan2(-along_y[:, 0], along_y[:, 1]) * 180 / math.pi
    assert degrees.abs().max() < 36.01
    assert degrees.min() < -35
    assert degrees.max() > 35
    shift = moved.mean((2, 3)) - 15.5
    assert 3.9 < shift.abs().max() < 4.01
    assert shift.mean(0).abs().max() < 0.3


@pytest.mark.parametrize("host", ["closed", "silent"])
def test_an_unreachable_host_is_found_out_soon(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        if host == "closed":
            server.close()
        with pytest.raises(OSError, match=r"refused|no answer|timed out"):
            cifar_data.probe(url, seconds=0.3)


def test_a_host_that_answers_is_reachable(tmp_path):
    (tmp_path / "file").write_text("")
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler
    ) as server:
        threading.Thread(target=server.serve_forever).start()
        base = f"http://127.0.0.1:{server.server_port}"
        cifar_data.probe(f"{base}/file")
        with pytest.raises(OSError, match="404"):
            cifar_data.probe(f"{base}/missing")
        server.shutdown()


def history(*accuracies):
    return [
        {
            "epoch": i,
            "train_loss": math.nan,
            "val_accuracy": accuracy,
            "seconds": float(i),
            "images_per_second": 6000 / i,
        }
        for i, accuracy in enumerate(accuracies, start=1)
    ]


def test_report_compares_the_norms_and_is_strict_json(tmp_path):
    histories = {"none": history(0.2, 0.5, 0.4), "fused": history(0.4, 0.5, 0.7)}
    norms = cifar_results.summarise(histories, {"none": None, "fused": 3 << 20})
    _, none, fused = cifar_results.table(norms).splitlines()
    assert none.split() == ["none", "50.0%", "40.0%", "fused", "never", "2.0", "3,000", "-"]
    assert "fused  70.0%  70.0%  none in epoch 2      2.0      3,000     3 MiB" in fused
    split = torch.zeros(2, 3, 32, 32), torch.zeros(2)
    data = cifar_data.Data(LABEL, ["a", "b"], split, split)
    options = train_cifar.parse_options(["--device=cpu"])
    cifar_results.write_metrics(tmp_path / "metrics.json", options, data, norms)
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["norms"]["none"]["history"][0]["train_loss"] is None


def test_picture_names_the_data_and_shows_every_curve(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    split = torch.zeros(2, 3, 32, 32), torch.zeros(2)
    histories = {"none": history(0.2, 0.5), "torch": history(0.4, 0.7)}
    cifar_results.draw_curves(
        "x.png", "cnn", cifar_data.Data(LABEL, ["a"], split, split), histories
    )
    (figure,) = drawn
    assert LABEL in figure.get_suptitle()
    accuracy, loss = figure.axes
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[0.2, 0.5], [0.4, 0.7]]
    assert len({line.get_color() for line in accuracy.lines}) == len(loss.lines) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--norm batch", ["--norm", "none", "torch", "fused"]),
        ("--model vgg", ["--model", "cnn", "gap", "resnet18"]),
        ("--amp fp8", ["--amp", "bf16"]),
        ("-b 0", ["--batch-size", "from 2 to", "'0'"]),
        ("-b 1", ["--batch-size", "from 2 to", "'1'"]),
        ("--epochs 1.5", ["--epochs", "integer", "'1.5'"]),
        ("--lr nan", ["--lr", "number above 0", "'nan'"]),
        ("--lr fast", ["--lr", "number above 0", "'fast'"]),
        ("--seed -1", ["--seed", "integer from 0"]),
        ("--workers -1", ["--workers", "integer from 0 to"]),
        ("--max-train-samples 0", ["--max-train-samples", "from 2 to"]),
        ("--device nonsense", ["--device", "usable device", "'nonsense'"]),
        ("--device meta", ["--device", "usable device", "'meta'"]),
        ("--data-path gone", ["--data-path", "existing folder", "'gone'"]),
        ("--data-path empty", ["--data-path", "cifar-10-batches-py, or train and test"]),
        ("--data-path torn", ["--data-path", "torn/cifar-10-batches-py"]),
        ("--data-path classless", ["--data-path", "classless/train/<class>"]),
        ("--data-path hollow", ["--data-path", "hollow/train/<class>"]),
        ("--data-path unequal", ["--data-path", "same classes", "b"]),
        ("--data-path broken", ["--data-path", "image in broken/train/a/x.png"]),
        ("--data-path good --output-dir file", ["--output-dir", "file"]),
        ("--test-only", ["--test-only", "--resume"]),
        ("--resume gone", ["--resume", "gone/none.pt"]),
        ("--resume gap.pt", ["--resume", "one --norm to go with gap.pt"]),
        ("--resume file --norm none", ["--resume", "checkpoint of train_cifar.py"]),
        ("--resume other.pt --norm none", ["--resume", "checkpoint of train_cifar.py"]),
        ("--resume gap.pt --norm torch", ["--resume", "a cnn", "holds a gap"]),
        ("--resume gap.pt --norm none --model gap", ["--resume", "norm none", "holds torch"]),
        ("--resume bent.pt --norm torch --model gap", ["--resume", "bent.pt"]),
        ("--resume gap.pt --norm fused --model gap --epochs 1", ["--epochs", "more than the 1"]),
        ("--resume gap.pt --norm fused --model gap --data-path good", ["--resume", "disc", "a"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(bad_things, capsys, options, expected):
    before = sorted(Path().rglob("*"))
    try:
        status = train_cifar.main(["--device=cpu", *options.split()])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2
    (line,) = printed.err.splitlines()
    assert "error: " in line
    for part in expected:
        assert part in line
    assert printed.out == ""
    assert sorted(Path().rglob("*")) == before


@pytest.fixture
def bad_things(tmp_path):
    image = Image.new("RGB", (32, 32))
    for name in ("empty", "classless", "hollow", "unequal", "broken", "good"):
        (tmp_path / name).mkdir()
        for part in () if name == "empty" else ("train", "test"):
            (tmp_path / name / part).mkdir()
            for label in () if name == "classless" else ("a",):
                (tmp_path / name / part / label).mkdir()
                if name != "hollow":
                    image.save(tmp_path / name / part / label / "x.png")
    (tmp_path / "unequal/test/b").mkdir()
    image.save(tmp_path / "unequal/test/b/x.png")
    whole = (tmp_path / "broken/train/a/x.png").read_bytes()
    (tmp_path / "broken/train/a/x.png").write_bytes(whole[: len(whole) // 2])
    write_cifar10(tmp_path / "torn")
    (tmp_path / "torn/cifar-10-batches-py/data_batch_3").write_bytes(b"\x80\x02}")
    (tmp_path / "file").write_text("no checkpoint")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    gap = cifar_models.build_model("gap", "torch", 2, seed=0)
    checkpoint = {
        "model": "gap",
        "norm": "torch",
        "classes": ["disc", "ring"],
        "history": history(0.5),
        "weights": gap.state_dict(),
        "optimizer": {},
        "scaler": {},
    }
    torch.save(checkpoint, tmp_path / "gap.pt")
    torch.save({**checkpoint, "classes": ["disc"]}, tmp_path / "bent.pt")


def test_bad_input_through_the_command_line(tmp_path):
    done = run_script("--data-path", tmp_path, "--output-dir=out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"train_cifar.py: error: --data-path: expected {tmp_path} to hold cifar-10-batches-py,"
        " or train and test\n"
    )
    assert list(tmp_path.iterdir()) == []

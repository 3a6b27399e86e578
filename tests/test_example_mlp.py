"""Runs examples/train_mlp.py and checks curves, the split, the order, files and error messages."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastbn import use_backend
from fastbn.runtime.support import INTERPRETING

SCRIPT = Path(__file__).parents[1] / "examples" / "train_mlp.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_mlp  # noqa: E402

POINTS = "X,Y,class\n" + "".join(f"{i},{-i},{i % 2}\n" for i in range(10))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path):
    """Returns a function that runs the script in this process and returns the curves written."""

    def run(*options, name="out"):
        out = tmp_path / name
        assert train_mlp.main([*map(str, options), "--device=cpu", f"--output-dir={out}"]) == 0
        return json.loads((out / "metrics.json").read_text())

    return run


def run_script(*options, **env):
    # Triton 3.6's interpreter itself uses what NumPy has deprecated.
    warnings = ["-W", "error", "-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    command = [sys.executable, *warnings, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.skipif(not INTERPRETING, reason="this process does not interpret kernels")
def test_fused_and_torch_give_the_same_curves_when_interpreted(run):
    with use_backend("triton"):
        curves = run("--norm", "torch", "fused", "--epochs=3", "--samples=40", "-b=16")
    assert len(curves["torch"]["val_loss"]) == 3
    assert curves["torch"]["train_loss"][0] > curves["torch"]["train_loss"][-1]
    for key, values in curves["torch"].items():
        assert curves["fused"][key] == pytest.approx(values, rel=1e-5), key


def test_batch_norm_is_ahead_and_the_files_are_written(run, tmp_path, capsys):
    curves = run("--norm", "none", "torch", "--epochs", 30)
    assert curves["torch"]["val_accuracy"][-1] > 0.93
    assert curves["torch"]["val_accuracy"][-1] > curves["none"]["val_accuracy"][-1] + 0.1
    assert curves["torch"]["val_loss"][-1] < curves["none"]["val_loss"][-1] / 2
    assert (tmp_path / "out" / "circles.png").read_bytes().startswith(b"\x89PNG")
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [row[0] for row in table] == ["none", "torch"]
    assert table[1][2] == f"{curves['torch']['val_loss'][-1]:.4f}"


def test_networks_do_not_depend_on_each_other_and_the_seed_repeats(run):
    tiny = ["--samples", 50, "--epochs", 3]
    both = run("--norm", "none", "torch", *tiny)
    swapped = run("--norm", "torch", "none", *tiny, name="swapped")
    other = run("--norm", "none", "torch", *tiny, "--seed", 1, name="other")
    assert both == swapped
    assert both["torch"]["train_loss"] != other["torch"]["train_loss"]


def test_orders_differ_for_batch_norm_only(run):
    tiny = ["--norm", "none", "torch", "--samples", 50, "--epochs", 2]
    before = run(*tiny, "--order", "norm-act")
    after = run(*tiny, "--order", "act-norm", name="after")
    assert before["none"] == after["none"]
    assert before["torch"]["train_loss"] != after["torch"]["train_loss"]


def test_same_initial_weights_and_a_bias_only_where_it_matters():
    nets = [
        train_mlp.build_net(norm, order, seed=3)
        for norm, order in [("none", "norm-act"), ("fused", "norm-act"), ("fused", "act-norm")]
    ]
    linears = [[m for m in net if isinstance(m, torch.nn.Linear)] for net in nets]
    for layers in zip(*linears, strict=True):
        assert torch.equal(layers[0].weight, layers[1].weight)
        assert torch.equal(layers[0].weight, layers[2].weight)
    assert [[m.bias is not None for m in layers] for layers in linears] == [
        [True, True, True],
        [False, False, True],
        [True, True, True],
    ]
    kinds = [[type(m).__name__ for m in net[:3]] for net in nets[1:]]
    assert kinds == [["Linear", "FusedBatchNorm1d", "ReLU"], ["Linear", "ReLU", "FusedBatchNorm1d"]]


def test_a_fifth_of_the_data_validates_and_none_of_it_trains():
    train, val = train_mlp.split(1003, seed=0)
    assert len(val) == 200
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1003))
    assert val.tolist() != sorted(val.tolist())


def test_circles_are_two_rings():
    points, labels = train_mlp.make_circles(2000, seed=0)
    radius = points.norm(dim=1)
    for value, expected in ((0, 1.0), (1, 0.5)):
        assert radius[labels == value].mean().item() == pytest.approx(expected, abs=0.02)
        assert points[labels == value].mean(0).abs().max() < 0.1


@pytest.mark.parametrize("norm", ["none", "torch"])
def test_a_last_batch_of_one_is_left_out(norm):
    args = train_mlp.parse_args(["-b", "4", "--epochs", "1"])
    points, labels = train_mlp.make_circles(9, seed=0)
    left_out = torch.randperm(9, generator=torch.Generator().manual_seed(args.seed))[-1]
    changed = points.clone()
    changed[left_out] += 5
    losses = []
    for data in (points, changed):
        net = train_mlp.build_net(norm, args.order, args.seed)
        losses.append(train_mlp.train(net, (data, labels, points, labels), args))
    assert losses[0] == losses[1]


def test_curves_are_what_the_network_scores():
    points, labels = train_mlp.make_circles(10, seed=0)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    # With so low a rate the network doesn't change; the batches have 4, 4 and 2 points.
    still = train_mlp.parse_args(["--lr=1e-30", "--epochs=1", "-b=4"])
    net = train_mlp.build_net("none", still.order, still.seed)
    (value,) = train_mlp.train(net, (points, labels) * 2, still)["train_loss"]
    assert value == pytest.approx(loss(net(points), labels).item(), rel=1e-6)

    points, labels = train_mlp.make_circles(200, seed=0)
    args = train_mlp.parse_args(["--epochs=3", "-b=20"])
    net = train_mlp.build_net("torch", args.order, args.seed)
    curves = train_mlp.train(net, (points, labels, points[:90], labels[:90]), args)
    assert net[1].num_batches_tracked == 30
    logits = net.eval()(points[:90])  # by the running statistics, not those of the 90 points
    right = ((logits > 0) == (labels[:90] == 1)).float().mean()
    assert curves["val_loss"][-1] == pytest.approx(loss(logits, labels[:90]).item(), rel=1e-6)
    assert curves["val_accuracy"][-1] == pytest.approx(right.item(), rel=1e-6)


def test_a_network_that_knows_one_class_is_drawn_without_a_warning(tmp_path):
    points, labels = train_mlp.make_circles(10, seed=0)
    net = train_mlp.build_net("none", "norm-act", seed=0)
    torch.nn.init.zeros_(net[-2].weight)
    torch.nn.init.ones_(net[-2].bias)
    curves = {"none": {"val_loss": [0.9], "val_accuracy": [0.5]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_mlp.draw(tmp_path / "one.png", {"none": net}, curves, (points, labels) * 2)
    assert (tmp_path / "one.png").stat().st_size > 10_000


def test_csv_columns_come_in_any_order_after_a_byte_order_mark(tmp_path, run):
    path = tmp_path / "points.csv"
    path.write_text(
        "\ufeffclass,note, Y,X\n" + "".join(f"{i % 2}, n ,{i},1e{i}\n" for i in range(6))
    )
    points, labels = train_mlp.load_csv(path)
    assert points.tolist() == [[10.0**i, i] for i in range(6)]
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    path.write_text(POINTS)
    assert set(run("--norm", "torch", "--csv", path, "--epochs", 2)) == {"torch"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ["No such file"]),
        ("", ["empty"]),
        ("X,Y,class\n", ["0 rows"]),
        ("X,Y,class\n1,2,0\n1,2,1\n", ["2 rows"]),
        (POINTS.replace("Y", "Z"), ["no column 'Y'", "X, Z, class"]),
        (POINTS.replace("4,-4,0", "4,four,0"), ["line 6", "'Y'", "'four'", "no number"]),
        (POINTS.replace("4,-4,0", "4,,0"), ["line 6", "'Y'", "''"]),
        (POINTS.replace("4,-4,0", "nan,-4,0"), ["line 6", "'X'", "'nan'", "is not between"]),
        (POINTS.replace("4,-4,0", "4,-inf,0"), ["line 6", "'Y'", "'-inf'", "is not between"]),
        (POINTS.replace("4,-4,0", "1e16,-4,0"), ["line 6", "'X'", "'1e16'", "1e+15"]),
        (POINTS.replace("4,-4,0", "4,-4,2"), ["line 6", "'class'", "'2'", "neither 0 nor 1"]),
        (POINTS.replace("4,-4,0", "4,-4"), ["line 6", "'class'", "no value"]),
        (POINTS.replace("4,-4,0", "4,-4,0,7"), ["line 6", "more values than columns"]),
        (b"X,Y,class\n\xff\xfe,1,0\n", ["cannot be read"]),
    ],
)
def test_bad_csv_is_reported_in_one_line_and_nothing_is_written(tmp_path, capsys, text, expected):
    path, out = tmp_path / "points.csv", tmp_path / "out"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert train_mlp.main(["--csv", str(path), "--output-dir", str(out)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    for part in [f"error: {path}", *expected]:
        assert part in line
    assert printed.out == ""
    assert not out.exists()


def test_the_command_line_reports_a_missing_file_in_one_line(tmp_path):
    done = run_script("--csv", tmp_path / "gone.csv", "--output-dir", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"train_mlp.py: error: {tmp_path / 'gone.csv'}: cannot be read: No such file or directory\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_fails_before_the_training(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert train_mlp.main(["--device=cpu", "--output-dir", str(blocked)]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"train_mlp.py: error: --output-dir: expected a folder, not {blocked}: File exists\n"
    )
    assert printed.out == ""


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "--epochs": ["0", "many", "9" * 5000],
        "--batch-size": ["1", str(2**63)],
        "--lr": ["0", "-1", "nan", "1e38"],
        "--samples": ["4", "1000000000000"],
        "--seed": ["-1", str(2**32)],
        "--norm": ["batch"],
        "--device": ["nonsense", "meta", "hpu"],
    }.items(),
)
def test_options_out_of_range_are_reported_in_one_line(option, values, tmp_path, capsys):
    for value in values:
        with pytest.raises(SystemExit) as stopped:
            train_mlp.main([f"{option}={value}", "--output-dir", str(tmp_path / "out")])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train_mlp.py: error: argument ")
        assert option in line
        assert f"'{value}'" in line
    assert not (tmp_path / "out").exists()

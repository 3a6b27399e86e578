"""Runs examples/finetune.py: fused or not, with frozen parts, with weights, and on bad input."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from benchmarks.models import CountedCalls
from fastbn import use_backend

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import finetune  # noqa: E402
import image_folder  # noqa: E402

CLASSES = ["blue", "green", "red"]
NETWORK = "mobilenet_v3_small"


@pytest.fixture(autouse=True)
def plain_cpu(tmp_path, monkeypatch):
    """Sets one thread and PyTorch's batch norm, and lets no download reach the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_backend("torch"):
        yield
    torch.set_num_threads(threads)


def draw(folder, counts, classes=CLASSES):
    """Draws `counts[i]` noisy images of class i, and gives each class a colour of its own."""
    for label, (name, count) in enumerate(zip(classes, counts)):
        (folder / name).mkdir(parents=True)
        generator = torch.Generator().manual_seed(label)
        for index in range(count):
            noise = torch.rand(20, 24, 3, generator=generator)
            noise[:, :, 2 - label % 3] += 1
            pixels = (noise * 127).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")


@pytest.fixture
def pictures(tmp_path):
    draw(tmp_path / "pictures", (12, 11, 10))
    return tmp_path / "pictures"


def run(folder, *options, out="out", model=NETWORK):
    """Runs in this process and returns the results written, without the times, and the weights."""
    fixed = ["--device=cpu", "--workers=0", "--image-size=32", "--epochs=1", "-b=8"]
    given = [folder, "--model", model, *fixed, *options, "--output-dir", out]
    assert finetune.main([*map(str, given)]) == 0
    results = json.loads(Path(out, "results.json").read_text())
    for row in results["history"]:
        assert row.pop("seconds") > 0
    return results, torch.load(Path(out, "weights.pt"))


def initial_state(classes=3, model=NETWORK):
    options = finetune.parse_options([".", "--model", model])
    return copy.deepcopy(finetune.make_model(options, classes, pretrained=False)[0].state_dict())


def moved(before, after):
    return {name for name in after if not torch.equal(before[name], after[name])}


def is_statistic(name):
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_fused_and_unfused_runs_are_the_same_and_share_weights(pictures, capsys):
    with CountedCalls() as unfused:
        expected, expected_weights = run(pictures, "--epochs=2", out="unfused")
    assert unfused.norms == (0, 0, 0, 0)
    with CountedCalls() as fused:
        results, weights = run(pictures, "--epochs=2", "--fuse", out="fused")
    assert [bool(number) for number in fused.norms] == [True, False, True, True]
    assert results["norms"] == {"act": 23, "add": 6, "plain": 5}
    assert results["history"] == expected["history"]
    assert not moved(expected_weights, weights)

    net = torchvision.models.get_model(NETWORK, num_classes=3)
    net.load_state_dict(weights)
    _, train, test = image_folder.load_split(pictures, None)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (finetune.MEAN, finetune.STD))
    images = []
    for image, _ in test:  # an image of 24 by 20 is scaled to a shorter side of 32, then cropped
        scaled = torchvision.transforms.functional.resize(image, 32)
        middle = torchvision.transforms.functional.center_crop(scaled, 32)
        tensor = torchvision.transforms.functional.to_tensor(middle)
        images.append((tensor - mean) / std)
    labels = torch.tensor([label for _, label in test])
    options = finetune.parse_options([str(pictures), "--workers=0", "--image-size=32"])
    ((seen, _),) = finetune.make_loaders(train, test, net, options)[1]
    torch.testing.assert_close(seen, torch.stack(images), rtol=0, atol=1e-5)
    logits = net.double().eval()(seen.double())
    last = results["history"][-1]
    assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert last["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean())

    printed = capsys.readouterr().out
    assert "34 batch norms are fastbn's.\n   23 norm and activation" in printed
    assert "PyTorch computed the fused norms" in printed
    row = [line.split() for line in printed.splitlines() if line.startswith("2  ")][-1]
    assert row[3:5] == [f"{last['test_loss']:.3f}", f"{last['test_accuracy']:.1%}"]
    assert Path("fused/curves.png").read_bytes().startswith(b"\x89PNG")
    assert "fused" in Path("fused/results.json").read_text()


def test_the_kernels_give_the_losses_of_pytorch(pictures):
    tiny = ["--limit=2", "--image-size=16", "-b=2", "--lr=1e-5"]
    expected, _ = run(pictures, *tiny, model="timm/test_resnet")
    with use_backend("triton"), CountedCalls() as calls:
        results, weights = run(pictures, *tiny, "--fuse", model="timm/test_resnet")
    assert calls.norms[:2] == (2 * 8, 2 * 4)  # there is a batch to train on and one to test on
    (row,), (expected_row,) = results["history"], expected["history"]
    assert row == pytest.approx(expected_row, rel=1e-4)
    timm.create_model("test_resnet", num_classes=3).load_state_dict(weights)


def test_fine_tuning_halves_the_loss(pictures):
    results, _ = run(pictures, "--epochs=6", "--lr=3e-3", "--fuse", model="timm/test_resnet")
    history = results["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["train_accuracy"] > 0.9


def test_frozen_norms_do_not_move_and_load_into_the_plain_network(pictures):
    before = initial_state()
    results, weights = run(pictures, "--fuse", "--freeze-norms")
    assert results["norms"]["act"] == 23
    norms = {name.rpartition(".")[0] for name in weights if is_statistic(name)}
    assert len(norms) == 34
    changed = moved(before, weights)
    assert not {name for name in changed if name.rpartition(".")[0] in norms}
    assert {"features.0.0.weight", "classifier.3.weight"} <= changed
    torchvision.models.get_model(NETWORK, num_classes=3).load_state_dict(weights)


@pytest.mark.parametrize(
    ("model", "last"), [(NETWORK, "classifier.3"), ("timm/test_resnet", "fc")], ids=str
)
def test_a_frozen_backbone_trains_the_last_layer_alone(pictures, model, last):
    before = initial_state(model=model)
    head = {f"{last}.weight", f"{last}.bias"}
    _, weights = run(pictures, "--fuse", "--freeze-backbone", model=model)
    changed = moved(before, weights)
    assert {name for name in changed if not is_statistic(name)} == head
    assert changed - head == {name for name in before if is_statistic(name)}
    _, weights = run(pictures, "--fuse", "--freeze-backbone", "--freeze-norms", model=model)
    assert moved(before, weights) == head


def test_pretrained_weights_are_used_or_their_absence_is_said(pictures, capsys):
    frozen = ["--freeze-backbone", "--freeze-norms", "--fuse"]
    random, random_weights = run(pictures, *frozen)
    capsys.readouterr()
    results, weights = run(pictures, *frozen, "--pretrained")
    printed = capsys.readouterr().out
    assert f"No weights of {NETWORK} to be had, so they start at random: <urlopen error" in printed
    assert results["pretrained"] is False
    assert results["history"] == random["history"]
    assert not moved(random_weights, weights)

    torch.manual_seed(5)
    published = torchvision.models.get_model(NETWORK).state_dict()
    url = torchvision.models.get_model_weights(NETWORK).DEFAULT.url
    path = Path("torch/hub/checkpoints", url.rpartition("/")[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(published, path)
    results, weights = run(pictures, *frozen, "--pretrained")
    assert "at random" not in capsys.readouterr().out
    assert results["pretrained"] is True
    assert weights["classifier.3.weight"].shape == (3, 1024)
    last = {"classifier.3.weight", "classifier.3.bias"}
    assert moved({**published, **{n: weights[n] for n in last}}, weights) == set()


def test_networks_with_further_outputs_train_on_their_logits():
    options = finetune.parse_options([".", "--model=googlenet"])
    with pytest.warns(FutureWarning, match="initialization"):
        model, last = finetune.make_model(options, 4, pretrained=False)
    assert last is model.fc
    assert model.train()(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_a_fifth_of_each_class_is_held_out_whatever_the_seed(pictures):
    classes, train, test = image_folder.load_split(pictures, None)
    assert classes == CLASSES
    labels = train.dataset.targets
    assert [sum(labels[i] == label for i in test.indices) for label in range(3)] == [2, 2, 2]
    assert sorted([*train.indices, *test.indices]) == list(range(33))
    _, again_train, again_test = image_folder.load_split(pictures, 5)
    assert len({labels[i] for i in again_train.indices}) > 1
    assert set(again_train.indices) < set(train.indices)
    assert set(again_test.indices) < set(test.indices)
    assert (len(again_train), len(again_test)) == (5, 5)


@pytest.mark.parametrize("other", ["test", "val"])
def test_folders_for_both_parts_are_used_as_they_are(tmp_path, other):
    draw(tmp_path / "split" / "train", (3, 4))
    draw(tmp_path / "split" / other, (2, 1))
    classes, train, test = image_folder.load_split(tmp_path / "split", None)
    assert classes == ["blue", "green"]
    assert (len(train), len(test)) == (7, 3)
    assert {Path(path).parts[-3] for path, _ in test.dataset.samples} == {other}


def test_loaders_drop_a_last_batch_of_one_and_normalise(tmp_path):
    for name in "ab":
        (tmp_path / "white" / name).mkdir(parents=True)
        for index in range(5 if name == "a" else 6):
            path = tmp_path / "white" / name / f"{index}.png"
            Image.new("RGB", (9, 9), "white").save(path)
    options = ["--device=cpu", "--workers=0", "--image-size=16", "-b=4"]
    options = finetune.parse_options([str(tmp_path / "white"), *options])
    _, train, test = image_folder.load_split(options.folder, None)
    model = timm.create_model("test_resnet")
    assert model.pretrained_cfg["mean"] == model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    loaders = finetune.make_loaders(train, test, model, options)
    assert len(train) == 9
    assert [len(labels) for _, labels in loaders[0]] == [4, 4]
    for loader in loaders:
        for images, _ in loader:
            torch.testing.assert_close(images, torch.ones_like(images))
    (images, _), *_ = finetune.make_loaders(train, test, torch.nn.Identity(), options)[1]
    assert images[0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("gone", ["FOLDER", "existing folder", "'gone'"]),
        ("empty", ["FOLDER: expected images in empty/<class>", "class folder"]),
        ("hollow", ["FOLDER: expected images in hollow/<class>", "no valid file"]),
        ("one", ["FOLDER: expected two classes or more in one", "'blue'"]),
        ("single", ["FOLDER: expected two images or more of each class", "'green'"]),
        ("unequal", ["FOLDER: expected the same classes in train and val, not so: green"]),
        ("broken", ["FOLDER: expected an image in broken/", "bad.png"]),
        ("good --model resnet19", ["--model", "'resnet19'", "resnet18"]),
        ("good --model timm/resnet19", ["--model", "timm/resnet18"]),
        ("good --model timm/test_resnet.none", ["--model", "timm/test_resnet.r160_in1k"]),
        ("good --model squeezenet1_0", ["--model", "batch norms", "squeezenet1_0"]),
        ("good --model densenet121 --image-size 8", ["--image-size", "densenet121", "not 8"]),
        ("good --batch-size 1", ["--batch-size", "from 2", "'1'"]),
        ("good --limit 1", ["--limit", "from 2", "'1'"]),
        ("good --lr 0", ["--lr", "above 0", "'0'"]),
        ("good --output-dir file", ["--output-dir", "file"]),
    ],
)
def test_finetune_reports_bad_input_in_one_line(tmp_path, capsys, options, expected):
    folder, *options = options.split()
    draws = {"one": [(4,)], "single": [(4, 1)], "good": [(4, 4)], "broken": [(4, 4)]}
    for counts in draws.get(folder, []):
        draw(tmp_path / folder, counts)
    if folder in ("empty", "hollow"):
        (tmp_path / folder / ("" if folder == "empty" else "cats")).mkdir(parents=True)
    if folder == "unequal":
        draw(tmp_path / folder / "train", (2, 2))
        draw(tmp_path / folder / "val", (2,))
    if folder == "broken":
        for index in range(8):
            (tmp_path / folder / "blue" / f"{index}bad.png").write_bytes(b"\x89PNG")
    Path("file").write_text("")
    model = [] if "--model" in options else ["--model=timm/test_resnet"]
    fixed = ["--device=cpu", "--workers=0", "--image-size=32", *model]
    try:
        status = finetune.main([folder, *fixed, "--output-dir=out", *options])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finetune.py: error: ")
    for part in expected:
        assert part in line
    assert not Path("out").exists() or folder == "broken"
    assert not [*tmp_path.rglob("*.pt"), *tmp_path.rglob("results.json")]


def test_a_damaged_image_in_another_process_is_one_line_too(pictures):
    for path in (pictures / "red").iterdir():
        path.write_bytes(b"no image")
    command = [sys.executable, "-W", "error", EXAMPLES / "finetune.py", pictures, "--device=cpu"]
    options = ["--model=mobilenet_v3_small", "--image-size=32", "--workers=1", "--fuse"]
    done = subprocess.run(
        [*map(str, command), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"finetune.py: error: FOLDER: expected an image in {pictures}/red"
    )
    assert len(done.stderr.splitlines()) == 1

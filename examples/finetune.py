"""Fine-tunes a network of torchvision's or timm's on a folder of images, with fused batch norm.

    python examples/finetune.py pictures --fuse                     # a new resnet18
    python examples/finetune.py pictures --fuse --pretrained        # with ImageNet's weights
    python examples/finetune.py pictures --fuse --pretrained --freeze-norms
    python examples/finetune.py pictures --model timm/efficientnet_b0

The folder holds a folder of images for each class, or train/<class>/ and test/<class>/ (or val/).
If it has no such parts, a fifth of each class, always the same, is held out for testing. If weights
can't be downloaded, the program says so and starts from random ones. Runs with the same seed and
number of workers give the same results, with --fuse and without. The program writes weights.pt (a
state_dict that the network loads whether it is fused or not), curves.png and results.json to
--output-dir.
"""

import argparse
import difflib
import os
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from command_line import (
    Parser,
    UserError,
    default_device,
    device,
    folder,
    integer,
    learning_rate,
    make_output_dir,
)
from image_folder import load_split
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from results import align, device_name, plain_options, stand_in_for_kernels, tidy, write_json
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import fastbn

Loaders = tuple[DataLoader, DataLoader]  # the first is for training, the second for testing

# torchvision's networks expect images normalised by the mean and deviation of ImageNet's pixels.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model_name(text: str) -> str:
    known = torchvision.models.list_models(module=torchvision.models)
    if text.startswith("timm/"):
        try:
            import timm
        except ImportError:
            message = f"expected timm for {text!r}, but it isn't installed: pip install timm"
            raise argparse.ArgumentTypeError(message) from None
        known = [f"timm/{name}" for name in timm.list_models() + timm.list_pretrained()]
    if text not in known:
        like = difflib.get_close_matches(text, known)
        raise argparse.ArgumentTypeError(
            f"expected a network of torchvision's, or timm/ and the name of one of timm's, not"
            f" {text!r}" + (f"; similar: {', '.join(like)}" if like else "")
        )
    return text


def parse_options(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(
        prog="finetune.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=folder, help="holds <class>/, or train and test (or val)")
    add("--model", type=model_name, default="resnet18", help="NAME or timm/NAME, default: resnet18")
    add("--pretrained", action="store_true", help="start from the library's weights")
    add("--fuse", action="store_true", help="compute norms, activations and additions together")
    add("--freeze-norms", action="store_true", help="fix the statistics and parameters of norms")
    add("--freeze-backbone", action="store_true", help="train the last layer only")
    add("--epochs", type=integer(1), default=5, metavar="N", help="default: 5")
    # Batch norm needs at least two images to compute a variance.
    add("-b", "--batch-size", type=integer(2), default=32, metavar="N", help="default: 32")
    add("--lr", type=learning_rate, default=3e-4, help="learning rate of AdamW, default: 0.0003")
    add("--image-size", type=integer(8, 4096), default=224, metavar="N", help="default: 224")
    add("--limit", type=integer(2), metavar="N", help="use only N images, and N for testing")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="default: 0")
    add("--device", type=device, help="default: a GPU if there is one, else cpu")
    workers = min(os.cpu_count() or 1, 4)
    add("--workers", type=integer(0, 256), default=workers, help="processes that read images")
    add("--output-dir", type=Path, default=Path("runs/finetune"), help="default: runs/finetune")
    options = parser.parse_args(argv)
    options.device = options.device or default_device()
    return options


def make_loaders(train: Subset, test: Subset, model: nn.Module, options: Namespace) -> Loaders:
    # timm's networks have a `pretrained_cfg`.
    size, config = options.image_size, getattr(model, "pretrained_cfg", {})
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config.get("mean", MEAN), config.get("std", STD)),
    ]
    augment = [v2.RandomResizedCrop(size, scale=(0.5, 1)), v2.RandomHorizontalFlip()]
    train.dataset.transform = v2.Compose([*augment, *to_tensor])
    test.dataset.transform = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *to_tensor])
    shared = {
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "persistent_workers": options.workers > 0,
        "pin_memory": options.device.type == "cuda",
    }
    generator = torch.Generator().manual_seed(options.seed)
    # A last batch of one image is left out: where the image has shrunk to one pixel, the batch has
    # no variance.
    alone = len(train) % options.batch_size == 1
    return (
        DataLoader(train, shuffle=True, drop_last=alone, generator=generator, **shared),
        DataLoader(test, **shared),
    )


def make_model(options: Namespace, classes: int, pretrained: bool) -> tuple[nn.Module, nn.Module]:
    """Returns a network with a new last layer for the classes, and that layer."""
    torch.manual_seed(options.seed)
    if options.model.startswith("timm/"):
        import timm

        model = timm.create_model(options.model.removeprefix("timm/"), pretrained=pretrained)
    else:
        weights = "DEFAULT" if pretrained else None
        model = torchvision.models.get_model(options.model, weights=weights)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"--model: expected a network with batch norms, not {options.model}")
    return model, replace_last_layer(model, classes)


def replace_last_layer(model: nn.Module, classes: int) -> nn.Module:
    if hasattr(model, "reset_classifier"):  # timm's networks do it themselves
        model.reset_classifier(classes)
        last = model.get_classifier()
        return nn.ModuleList(last) if isinstance(last, tuple) else last
    # In training GoogLeNet and Inception would return more than the logits.
    if hasattr(model, "aux_logits"):
        model.aux_logits = False
    path, last = [found for found in model.named_modules() if isinstance(found[1], nn.Linear)][-1]
    model.set_submodule(path, nn.Linear(last.in_features, classes))
    return model.get_submodule(path)


def build_model(options: Namespace, classes: int) -> tuple[nn.Module, nn.Module, bool]:
    """Returns the network, its last layer, and whether the weights are the library's."""
    if options.pretrained:
        try:
            return *make_model(options, classes, pretrained=True), True
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            print(f"No weights of {options.model} to be had, so they start at random: {reason}")
    return *make_model(options, classes, pretrained=False), False


def check_image_size(model: nn.Module, options: Namespace) -> None:
    size = options.image_size
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--image-size: expected a size that {options.model} takes, not {size}: {reason}"
        ) from None


def run_epoch(
    model: nn.Module,
    batches: DataLoader,
    device: torch.device,
    title: str,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[float, float]:
    """Returns the mean loss and the accuracy, and trains the network if there is an optimizer."""
    training = optimizer is not None
    model.train(training)
    total, right, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    with torch.set_grad_enabled(training):
        for images, labels in tqdm(batches, desc=title, unit="batch", leave=False, disable=None):
            images, labels = images.to(device, non_blocking=True), labels.to(device)
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.detach() * len(labels)
            right += (logits.argmax(dim=1) == labels).sum()
            seen += len(labels)
    return total.item() / seen, right.item() / seen


def train(model: nn.Module, loaders: Loaders, options: Namespace) -> list[dict]:
    """Trains the network, saves its weights after each epoch, and returns a row for each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    history = []
    for epoch in range(1, options.epochs + 1):
        title, start = f"epoch {epoch}/{options.epochs}", time.perf_counter()
        loss, accuracy = run_epoch(model, loaders[0], options.device, title, optimizer)
        row = {"epoch": epoch, "train_loss": loss, "train_accuracy": accuracy}
        row["seconds"] = time.perf_counter() - start
        loss, accuracy = run_epoch(model, loaders[1], options.device, "testing")
        history.append({**row, "test_loss": loss, "test_accuracy": accuracy})
        torch.save(model.state_dict(), options.output_dir / "weights.pt")
        print(f"{title}: test loss {loss:.3f}, test accuracy {accuracy:.1%}", flush=True)
    return history


def table(history: list[dict]) -> str:
    rows = [("epoch", "loss", "accuracy", "test loss", "test accuracy", "s/epoch")]
    form = "{epoch}|{train_loss:.3f}|{train_accuracy:.1%}|{test_loss:.3f}|{test_accuracy:.1%}"
    rows += [(form + "|{seconds:.1f}").format(**row).split("|") for row in history]
    return align(rows)


def draw_curves(path: Path, title: str, history: list[dict]) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    epochs = [row["epoch"] for row in history]
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for part, color in (("train", "dimgray"), ("test", "tab:purple")):
            values = [row[f"{part}_{key}"] for row in history]
            axes.plot(epochs, values, color=color, marker="o", markersize=4, label=part)
        axes.set(title=key, xlabel="epoch")
        tidy(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def finetune(options: Namespace) -> None:
    classes, train_images, test_images = load_split(options.folder, options.limit)
    model, last_layer, pretrained = build_model(options, len(classes))
    check_image_size(model, options)
    make_output_dir(options.output_dir)
    loaders = make_loaders(train_images, test_images, model, options)

    model.to(options.device)
    if options.freeze_backbone:
        # The running statistics still follow the images, unless --freeze-norms fixes them.
        model.requires_grad_(False)
        last_layer.requires_grad_(True)
    if options.freeze_norms:
        fastbn.freeze(model)
    if options.fuse:
        fastbn.fuse(model)
    explanation = fastbn.explain(model)

    count = f"{len(train_images):,} images to train on and {len(test_images):,} to test on"
    title = f"{options.model} on {options.folder.resolve().name}, {len(classes)} classes, {count}"
    print(f"{title}, {options.device}\n{explanation}")
    history = train(model, loaders, options)

    results = {
        "options": plain_options(options),
        "pretrained": pretrained,
        "classes": classes,
        "train_images": len(train_images),
        "test_images": len(test_images),
        "norms": Counter(explanation.kinds.values()),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "history": history,
    }
    write_json(options.output_dir / "results.json", results)
    draw_curves(options.output_dir / "curves.png", title, history)
    print(f"\n{table(history)}")
    who = stand_in_for_kernels(options.device)
    if who and explanation.kinds:
        print(f"{who} computed the fused norms: the time says nothing of fastbn's kernels.")
    print(f"weights.pt, curves.png and results.json are in {options.output_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    try:
        finetune(options)
    except UserError as error:
        # An error in a process that reads images arrives with a traceback before its text.
        message = str(error).rpartition("UserError: ")[2].strip()
        print(f"finetune.py: error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

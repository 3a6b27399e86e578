"""Trains on CIFAR-10 with batch norm and without, and compares accuracy, speed and memory.

    python examples/train_cifar.py                               # no norm against fastbn
    python examples/train_cifar.py --norm none torch fused       # and PyTorch's own batch norm
    python examples/train_cifar.py --model gap --augment         # another network; resnet18 too
    python examples/train_cifar.py --data-path pictures          # train/<class>/, test/<class>/
    python examples/train_cifar.py --resume runs/cifar --epochs 20
    python examples/train_cifar.py --resume runs/cifar/fused.pt --norm fused --test-only
    torchrun --nproc-per-node 2 examples/train_cifar.py --sync-bn  # on two GPUs, or a CPU's cores

Without --data-path it looks for CIFAR-10 in data/ or downloads it there. If that isn't possible, it
trains on a procedural stand-in and says so. Every network starts from the same weights and sees the
same batches, with the same augmentation, in the same order: only the norm differs. Processes that
torchrun starts share each batch, and with --sync-bn its statistics too, so that they compute what
one process does. The program writes a checkpoint for each norm, metrics.json and curves.png to
--output-dir.
"""

import argparse
import gc
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cifar_results
import processes
import torch
import torch.nn.functional as F
from cifar_data import Data, Split, load_data, train_batches, val_batches
from cifar_models import MODELS, NORMS, build_model
from cifar_results import History, load_checkpoint, load_checkpoints, save_checkpoint
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
from results import stand_in_for_kernels
from torch import nn
from tqdm import tqdm

import fastbn

AMP_DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train_cifar.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", nargs="+", choices=NORMS, default=["none", "fused"], help="default: none fused")
    add("--model", choices=MODELS, default="cnn", help="default: cnn")
    add("--data-path", type=folder, help="holds cifar-10-batches-py, or <train|test>/<class>/...")
    add("--max-train-samples", type=integer(2), metavar="N", help="train on only N of the images")
    add("--augment", action="store_true", help="random flips, rotations by up to 36 degrees, crops")
    add("--epochs", type=integer(1), default=10, metavar="N", help="default: 10, resumed included")
    # Batch norm needs at least two images to compute a variance.
    add("-b", "--batch-size", type=integer(2), default=128, metavar="N", help="default: 128")
    add("--lr", type=learning_rate, default=1e-3, help="learning rate of Adam, default: 0.001")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="default: 0")
    add("--device", type=device, help="default: a GPU if there is one, else cpu")
    add("--amp", choices=("off", "fp16", "bf16"), default="off", help="mixed precision")
    add("--channels-last", action="store_true", help="keep images and weights in NHWC order")
    add("--compile", action="store_true", help="run the networks through torch.compile")
    add("--sync-bn", action="store_true", help="norms share statistics between processes")
    workers = os.cpu_count() or 1
    add("--workers", type=integer(0), default=workers, help="threads that decode an image folder")
    add("--output-dir", type=Path, default=Path("runs/cifar"), help="default: runs/cifar")
    add("--resume", type=Path, metavar="PATH", help="an earlier --output-dir, or one checkpoint")
    add("--test-only", action="store_true", help="validate what --resume names, write nothing")
    options = parser.parse_args(argv)
    options.norm = list(dict.fromkeys(options.norm))
    options.device = options.device or default_device()
    if options.test_only and not options.resume:
        parser.error("argument --test-only: expected --resume with the checkpoints to validate")
    return options


def autocast(options: Namespace) -> torch.autocast:
    dtype = AMP_DTYPES[options.amp]
    return torch.autocast(options.device.type, dtype=dtype, enabled=dtype is not None)


def layout(options: Namespace) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.contiguous_format


def train_one_epoch(
    net: nn.Module,
    split: Split,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    options: Namespace,
    title: str,
    epoch: int,
) -> dict[str, float]:
    net.train()
    total, seen, start = torch.zeros((), device=options.device), 0, time.perf_counter()
    quiet = True if processes.rank() else None
    # The seed depends on the epoch, so a resumed run sees what an uninterrupted one would have.
    seed = options.seed * 1_000_000 + epoch
    batches = train_batches(split, options.batch_size, seed, options.augment)
    with tqdm(total=len(split[1]), desc=title, unit="img", leave=False, disable=quiet) as bar:
        for step, (images, labels) in enumerate(batches):
            count = len(labels)
            images, labels = processes.own_part(images), processes.own_part(labels)
            images = images.contiguous(memory_format=layout(options))
            with autocast(options):
                loss = F.cross_entropy(net(images), labels, reduction="sum") / count
            # DistributedDataParallel takes the mean of the processes' gradients, which then is the
            # gradient of the whole batch.
            loss = loss * processes.size()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            total += loss.detach() / processes.size() * count
            seen += count
            bar.update(count)
            if step % 20 == 0:  # reading the loss waits for the GPU, so it is read seldom
                bar.set_postfix(loss=f"{loss.item():.3f}")
    train_loss = (
        processes.total(total).item() / seen
    )  # waits for the GPU, so the clock stops after the last step
    seconds = time.perf_counter() - start
    return {"train_loss": train_loss, "seconds": seconds, "images_per_second": seen / seconds}


@torch.no_grad()
def evaluate(
    net: nn.Module, split: Split, options: Namespace, shared: bool = False
) -> dict[str, float]:
    """Scores a network; if ``shared``, each process scores a part of the images."""
    net.eval()
    count = len(split[1])
    if shared:
        split = processes.own_part(split[0]), processes.own_part(split[1])
    loss = torch.zeros((), device=options.device)
    right = torch.zeros((), device=options.device)
    for images, labels in val_batches(split, options.batch_size):
        images = images.contiguous(memory_format=layout(options))
        with autocast(options):
            logits = net(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        right += (logits.argmax(dim=1) == labels).sum()
    if shared:
        loss, right = processes.total(loss), processes.total(right)
    return {"val_loss": loss.item() / count, "val_accuracy": right.item() / count}


def prepare_model(norm: str, classes: int, options: Namespace) -> nn.Module:
    model = build_model(options.model, norm, classes, options.seed)
    if options.sync_bn:
        convert = nn.SyncBatchNorm if norm == "torch" else fastbn
        model = convert.convert_sync_batchnorm(model)
    return model.to(options.device, memory_format=layout(options))


def train(norm: str, data: Data, options: Namespace, checkpoint: dict[str, Any] | None) -> History:
    """Trains one network to the end, and saves it after each epoch."""
    model = prepare_model(norm, len(data.classes), options)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    # fp16 can't hold small gradients. The scaler multiplies the loss, and divides gradients later.
    scaler = torch.amp.GradScaler(options.device.type, enabled=options.amp == "fp16")
    history: History = []
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["lr"] = options.lr  # --lr counts, not the saved rate
        if checkpoint["scaler"]:  # it is empty without fp16
            scaler.load_state_dict(checkpoint["scaler"])
        history = checkpoint["history"]

    net = torch.compile(model) if options.compile else model
    parallel = processes.parallel(net)
    for epoch in range(len(history) + 1, options.epochs + 1):
        title = f"{norm} {epoch}/{options.epochs}"
        row = train_one_epoch(parallel, data.train, optimizer, scaler, options, title, epoch)
        history.append({"epoch": epoch, **row, **evaluate(net, data.val, options, shared=True)})
        path = options.output_dir / f"{norm}.pt"
        if processes.rank() == 0:
            save_checkpoint(path, options, norm, data.classes, history, model, optimizer, scaler)
        print(
            "{0:<12} training loss {train_loss:.3f}, validation loss {val_loss:.3f}, accuracy"
            " {val_accuracy:.1%}, {images_per_second:,.0f} images/s".format(title, **history[-1]),
            flush=True,
        )
    return history


def check_saved(norm: str, data: Data, options: Namespace, expected: float) -> None:
    """Loads the checkpoint into a new network, which must score what the trained one did."""
    path = options.output_dir / f"{norm}.pt"
    accuracy = validate(norm, data, options, load_checkpoint(path))["val_accuracy"]
    # The scores may differ a little, since the GPU or the compiler may choose other kernels.
    if abs(accuracy - expected) > 0.005:
        raise RuntimeError(f"{path} scores {accuracy:.1%} instead of {expected:.1%}")
    print(f"{path}: loaded again, {accuracy:.1%}")


def validate(
    norm: str, data: Data, options: Namespace, checkpoint: dict[str, Any]
) -> dict[str, float]:
    model = prepare_model(norm, len(data.classes), options)
    model.load_state_dict(checkpoint["weights"])
    return evaluate(model, data.val, options)


def start_measuring_memory(device: torch.device) -> None:
    gc.collect()  # memory of the last network must not count as the next one's
    torch.compiler.reset()
    if device.type in ("cuda", "xpu"):
        torch.accelerator.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    on_gpu = device.type in ("cuda", "xpu")
    return torch.accelerator.max_memory_allocated(device) if on_gpu else None


def prepare(options: Namespace) -> tuple[dict[str, Any], Data]:
    """Loads checkpoints and data, and checks them before anything is written."""
    if options.sync_bn and "torch" in options.norm and options.device.type == "cpu":
        raise UserError(
            "--sync-bn: expected no torch in --norm, since nn.SyncBatchNorm doesn't train on a CPU"
        )
    checkpoints = load_checkpoints(options)
    if processes.rank():
        processes.wait_for_all()  # The first process may have to download the data.
    try:
        data = load_data(options.data_path, options.workers, options.max_train_samples)
    finally:
        if processes.rank() == 0:
            processes.wait_for_all()
    for norm, checkpoint in checkpoints.items():
        if checkpoint["classes"] != data.classes:
            raise UserError(
                f"--resume: the {norm} network was trained on the classes"
                f" {', '.join(checkpoint['classes'])}; expected {', '.join(data.classes)}"
            )
    if not options.test_only:
        make_output_dir(options.output_dir)
    return checkpoints, data


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    options.device = processes.join(options.device)
    try:
        return run(options)
    except UserError as error:
        if processes.rank() == 0:
            print(f"train_cifar.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        processes.leave()


def run(options: Namespace) -> int:
    checkpoints, data = prepare(options)
    shared = f", {processes.size()} processes" if processes.size() > 1 else ""
    print(f"{options.model} on {data}, {options.device}{shared}")
    data = data.to(options.device)

    if options.test_only:
        for norm, checkpoint in checkpoints.items():
            scores = validate(norm, data, options, checkpoint)
            print("{:<6} loss {val_loss:.3f}, accuracy {val_accuracy:.1%}".format(norm, **scores))
        return 0

    histories, memory = {}, {}
    for norm in options.norm:
        start_measuring_memory(options.device)
        histories[norm] = train(norm, data, options, checkpoints.get(norm))
        memory[norm] = peak_memory(options.device)
    if processes.rank():
        return 0
    norms = cifar_results.summarise(histories, memory)
    cifar_results.write_metrics(options.output_dir / "metrics.json", options, data, norms)
    cifar_results.draw_curves(options.output_dir / "curves.png", options.model, data, histories)
    print(f"\nValidation accuracy, {options.model} on {data}")
    print(cifar_results.table(norms))
    who = stand_in_for_kernels(options.device)
    if "fused" in norms and who:
        print(f"{who} computed the fused norm: its time says nothing of fastbn's kernels.")
    print(f"metrics.json, curves.png and the checkpoints are in {options.output_dir}")
    for norm, history in histories.items():
        check_saved(norm, data, options, history[-1]["val_accuracy"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

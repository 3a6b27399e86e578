"""The command line of train_cifar.py."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from cifar_models import MODELS, NORMS
from command_line import Parser, default_device, device, integer, learning_rate


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected an existing folder, not {text!r}")
    return Path(text)


def parse_options(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = Parser(
        prog="train_cifar.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", nargs="+", choices=NORMS, default=["none", "fused"], help="default: none fused")
    add("--model", choices=MODELS, default="cnn", help="default: cnn")
    add("--data-path", type=folder, help="holds cifar-10-batches-py, or <train|test>/<class>/...")
    add("--max-train-samples", type=integer(2), metavar="N", help="train on only N of the images")
    add("--augment", action="store_true", help="random flips, rotations by up to 36 degrees, crops")
    add("--epochs", type=integer(1), default=10, metavar="N", help="default: 10, resumed included")
    # Batch norm needs two images for a variance.
    add("-b", "--batch-size", type=integer(2), default=128, metavar="N", help="default: 128")
    add("--lr", type=learning_rate, default=1e-3, help="learning rate of Adam, default: 0.001")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="default: 0")
    add("--device", type=device, help="default: a GPU if there is one, else cpu")
    add("--amp", choices=("off", "fp16", "bf16"), default="off", help="mixed precision")
    add("--channels-last", action="store_true", help="keep images and weights in NHWC order")
    add("--compile", action="store_true", help="run the networks through torch.compile")
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

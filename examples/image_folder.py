"""Finds and splits images in folders for each class, and reports what is wrong with a folder.

Error messages begin with the argument of the command line that named the folder.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from command_line import UserError
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder


def read_image(path: str, argument: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            # A palette may hold transparency, which Pillow won't drop on the way to RGB.
            image = image.convert("RGBA") if image.mode == "P" else image
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a damaged file
        raise UserError(f"{argument}: expected an image in {path}") from None


def find_images(folder: Path, argument: str) -> ImageFolder:
    """Finds every image below ``folder/<class>/``."""
    try:
        return ImageFolder(folder, loader=partial(read_image, argument=argument))
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{argument}: expected images in {folder}/<class>: {reason}") from None


def find_parts(train: Path, test: Path, argument: str) -> tuple[ImageFolder, ImageFolder]:
    """Finds the images of two folders, which must have the same classes."""
    parts = find_images(train, argument), find_images(test, argument)
    odd = set(parts[0].classes) ^ set(parts[1].classes)
    if odd:
        raise UserError(
            f"{argument}: expected the same classes in {train.name} and {test.name}, not so:"
            f" {', '.join(sorted(odd))}"
        )
    return parts


def load_split(path: Path, limit: int | None) -> tuple[list[str], Subset, Subset]:
    """Returns the classes, the images to train on and those to test on."""
    others = [name for name in ("test", "val") if (path / name).is_dir()]
    if (path / "train").is_dir() and others:
        train, test = find_parts(path / "train", path / others[0], "FOLDER")
        chosen = range(len(train)), range(len(test))
    else:
        train = find_images(path, "FOLDER")
        test = copy.copy(train)  # each gets a transform of its own
        chosen = hold_out(train.targets, train.classes)
    if len(train.classes) < 2:
        only = train.classes[0]
        raise UserError(f"FOLDER: expected two classes or more in {path}, not only {only!r}")
    parts = (Subset(*part) for part in zip((train, test), (pick(c, limit) for c in chosen)))
    return train.classes, *parts


def hold_out(labels: list[int], classes: list[str]) -> tuple[list[int], list[int]]:
    """Returns indices of images to train on, and of a fifth of each class to test on."""
    train, test = [], []
    by_class = [[] for _ in classes]
    for index, label in enumerate(labels):
        by_class[label].append(index)
    for name, indices in zip(classes, by_class):
        if len(indices) < 2:
            raise UserError(f"FOLDER: expected two images or more of each class, not one {name!r}")
        indices, count = pick(indices), max(len(indices) // 5, 1)
        test += indices[:count]
        train += indices[count:]
    return train, test


def pick(indices: Sequence[int], limit: int | None = None) -> list[int]:
    """Returns up to ``limit`` of the indices in random order, always the same ones."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return [indices[i] for i in order[:limit].tolist()]

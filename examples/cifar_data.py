"""Loads images for train_cifar.py: CIFAR-10, a folder of images, or a stand-in drawn by formula.

A data set of 32x32 images fits in memory as bytes. It is decoded once and kept on the device, which
selects, augments and normalises a whole batch at a time.
"""

import math
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from command_line import UserError
from image_folder import find_parts
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from tqdm import tqdm

DOWNLOAD_FOLDER = Path("data")
BATCHES = CIFAR10.base_folder  # the folder's name, cifar-10-batches-py

SIZE = 32
STAND_IN = "procedural stand-in, not CIFAR-10"
STAND_IN_SIZES = 6_000, 2_000

Split = tuple[Tensor, Tensor]  # images, uint8 (N, 3, 32, 32), and labels, int64 (N,)


@dataclass(frozen=True)
class Data:
    label: str
    classes: list[str]
    train: Split
    val: Split

    def to(self, device: torch.device) -> "Data":
        train, val = (tuple(part.to(device) for part in split) for split in (self.train, self.val))
        return replace(self, train=train, val=val)

    def __str__(self) -> str:
        train, val = len(self.train[1]), len(self.val[1])
        return f"{self.label}: {train:,} training and {val:,} validation images"


def load_data(
    path: Path | None,
    workers: int,
    max_train_samples: int | None,
    download: Callable[[], Data | None] | None = None,
) -> Data:
    """Returns the data that ``--data-path`` asks for, or else what is downloaded, on the CPU."""
    data = load_path(path, workers) if path else (download or download_cifar10)() or stand_in()
    # The chosen images are always the same, but not the first ones: folders are sorted by class.
    order = torch.randperm(len(data.train[1]), generator=torch.Generator().manual_seed(0))
    chosen = order[:max_train_samples]
    return replace(data, train=(data.train[0][chosen], data.train[1][chosen]))


def load_path(path: Path, workers: int) -> Data:
    if (path / BATCHES).is_dir():
        try:
            return read_cifar10(UncheckedCIFAR10, path)
        except Exception as error:  # unpickling a damaged file may raise anything
            raise UserError(f"--data-path: cannot read {path / BATCHES}: {error}") from None
    if not ((path / "train").is_dir() and (path / "test").is_dir()):
        raise UserError(f"--data-path: expected {path} to hold {BATCHES}, or train and test")
    parts = find_parts(path / "train", path / "test", "--data-path")
    train, val = (read(part, workers) for part in parts)
    return Data(f"image folder {path.name}", parts[0].classes, train, val)


def read(dataset: ImageFolder, workers: int) -> Split:
    """Reads every image and brings it to 32x32."""
    paths, labels = zip(*dataset.samples, strict=True)
    title = f"reading {Path(dataset.root).name}"
    progress = {"desc": title, "unit": "img", "leave": False, "disable": None}

    def decode(path: str) -> np.ndarray:
        return np.asarray(dataset.loader(path).resize((SIZE, SIZE)))

    with ThreadPool(max(workers, 1)) as pool:
        images = list(tqdm(pool.imap(decode, paths, chunksize=64), total=len(paths), **progress))
    return to_channels_first(np.stack(images)), torch.tensor(labels)


def to_channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


class UncheckedCIFAR10(CIFAR10):
    """torchvision's CIFAR10 without the MD5 sums, so that a subset in the same format loads too."""

    train_list = [[name, None] for name, _ in CIFAR10.train_list]  # noqa: RUF012
    test_list = [[name, None] for name, _ in CIFAR10.test_list]  # noqa: RUF012
    meta = CIFAR10.meta | {"md5": None}


def read_cifar10(dataset: type[CIFAR10], root: Path, fetch: bool = False) -> Data:
    train, val = (dataset(str(root), train=train, download=fetch) for train in (True, False))
    splits = ((to_channels_first(part.data), torch.tensor(part.targets)) for part in (train, val))
    return Data("CIFAR-10", train.classes, *splits)


def download_cifar10() -> Data | None:
    """Returns CIFAR-10 from an earlier download or the network, or None if there is neither."""
    try:
        return read_cifar10(CIFAR10, DOWNLOAD_FOLDER)
    except RuntimeError:  # it is not there, or incomplete
        pass
    try:
        probe(CIFAR10.url)
        return read_cifar10(CIFAR10, DOWNLOAD_FOLDER, fetch=True)
    except (OSError, RuntimeError) as error:
        print(f"CIFAR-10 cannot be downloaded from {CIFAR10.url}: {error}")
        print(f"Using the {STAND_IN}. --data-path takes a folder of real images.")
        return None


def probe(url: str, seconds: float = 3) -> None:
    """Raises an OSError unless the server, or a proxy that is set, answers soon."""
    request = urllib.request.Request(url, method="HEAD")
    outcome: list[Exception | None] = [TimeoutError(f"no answer within {seconds} s")]

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                outcome[0] = None
        except OSError as error:
            outcome[0] = error
            if isinstance(error, urllib.error.HTTPError):
                error.close()

    # The request runs in a thread, because its timeout doesn't cover looking up the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome[0]:
        raise outcome[0]


def stand_in() -> Data:
    train, val = (draw_stand_in(count, seed) for seed, count in enumerate(STAND_IN_SIZES))
    return Data(STAND_IN, list(CLASSES), train, val)


def train_batches(split: Split, size: int, seed: int, augmented: bool) -> Iterator[Split]:
    """Yields one epoch in random order, in batches of ``size``, and leaves out a smaller rest.

    Order and augmentation come from a generator of their own on the CPU. So they are the same for
    every norm and on every device, whatever else draws random numbers.
    """
    images, labels = split
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    for chosen in order[: len(order) // size * size or None].split(size):
        batch = normalise(images[chosen])
        yield augment(batch, generator) if augmented else batch, labels[chosen]


def val_batches(split: Split, size: int) -> Iterator[Split]:
    for images, labels in zip(*(part.split(size) for part in split), strict=True):
        yield normalise(images), labels


def normalise(images: Tensor) -> Tensor:
    """Turns bytes to floats of about mean 0 and standard deviation 1 (CIFAR-10: 0.47 and 0.25)."""
    return (images.float() / 255 - 0.5) / 0.25


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half of the images, turns all by up to 36 degrees and shifts them by up to 4 pixels."""
    count = len(images)
    flip = 1 - 2 * torch.randint(2, (count,), generator=generator)
    angle = (2 * torch.rand(count, generator=generator) - 1) * math.pi / 5
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * 4 / (SIZE / 2)
    # `source` says where each output pixel comes from, so that one sampling step does everything.
    # Coordinates run from -1 to 1.
    rows = [
        torch.stack([angle.cos() * flip, -angle.sin(), shift[:, 0]], dim=1),
        torch.stack([angle.sin() * flip, angle.cos(), shift[:, 1]], dim=1),
    ]
    source = torch.stack(rows, dim=1).to(images.device)
    grid = F.affine_grid(source, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def disc(u: Tensor, v: Tensor) -> Tensor:
    return u.hypot(v) < 1


def square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) < 0.89  # 0.89 gives it the disc's area


def triangle(u: Tensor, v: Tensor) -> Tensor:
    return (v > -0.7) & (u.abs() * math.sqrt(3) + v < 1.4)


def ring(u: Tensor, v: Tensor) -> Tensor:
    return (u.hypot(v) - 0.8).abs() < 0.25


def cross(u: Tensor, v: Tensor) -> Tensor:
    return (torch.minimum(u.abs(), v.abs()) < 0.3) & (torch.maximum(u.abs(), v.abs()) < 1.1)


def star(u: Tensor, v: Tensor) -> Tensor:
    return u.hypot(v) < 0.8 + 0.4 * (5 * torch.atan2(v, u)).cos()


def stripes(u: Tensor, v: Tensor) -> Tensor:
    return disc(u, v) & ((6 * u).sin() > 0)


def checks(u: Tensor, v: Tensor) -> Tensor:
    return disc(u, v) & ((5 * u).sin() * (5 * v).sin() > 0)


def dots(u: Tensor, v: Tensor) -> Tensor:
    return disc(u, v) & ((7 * u).cos() + (7 * v).cos() > 0.6)


def spiral(u: Tensor, v: Tensor) -> Tensor:
    radius = u.hypot(v)
    return (radius < 1.1) & ((7 * radius + torch.atan2(v, u)).sin() > 0)


PATTERNS = (disc, square, triangle, ring, cross, star, stripes, checks, dots, spiral)
CLASSES = tuple(pattern.__name__ for pattern in PATTERNS)


def draw_stand_in(count: int, seed: int) -> Split:
    """Draws images of the stand-in, the same ones on every run.

    Every image shows one pattern of random size, angle, place, colour and contrast on a clouded,
    noisy background. Colour and brightness don't tell the class: a network has to learn shapes.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = torch.linspace(-1, 1, SIZE)
    y, x = axis.view(-1, 1), axis.view(1, -1)

    labels = torch.arange(count) % len(PATTERNS)
    # Each pattern is defined around (0, 0) with radius 1; (u, v) are the pixels seen from there.
    x, y = x - uniform(-0.3, 0.3, 1, 1), y - uniform(-0.3, 0.3, 1, 1)
    angle, scale = uniform(-1.0, 1.0, 1, 1), uniform(0.45, 0.85, 1, 1)
    u = (angle.cos() * x + angle.sin() * y) / scale
    v = (angle.cos() * y - angle.sin() * x) / scale
    pattern = torch.empty(count, SIZE, SIZE, dtype=torch.bool)
    for label, shape in enumerate(PATTERNS):
        chosen = labels == label
        pattern[chosen] = shape(u[chosen], v[chosen])

    clouds = F.interpolate(uniform(-1, 1, 3, 4, 4), size=SIZE, mode="bicubic")
    image = uniform(0.2, 0.8, 3, 1, 1) + 0.2 * clouds
    # The sign is drawn per channel, so that a pattern may be lighter, darker or of another hue.
    sign = uniform(-1, 1, 3, 1, 1).sign()
    image += sign * uniform(0.12, 0.45, 3, 1, 1) * pattern.unsqueeze(1)
    image += uniform(0.01, 0.05, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    image = 0.5 + uniform(0.2, 0.6, 1, 1, 1) * (image - 0.5)  # each image gets its own contrast
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels

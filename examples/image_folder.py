"""Folders of images with one folder a class, and what users get wrong about them.

Errors begin with the name of the command line's argument that named the folder.
"""

from functools import partial
from pathlib import Path

from command_line import UserError
from PIL import Image
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

"""The parts that the command lines of the examples share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch


class UserError(Exception):
    """An error that the user can put right, and that is shown as one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without the usage that argparse would put above it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected an existing folder, not {text!r}")
    return Path(text)


def integer(low: int, high: int = 10**9) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isdecimal() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, not {text!r}")

    return parse


def learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:  # no one needs more, and at 1e38 Adam's arithmetic overflows
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to 1e6, not {text!r}")
    return value


def device(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        message = f"expected a usable device, not {text!r}: {reason}"
        raise argparse.ArgumentTypeError(message) from None
    return torch.device(text)


def default_device() -> torch.device:
    """Returns the accelerator that PyTorch finds (CUDA or ROCm, XPU, MPS), or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def make_output_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{path}: {error.strerror}"
        raise UserError(f"--output-dir: expected a folder, not {reason}") from None

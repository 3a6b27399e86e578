"""Functions that all examples use for their results: tables, JSON, axes, names of devices."""

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

import fastbn


def align(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines, with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Replaces NaN and infinity, which the loss may be and JSON can't hold, by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_options(options: Namespace) -> dict[str, Any]:
    """Returns the options as JSON can hold them."""
    plain = int, float, str, list, type(None)
    return {k: v if isinstance(v, plain) else str(v) for k, v in vars(options).items()}


def tidy(axes: Axes) -> None:
    """Puts ticks at whole epochs only, and hides lines that show nothing."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stand_in_for_kernels(device: torch.device) -> str | None:
    """Returns the name of what computes fused norms, or None if a GPU's kernels do."""
    if fastbn.explain(None, torch.randn(2, 3, device=device)).backend == "torch":
        return "PyTorch"
    return "Triton's interpreter" if device.type == "cpu" else None

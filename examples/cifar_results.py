"""Writes and reads what a run of train_cifar.py leaves: checkpoints, tables, JSON and a picture."""

from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cifar_data import Data
from cifar_models import build_model
from command_line import UserError
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from results import align, device_name, plain_options, tidy, write_json
from torch import nn

History = list[dict[str, float]]  # one dict an epoch

LABELS = {
    "none": "no batch norm",
    "torch": "nn.BatchNorm",
    "fused": "FusedBatchNorm",
    "keras": "keras.layers",
    "fastbn": "fastbn.keras",
}
# The curves of a norm and of fastbn's should coincide. A thin line over a broad one shows both.
BROAD = {"color": "tab:green", "linewidth": 6, "markersize": 9, "alpha": 0.4}
THIN = {"color": "tab:purple", "zorder": 3}
LINES = {
    "none": {"color": "dimgray"},
    "torch": BROAD,
    "fused": THIN,
    "keras": BROAD,
    "fastbn": THIN,
}


def best(history: History) -> float:
    return max(row["val_accuracy"] for row in history)


def epochs_to_reach(history: History, accuracy: float) -> int | None:
    return next((row["epoch"] for row in history if row["val_accuracy"] >= accuracy), None)


def summarise(histories: dict[str, History], memory: dict[str, int | None]) -> dict[str, Any]:
    """Returns what the table shows and metrics.json holds, for each norm."""
    return {
        norm: {
            "best_val_accuracy": best(history),
            "final_val_accuracy": history[-1]["val_accuracy"],
            "epochs_to_reach_best_of": {
                other: epochs_to_reach(history, best(histories[other]))
                for other in histories
                if other != norm
            },
            # These are medians, because the first epoch may include compilation.
            "seconds_per_epoch": median(row["seconds"] for row in history),
            "images_per_second": median(row["images_per_second"] for row in history),
            "peak_memory_bytes": memory[norm],
            "history": history,
        }
        for norm, history in histories.items()
    }


def table(norms: dict[str, Any]) -> str:
    rows = [("norm", "best", "final", "reached the best of", "s/epoch", "images/s", "peak memory")]
    for norm, result in norms.items():
        reached = [
            f"{other} never" if epochs is None else f"{other} in epoch {epochs}"
            for other, epochs in result["epochs_to_reach_best_of"].items()
        ]
        memory = result["peak_memory_bytes"]
        rows.append(
            (
                norm,
                f"{result['best_val_accuracy']:.1%}",
                f"{result['final_val_accuracy']:.1%}",
                ", ".join(reached) or "-",
                f"{result['seconds_per_epoch']:.1f}",
                f"{result['images_per_second']:,.0f}",
                "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
            )
        )
    return align(rows)


def write_metrics(path: Path, options: Namespace, data: Data, norms: dict[str, Any]) -> None:
    metrics = {
        "data": data.label,
        "train_images": len(data.train[1]),
        "val_images": len(data.val[1]),
        "options": plain_options(options),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "norms": norms,
    }
    write_json(path, metrics)


def draw_curves(path: Path, model: str, data: Data, histories: dict[str, History]) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{model} on {data}")
    accuracy, loss = figure.subplots(1, 2)
    for norm, history in histories.items():
        epochs = [row["epoch"] for row in history]
        style = {"marker": "o", "markersize": 4, "label": LABELS[norm], **LINES[norm]}
        accuracy.plot(epochs, [row["val_accuracy"] for row in history], **style)
        loss.plot(epochs, [row["train_loss"] for row in history], **style)
    accuracy.set(title="validation accuracy", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    loss.set(title="training loss", xlabel="epoch", ylim=(0, None))
    for axes in (accuracy, loss):
        tidy(axes)
    accuracy.legend(frameon=False)
    figure.savefig(path, dpi=120)


# The keys of a checkpoint, which holds all that a run needs to go on as if it had never stopped.
KEYS = {"model", "norm", "classes", "history", "weights", "optimizer", "scaler"}


def save_checkpoint(
    path: Path,
    options: Namespace,
    norm: str,
    classes: list[str],
    history: list[dict[str, float]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    checkpoint = {
        "model": options.model,
        "norm": norm,
        "classes": classes,
        "history": history,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    torch.save(checkpoint, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--resume: expected a checkpoint at {path}: {error.strerror}") from None
    except Exception:  # torch.load fails in many ways on what is no checkpoint
        raise UserError(f"--resume: expected a checkpoint of train_cifar.py: {path}") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= KEYS:
        raise UserError(f"--resume: expected a checkpoint of train_cifar.py: {path}")
    return checkpoint


def load_checkpoints(options: Namespace) -> dict[str, dict[str, Any]]:
    """Returns the checkpoint of each norm that ``--resume`` names, if it fits the options."""
    path = options.resume
    if path is None:
        return {}
    if path.is_file() and len(options.norm) > 1:
        raise UserError(f"--resume: expected a folder, or one --norm to go with {path}")
    paths = {norm: path if path.is_file() else path / f"{norm}.pt" for norm in options.norm}
    checkpoints = {norm: load_checkpoint(path) for norm, path in paths.items()}
    for norm, checkpoint in checkpoints.items():
        check_fit(checkpoint, paths[norm], norm, options)
    return checkpoints


def check_fit(checkpoint: dict[str, Any], path: Path, norm: str, options: Namespace) -> None:
    model, trained_norm = checkpoint["model"], checkpoint["norm"]
    if model != options.model:
        raise UserError(f"--resume: expected a {options.model} in {path}, which holds a {model}")
    # "torch" and "fused" are the same network, and each can go on where the other stopped.
    if (trained_norm == "none") != (norm == "none"):
        raise UserError(f"--resume: expected norm {norm} in {path}, which holds {trained_norm}")
    try:
        network = build_model(model, norm, len(checkpoint["classes"]), seed=0)
        network.load_state_dict(checkpoint["weights"])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--resume: expected a {model} in {path}: {reason}") from None
    done = len(checkpoint["history"])
    if not options.test_only and done >= options.epochs:
        raise UserError(f"--epochs: expected more than the {done} that {path} has behind it")

"""Checkpoints of train_cifar.py: one file a norm, enough to go on as if never stopped."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from cifar_models import build_model
from command_line import UserError
from torch import nn

KEYS = {"model", "norm", "classes", "history", "weights", "optimizer", "scaler"}


def save(
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


def load(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--resume: expected a checkpoint at {path}: {error.strerror}") from None
    except Exception:  # torch.load fails in many ways on what is no checkpoint
        raise UserError(f"--resume: expected a checkpoint of train_cifar.py: {path}") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= KEYS:
        raise UserError(f"--resume: expected a checkpoint of train_cifar.py: {path}")
    return checkpoint


def load_all(options: Namespace) -> dict[str, dict[str, Any]]:
    """The checkpoint of each norm, known to fit the options."""
    path = options.resume
    if path is None:
        return {}
    if path.is_file() and len(options.norm) > 1:
        raise UserError(f"--resume: expected a folder, or one --norm to go with {path}")
    paths = {norm: path if path.is_file() else path / f"{norm}.pt" for norm in options.norm}
    checkpoints = {norm: load(path) for norm, path in paths.items()}
    for norm, checkpoint in checkpoints.items():
        fit(checkpoint, paths[norm], norm, options)
    return checkpoints


def fit(checkpoint: dict[str, Any], path: Path, norm: str, options: Namespace) -> None:
    model, trained_norm = checkpoint["model"], checkpoint["norm"]
    if model != options.model:
        raise UserError(f"--resume: expected a {options.model} in {path}, which holds a {model}")
    # "torch" and "fused" are the same network: each goes on where the other stopped.
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

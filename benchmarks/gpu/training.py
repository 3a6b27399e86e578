"""Measures ResNet-50's eager training step: images a second and peak memory by either norm."""

from __future__ import annotations

from dataclasses import asdict

from .. import train_step
from ..rivals import kernels_only
from .step import Context


def run(context: Context) -> None:
    batch, size = 256, 224
    if context.rehearse:
        batch, size = 2, 32
        # With so few images rounding soon decides where training goes, so only one loss counts.
        train_step.LAYERS, train_step.STEPS = (1, 1, 1, 1), 1
    with kernels_only(context.device):
        for row in train_step.compare(batch, size, context.device, compile=False):
            context.record("training", batch=batch, size=size, **asdict(row))

"""ResNet-50's training step, eager: images a second and peak memory with either batch norm."""

from __future__ import annotations

from dataclasses import asdict

from ..rivals import kernels_only
from ..train_step import compare
from .step import Context


def run(context: Context) -> None:
    batch, size = (2, 32) if context.rehearse else (256, 224)
    with kernels_only(context.device):
        for row in compare(batch, size, context.device, compile=False):
            context.record("training", batch=batch, size=size, **asdict(row))

"""Records names, versions, clocks at rest and under load, and the copy bandwidth."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict

import torch

from ..environment import environment
from ..timing import COPY_BYTES, copy_bandwidth
from .step import Context

CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

# So many copies keep the GPU busy for about a second, while its clocks are read.
LOAD = 1500


def run(context: Context) -> None:
    context.attempt("clocks at rest", lambda: _clocks(context, "at rest"))
    context.know(environment=environment(context.device))
    if context.device.type == "cuda":
        from fastbn.runtime.device import device_facts

        context.know(device=asdict(device_facts(torch.device("cuda", 0))))
    context.attempt(
        "copy bandwidth", lambda: context.know(bandwidth=copy_bandwidth(context.device))
    )
    context.attempt("clocks under load", lambda: _clocks_under_load(context))


def _clocks(context: Context, state: str) -> None:
    if context.device.type == "cpu" or shutil.which("nvidia-smi") is None:
        return
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    context.record("clocks", state=state, **dict(zip(CLOCKS, values)))


def _clocks_under_load(context: Context) -> None:
    if context.device.type == "cpu":
        return
    source = torch.randint(256, (COPY_BYTES["cuda"],), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(LOAD):
        target.copy_(source)
    _clocks(context, "under load")
    torch.cuda.synchronize()

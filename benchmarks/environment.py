"""Finds out the machine and the versions with which a figure is measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastbn


def environment(device: torch.device) -> dict:
    """Returns GPU, driver, versions and date, with None for what is not there."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "fastbn": fastbn.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "driver": driver_version(),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
            "memory_bytes": gpu.total_memory,
        }
    return found


def title(found: dict) -> str:
    """Returns the headline of table, plot and JSON, which says if a run was on a CPU."""
    if found["gpu"] is None:
        return f"fastbn {found['fastbn']}: a CPU run; no statement about any GPU"
    return f"fastbn {found['fastbn']} on {found['gpu']}"


def driver_version(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Returns the version of NVIDIA's driver, from nvidia-smi or else from the kernel module."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
            if answer.returncode == 0 and answer.stdout.strip():
                return answer.stdout.split()[0]
    if proc.exists():
        found = re.search(r"\d+\.\d+(\.\d+)?", proc.read_text())
        return found[0] if found else None
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

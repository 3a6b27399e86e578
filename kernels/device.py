"""What the planner knows of a device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """The facts of one device that launch decisions and predictions rest on.

    Attributes:
        name: as the driver gives it.
        sm_count: streaming multiprocessors (compute units on AMD).
        l2_bytes: size of the last-level cache, in bytes.
        bandwidth: device memory's, in bytes per second; None where unknown.
    """

    name: str
    sm_count: int
    l2_bytes: int
    bandwidth: float | None = None


# From the vendor's data sheet (SXM5, 80 GB).
H100 = Device("NVIDIA H100 80GB HBM3", sm_count=132, l2_bytes=50 * 2**20, bandwidth=3.35e12)

# Triton's interpreter runs programs one after the other: a few are enough to
# exercise the splits, and more only cost time.
INTERPRETER = Device("Triton interpreter", sm_count=1, l2_bytes=2**20)

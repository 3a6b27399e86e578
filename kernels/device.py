"""What the planner knows of a device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """The facts of one device that launch decisions and predictions rest on.

    From `l2_share` on they are assumptions, the same for all devices until
    `python -m benchmarks.report`, which measures most of them, has run on one.

    Attributes:
        name: as the driver gives it.
        sm_count: streaming multiprocessors (compute units on AMD).
        l2_bytes: size of the last-level cache, in bytes.
        bandwidth: device memory's, in bytes per second; None where unknown.
        l2_share: the fraction of the cache that can be counted on to hold what
            was read until it is read again, with other traffic passing through.
        l2_speed: bandwidth of the cache as a multiple of the memory's.
        sm_speed: what one multiprocessor can move, as a multiple of its share
            of the memory's bandwidth.
        row_rates: (bytes, fraction of the bandwidth) of reading rows so short
            from longer ones; longer than the last come at full speed.
        launch: seconds that a launch adds to the work: to start, to get up to
            speed, to run out.
        latency: seconds for a round trip to memory, or to a counter.
    """

    name: str
    sm_count: int
    l2_bytes: int
    bandwidth: float | None = None
    l2_share: float = 0.5
    l2_speed: float = 2.0
    sm_speed: float = 4.0
    row_rates: tuple[tuple[int, float], ...] = ((32, 0.5), (64, 0.8), (128, 0.9))
    launch: float = 2e-6
    latency: float = 0.7e-6

    def row_rate(self, row_bytes: int) -> float:
        """Fraction of the bandwidth at which rows of this length are read."""
        return next((rate for length, rate in self.row_rates if row_bytes <= length), 1.0)


MIB = 2**20

# From the vendors' data sheets. AMD's last-level cache is the Infinity Cache.
H100 = Device("NVIDIA H100 80GB HBM3", 132, 50 * MIB, 3.35e12)
H200 = Device("NVIDIA H200", 132, 50 * MIB, 4.8e12)
A100 = Device("NVIDIA A100-SXM4-80GB", 108, 40 * MIB, 2.039e12)
L4 = Device("NVIDIA L4", 58, 48 * MIB, 0.3e12)
RTX_4090 = Device("NVIDIA GeForce RTX 4090", 128, 72 * MIB, 1.008e12)
B200 = Device("NVIDIA B200", 148, 126 * MIB, 8.0e12)
MI300X = Device("AMD Instinct MI300X", 304, 256 * MIB, 5.3e12)

DEVICES = (H100, H200, A100, L4, RTX_4090, B200, MI300X)

# Triton's interpreter runs programs one after the other: a few are enough to
# exercise the splits, and more only cost time.
INTERPRETER = Device("Triton interpreter", sm_count=1, l2_bytes=MIB)

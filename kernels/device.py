"""The facts of devices that the planner uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """The facts of one device on which launch decisions and predictions rest.

    The attributes from `l2_share` on are assumptions. They are the same for all
    devices until `python -m benchmarks.gpu`, which measures most of them, has run
    on one.

    Attributes:
        name: the device's name, as the driver gives it.
        sm_count: number of streaming multiprocessors (compute units on AMD).
        l2_bytes: size of the last-level cache, in bytes.
        bandwidth: bandwidth of device memory, in bytes per second; None if unknown.
        l2_share: the fraction of the cache that holds data from one read to the
            next while other traffic passes through.
        l2_speed: bandwidth of the cache, as a multiple of the memory's bandwidth.
        sm_speed: the bandwidth that one multiprocessor can use, as a multiple of
            its share of the memory's bandwidth.
        row_rates: pairs (bytes, fraction of the bandwidth): the rate at which pieces
            up to this length are read from longer rows. Pieces longer than the last
            are read at full bandwidth.
        launch: seconds that a launch adds to the work, to start, to reach full
            speed and to drain.
        latency: seconds for a round trip to memory.
        cache_latency: seconds for a round trip to the cache, where counters are.
        issues: instructions of single threads that a multiprocessor issues in a second:
            three quarters of the most that four schedulers can at 1.7 GHz.
        tile_bytes: bytes of a tile of one tensor.
        ticket: seconds that each ticket takes at least, since a counter serves one
            program at a time.
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
    cache_latency: float = 0.35e-6
    issues: float = 0.75 * 4 * 32 * 1.7e9
    tile_bytes: int = 4096
    ticket: float = 1e-9

    def row_rate(self, row_bytes: int) -> float:
        """Returns the fraction of the bandwidth at which rows of this length are read."""
        return next((rate for length, rate in self.row_rates if row_bytes <= length), 1.0)


MIB = 2**20

# These numbers are from the vendors' data sheets. AMD's last-level cache is the Infinity Cache.
H100 = Device("NVIDIA H100 80GB HBM3", 132, 50 * MIB, 3.35e12)
H200 = Device("NVIDIA H200", 132, 50 * MIB, 4.8e12)
A100 = Device("NVIDIA A100-SXM4-80GB", 108, 40 * MIB, 2.039e12)
L4 = Device("NVIDIA L4", 58, 48 * MIB, 0.3e12)
RTX_4090 = Device("NVIDIA GeForce RTX 4090", 128, 72 * MIB, 1.008e12)
B200 = Device("NVIDIA B200", 148, 126 * MIB, 8.0e12)
MI300X = Device("AMD Instinct MI300X", 304, 256 * MIB, 5.3e12)

DEVICES = (H100, H200, A100, L4, RTX_4090, B200, MI300X)

# Triton's interpreter runs programs one after the other. A few programs and small tiles exercise
# runs and splits on small inputs, and more would only cost time. Without latencies and a limit of
# instructions, only traffic and launches decide between strategies.
INTERPRETER = Device(
    "Triton interpreter", sm_count=1, l2_bytes=4 * MIB, latency=0.0, cache_latency=0.0,
    issues=float("inf"), tile_bytes=1024,
)  # fmt: skip

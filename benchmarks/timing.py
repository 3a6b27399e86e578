"""Times calls by CUDA events on a GPU or by the host's clock, as medians over many rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

# The rounds of a measurement should take WINDOW seconds in all, and ROUNDS has the least and the
# largest number of rounds.
WINDOW = 0.08
ROUNDS = (10, 200)

COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


@dataclass(frozen=True)
class Timing:
    """A median in seconds, and the interquartile range as a fraction of the median."""

    median: float
    spread: float


class CudaClock:
    """Records events in the stream, so that the host waits only when the laps are read."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps(self) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._marks)]


class HostClock:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        return [end - start for start, end in pairwise(self._marks)]


Clock = type[CudaClock] | type[HostClock]


def clock_of(device: torch.device) -> Clock:
    return CudaClock if device.type == "cuda" else HostClock


def time_rounds(play: Callable[[], object], calls: int, clock: Clock) -> Timing:
    """Times `play`, which makes so many calls, and returns the timing of one call."""

    def laps(rounds: int) -> list[float]:
        ticking = clock()
        ticking.mark()
        for _ in range(rounds):
            play()
            ticking.mark()
        return ticking.laps()

    few, many = ROUNDS
    laps(1)  # the first call allocates memory and workspaces
    # The rounds that find out how many to make are also the warm-up.
    rounds = min(many, max(few, int(WINDOW / statistics.median(laps(3)))))
    low, median, high = statistics.quantiles([lap / calls for lap in laps(rounds)], n=4)
    return Timing(median, (high - low) / median)


@lru_cache
def _capture_stream() -> torch.cuda.Stream:
    """Returns one stream for all captures, so that what each stream needs is set up once."""
    return torch.cuda.Stream()


def captured(play: Callable[[], object]) -> Callable[[], None]:
    """Returns `play` as one CUDA graph, which runs without gaps between launches.

    Raises:
        Exception: whatever the capture of something that can't be captured raises.
    """
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the stream even if the capture fails when it ends.
    with torch.cuda.stream(stream):
        play()
        with torch.cuda.graph(graph, stream=stream):
            play()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Returns the bytes read and written per second by a large copy within the device's memory."""
    size = COPY_BYTES[device.type]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_rounds(lambda: target.copy_(source), 1, clock_of(device))
    return 2 * size / timing.median


def peak_memory(step: Callable[[], object]) -> int:
    """Returns the bytes of GPU memory that a step needs on top of what was allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before

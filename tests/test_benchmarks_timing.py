"""Tests the rounds that benchmarks/ times, and the statistics of their times."""

import math

import pytest

from benchmarks import timing

from .test_benchmarks_cases import CPU


class FakeClock:
    """A clock whose laps take 2, 4, ... 14 seconds, again and again."""

    def __init__(self):
        self.marks = 0

    def mark(self):
        self.marks += 1

    def laps(self):
        return [2.0 * (1 + index % 7) for index in range(self.marks - 1)]


def test_rounds_have_a_median_and_a_spread(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (7, 7))
    played = []
    found = timing.time_rounds(lambda: played.append(1), calls=4, clock=FakeClock)
    assert found.median == 8.0 / 4
    assert found.spread == pytest.approx((12 - 4) / 8)
    assert len(played) == 1 + 3 + 7


@pytest.mark.parametrize(("window", "rounds"), [(0, 10), (80, 20), (1e6, 200)])
def test_rounds_fill_the_window(monkeypatch, window, rounds):
    monkeypatch.setattr(timing, "WINDOW", window)  # the median of three laps is 4 s
    played = []
    timing.time_rounds(lambda: played.append(1), 1, FakeClock)
    assert len(played) == 1 + 3 + rounds


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1000)
    monkeypatch.setattr(timing, "clock_of", lambda device: FakeClock)
    monkeypatch.setattr(timing, "ROUNDS", (7, 7))
    assert timing.copy_bandwidth(CPU) == 2 * 1000 / 8.0
    assert math.isfinite(timing.copy_bandwidth(CPU))

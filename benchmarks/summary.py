"""Computes fastbn's speed-ups and their geometric means, and lists where fastbn is slower."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .measure import Row


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast as a rival fastbn was; a factor below 1 means slower."""

    network: str
    shape: str
    layout: str
    dtype: str
    epilogue: str
    direction: str
    method: str
    against: str
    factor: float

    @property
    def shape_key(self) -> tuple[str, ...]:
        return self.network, self.shape, self.layout, self.dtype


def case_of(row: Row) -> tuple[str, ...]:
    """Returns all that two rows must share to be compared."""
    return (
        row.network, row.shape, row.layout, row.dtype, row.epilogue, row.direction, row.method,
    )  # fmt: skip


def speed_ups(rows: Iterable[Row]) -> list[SpeedUp]:
    """Returns fastbn's speed-ups over each rival; rows with wrong results are left out."""
    by_case: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.correct:
            by_case[case_of(row)][row.rival] = row.median_us
    return [
        SpeedUp(*case, against=rival, factor=median / medians["fastbn"])
        for case, medians in by_case.items()
        if "fastbn" in medians
        for rival, median in medians.items()
        if rival != "fastbn"
    ]


def summarise(rows: Iterable[Row]) -> dict[str, list[dict]]:
    """Summarises the speed-ups of all rows.

    Returns:
        "slower" has the speed-ups below 1, the worst first. "geometric_means" has a mean for each
        epilogue, direction, method and rival, and the number of its cases.
    """
    found = speed_ups(rows)
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in found:
        groups[one.epilogue, one.direction, one.method, one.against].append(one.factor)
    slower = sorted((one for one in found if one.factor < 1), key=lambda one: one.factor)
    return {
        "slower": [asdict(one) for one in slower],
        "geometric_means": [
            {
                "epilogue": epilogue, "direction": direction, "method": method, "against": against,
                "speed_up": statistics.geometric_mean(factors), "cases": len(factors),
            }
            for (epilogue, direction, method, against), factors in groups.items()
        ],
    }  # fmt: skip

"""Speed-ups of fastbn: one by one, and as geometric means; the cases that it loses first."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .measure import Row


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast as a rival fastbn was; below 1 it was slower."""

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
    """All that two rows must share to be compared."""
    return (
        row.network, row.shape, row.layout, row.dtype, row.epilogue, row.direction, row.method,
    )  # fmt: skip


def speed_ups(rows: Iterable[Row]) -> list[SpeedUp]:
    """Of fastbn against each rival, like with like; a wrong result has no speed."""
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
    """What it comes to.

    Returns:
        "slower": the speed-ups below 1, worst first; "geometric_means": one for
        each epilogue, direction, method and rival, and the number of cases in it.
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

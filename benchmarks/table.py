"""The report as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from .measure import Row
from .summary import case_of


def markdown(report: dict, rows: Iterable[Row]) -> str:
    """All of a report: what fastbn loses first, the means, then every figure."""
    copy = report["copy_bandwidth"]
    parts = [
        f"# {report['title']}",
        _listed(f"{name}: {value}" for name, value in report["environment"].items() if value),
        f"Copy bandwidth: {_number(copy and copy['gb_per_s'])} GB/s, read plus written."
        " GB/s count the bytes of a one-pass kernel for all rivals alike."
        " Method *calls* includes gaps between launches, *graph* does not.",
        *_section("Failed", _listed(f"{f['part']}: {f['error']}" for f in report["failures"])),
        *_section("Skipped", _listed(report["skipped"])),
        *_section("Notes", _listed(report["notes"])),
        "## Slower than a rival",
        _slower(report["summary"]["slower"]) or "None.",
        "## Geometric means of speed-ups",
        _means(report["summary"]["geometric_means"]) or "None.",
        "## Figures",
        _figures(rows) or "None.",
        *_section("Plans", _plans(report["plans"])),
    ]
    return "\n\n".join(parts) + "\n"


def _section(heading: str, body: str) -> list[str]:
    return [f"## {heading}", body] if body else []


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    if not lines:
        return ""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, rule, *lines))


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.{0 if value >= 100 else 1}f}{unit}"


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _slower(slower: list[dict]) -> str:
    return _table(
        [*(name for name in (slower or [{}])[0] if name != "factor"), "speed-up"],
        [[*list(one.values())[:-1], _factor(one["factor"])] for one in slower],
    )


def _means(means: list[dict]) -> str:
    return _table(
        ["epilogue", "direction", "method", "against", "speed-up", "cases"],
        [[*list(one.values())[:4], _factor(one["speed_up"]), one["cases"]] for one in means],
    )


def _figures(rows: Iterable[Row]) -> str:
    by_case: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        by_case[case_of(row)].append(row)
    lines = []
    for case, rivals in by_case.items():
        right = [row.median_us for row in rivals if row.rival == "fastbn" and row.correct]
        ours = right[0] if right else None
        for row in rivals:
            copy = row.fraction_of_copy
            memory = row.peak_memory
            lines.append(
                [
                    *case, row.rival, _number(row.median_us), f"{row.spread:.0%}",
                    _number(row.gb_per_s), "-" if copy is None else f"{copy:.0%}",
                    _number(memory and memory / 1e6),
                    _factor(ours and row.median_us / ours) if row.correct else "wrong",
                ]
            )  # fmt: skip
    header = (
        "network", "shape", "layout", "dtype", "epilogue", "direction", "method", "rival", "us",
        "spread", "GB/s", "of copy", "peak MB", "fastbn is",
    )  # fmt: skip
    return _table(header, lines)


def _plans(plans: list[dict]) -> str:
    return _table(
        [
            "network", "shape", "layout", "dtype", "epilogue", "device", "direction", "strategy",
            "launches", "units", "from the cache", "predicted us",
        ],
        [
            [
                *list(plan.values())[:6], direction, plan[direction]["strategy"],
                plan[direction]["launches"], f"{plan[direction]['units']:g}",
                f"{plan[direction]['cached_units']:g}", _number(plan[direction]["seconds"] * 1e6),
            ]
            for plan in plans
            for direction in ("forward", "backward")
        ],
    )  # fmt: skip

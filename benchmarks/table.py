"""Writes the report as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from .measure import Row
from .summary import case_of

CASE = ("network", "shape", "layout", "dtype", "epilogue")


def markdown(report: dict, rows: Iterable[Row]) -> str:
    """Returns a report's text: where fastbn is slower, then the means, then every figure."""
    copy = report["copy_bandwidth"]
    parts = [
        f"# {report['title']}",
        _listed(f"{name}: {value}" for name, value in report["environment"].items() if value),
        f"Copy bandwidth: {_number(copy and copy['gb_per_s'])} GB/s, read plus written."
        " GB/s count the bytes of a one-pass kernel for all rivals alike."
        " Method *calls* includes gaps between launches, *graph* does not; in a graph, two passes,"
        " or tickets, take one more launch in each direction, which sets their counters to zero."
        " *Of one pass*, *of two*: the time for what fastbn's kernels would move in so many"
        " passes at the copy bandwidth, as a fraction of the time measured.",
        *_section("Failed", _listed(f"{f['part']}: {f['error']}" for f in report["failures"])),
        *_section("Skipped", _listed(report["skipped"])),
        *_section("Notes", _listed(report["notes"])),
        "## Slower than a rival",
        _slower(report["summary"]["slower"]) or "None.",
        "## Geometric means of speed-ups",
        _means(report["summary"]["geometric_means"]) or "None.",
        "## Figures",
        _figures(rows, _served(report)) or "None.",
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _served(report: dict) -> dict[tuple[str, ...], str]:
    """Returns the strategies that served each case and direction.

    Only plans for this GPU count; a run on a CPU has plans for an H100.
    """
    found = {}
    for plan in report["plans"]:
        if plan["device"] == report["environment"]["gpu"]:
            case = tuple(plan[name] for name in CASE)
            forward, backward = plan["forward"]["strategy"], plan["backward"]["strategy"]
            found[(*case, "forward")] = forward
            found[(*case, "forward+backward")] = f"{forward}, {backward}"
    return found


def _figures(rows: Iterable[Row], served: dict[tuple[str, ...], str]) -> str:
    by_case: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        by_case[case_of(row)].append(row)
    lines = []
    for case, rivals in by_case.items():
        right = [row.median_us for row in rivals if row.rival == "fastbn" and row.correct]
        ours = right[0] if right else None
        for row in rivals:
            memory = row.peak_memory
            strategy = served.get(case[:6]) if row.rival == "fastbn" else None
            lines.append(
                [
                    *case, f"{row.rival} ({strategy})" if strategy else row.rival,
                    _number(row.median_us), _percent(row.spread), _number(row.gb_per_s),
                    _percent(row.fraction_of_copy), _percent(row.fraction_of_one_pass),
                    _percent(row.fraction_of_two_pass),
                    _number(memory and memory / 1e6),
                    _factor(ours and row.median_us / ours) if row.correct else "wrong",
                ]
            )  # fmt: skip
    header = (
        *CASE, "direction", "method", "rival", "us", "spread", "GB/s", "of copy", "of one pass",
        "of two", "peak MB", "fastbn is",
    )  # fmt: skip
    return _table(header, lines)


def _plans(plans: list[dict]) -> str:
    return _table(
        [
            *CASE, "device", "direction", "strategy", "launches", "units", "from the cache",
            "predicted us",
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

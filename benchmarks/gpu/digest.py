"""Makes the table that ends a run: at most 80 short lines, the most important first."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator

WIDTH = 100

Records = list[dict]


def digest(found: dict, unsaved: str | None = None) -> list[str]:
    """Returns the table's lines for the findings of a run, which `Session.as_dict` returns."""
    kind = "REHEARSAL on a CPU: no figure says anything of a GPU" if found["rehearsal"] else ""
    gpu = found["known"].get("environment", {}).get("gpu") or "no GPU"
    ended = sum(step["status"] == "done" for step in found["steps"].values())
    lines = [
        f"fastbn on {gpu}. {kind}".strip(),
        f"{ended} of {len(found['steps'])} steps done in {found['seconds']:.0f} s",
    ]
    lines += [f"NOT SAVED: {unsaved}"] if unsaved else []
    for name, (lines_at_most, of_records) in SECTIONS.items():
        step = found["steps"].get(name)
        if step is None:
            continue
        lines.append(f"## {name}: {step['status']}, {step['seconds']:.0f} s")
        body = [*_trouble(step["records"]), *of_records(step["records"])]
        if len(body) > lines_at_most:
            rest = len(body) - lines_at_most + 1
            body = [*body[: lines_at_most - 1], f"... {rest} more lines in gpu.json"]
        lines += body
    return [line[:WIDTH] for line in lines]


def ended_well(found: dict) -> bool:
    """Says whether all steps ended by themselves and nothing in them failed."""
    return all(
        step["status"] == "done" and not _of(step["records"], "failure", "rubbish")
        for step in found["steps"].values()
    )


def _of(records: Records, *kinds: str) -> Records:
    return [record for record in records if record["kind"] in kinds]


def _trouble(records: Records) -> list[str]:
    failures = _of(records, "failure")
    lines = [f"FAILED {one['part']}: {one['error']}" for one in failures[:3]]
    if len(failures) > 3:
        lines.append(f"FAILED {len(failures) - 3} more")
    rubbish = _of(records, "rubbish")
    if rubbish:
        lines.append(f"{len(rubbish)} lines that are no records, the first: {rubbish[0]['text']!r}")
    return lines


def _skipped(records: Records) -> list[str]:
    return [
        f"no time for {one['count']}, from {one['first']} on" for one in _of(records, "skipped")
    ]


def _machine(records: Records) -> Iterator[str]:
    for one in _of(records, "known"):
        if "environment" in one:
            of = one["environment"]
            yield f"driver {of['driver']}, torch {of['torch']}, triton {of['triton']}"
        if "bandwidth" in one:
            yield f"copy bandwidth {one['bandwidth'] / 1e9:,.0f} GB/s, read plus written"
    for one in _of(records, "clocks"):
        yield f"clocks {one['state']}: " + ", ".join(
            str(value) for name, value in one.items() if name not in ("kind", "state")
        )


def _compile(records: Records) -> Iterator[str]:
    for one in _of(records, "compiled"):
        yield f"{one['launches']} launches and {one['rivals']} rivals compiled"
    yield from _skipped(records)


def _right(records: Records) -> Iterator[str]:
    checked, repeated = _of(records, "right"), _of(records, "repeated")
    runs = sum(len(one["strategies"]) for one in checked)
    times = max((one["times"] for one in repeated), default=0)
    yield f"{runs} results right, of {len(checked)} cases; {len(repeated)} repeated {times} times"
    for one in _of(records, "held"):
        yield f"held: {one['part']}"
    yield from _skipped(records)


def _tests(records: Records) -> Iterator[str]:
    for one in _of(records, "tests"):
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(one["counts"].items()))
        yield f"{counts or 'none'}{'' if one['ended'] else '; stopped when time was up'}"


def _strategies(records: Records) -> Iterator[str]:
    """Yields the planner's wrong choices, the most costly first, and then each case's times."""
    losses, lines = [], []
    for label, entries in _by_case(_of(records, "strategy")).items():
        times = _direction_times(entries)
        chosen = dict(zip(("forward", "backward"), entries[0]["chosen"]))
        parts = []
        for direction, of in times.items():
            if not of:
                continue
            mine, best = chosen[direction], min(of, key=of.__getitem__)
            if mine != best and mine in of:
                losses.append((of[mine] / of[best], label, direction, mine, best))
            parts.append(
                direction[:3] + " " + " ".join(f"{_short(s)} {us:.0f}" for s, us in of.items())
            )
        floors = [e["fraction_of_one_pass"] for e in entries if e["fraction_of_one_pass"]]
        floor = f"; best {max(floors):.0%} of floor" if floors else ""
        lines.append(f"{label}: {'; '.join(parts)} us{floor}")
    if lines:
        yield f"{len(losses)} wrong choices in {len(lines)} cases"
    for loss, label, direction, chosen, best in sorted(losses, reverse=True):
        yield f"{loss:.2f}x {label} {direction}: chose {chosen}, best {best}"
    yield from _skipped(records)
    yield from lines


def _direction_times(entries: Records) -> dict[str, dict[str, float]]:
    """Returns each strategy's microseconds, forward and backward.

    The time of a backward is that of forward and backward without that of the forward.
    """
    right = [entry for entry in entries if entry["correct"]]
    forward = {e["forward"]: e["median_us"] for e in right if e["direction"] == "forward"}
    backward = {
        e["backward"]: e["median_us"] - forward[e["forward"]]
        for e in right
        if e["direction"] == "forward+backward" and e["forward"] in forward
    }
    return {"forward": forward, "backward": backward}


def _short(strategy: str) -> str:
    return {"two-pass": "2p", "resident": "res", "ticketed": "tick"}.get(strategy, strategy)


def _rivals(records: Records) -> Iterator[str]:
    """Yields geometric means, and speed-ups over the fastest rival, the smallest first."""
    methods = {row["method"] for row in _of(records, "row")}
    method = "graph" if "graph" in methods else "calls"
    found: list[tuple[float, str, str]] = []
    means: dict[str, list[float]] = defaultdict(list)
    rows = [row for row in _of(records, "row") if row["method"] == method and row["correct"]]
    for label, of_case in _by_case(rows).items():
        times = {row["rival"]: row["median_us"] for row in of_case}
        mine = times.pop("fastbn", None)
        if mine is None or not times:
            continue
        best = min(times, key=times.__getitem__)
        found.append((times[best] / mine, label, f"{best} {times[best]:.0f} us, ours {mine:.0f}"))
        means["the fastest rival"].append(times[best] / mine)
        for rival, us in times.items():
            means[rival].append(us / mine)
    for rival, factors in means.items():
        mean = statistics.geometric_mean(factors)
        yield f"{mean:.2f}x as fast as {rival} (geometric mean, {len(factors)} cases, {method})"
    for factor, label, text in sorted(found):
        yield f"{factor:.2f}x {label}: {text}"
    yield from _skipped(records)


def _training(records: Records) -> Iterator[str]:
    for one in _of(records, "training"):
        memory = one["peak_memory"]
        yield (
            f"{one['norm']:6} {one['images_per_second']:9,.1f} images/s, spread {one['spread']:.0%}"
            f"{'' if memory is None else f', peak {memory / 2**30:.2f} GiB'}"
            f" (batch {one['batch']}, {one['size']} pixels)"
        )


def _host(records: Records) -> Iterator[str]:
    times = {(one["direction"], one["layer"]): one["us"] for one in _of(records, "host")}
    for direction in dict.fromkeys(direction for direction, _ in times):
        mine, native = times.get((direction, "fastbn")), times.get((direction, "native"))
        if mine and native:
            yield f"{direction}: {mine:.1f} us, native {native:.1f} us, ratio {mine / native:.2f}"


def _constants(records: Records) -> Iterator[str]:
    for one in _of(records, "device"):
        line = one["line"]
        yield from (line[i : i + WIDTH] for i in range(0, len(line), WIDTH))
    for one in _of(records, "constant"):
        if one["name"] == "merge_seconds":
            yield "merge, us: " + " ".join(f"{c}x{n}:{s * 1e6:.1f}" for c, n, s in one["value"])
        elif one["name"] in ("program", "hand_over"):
            yield f"{one['name']}: {one['value'] * 1e9:.2f} ns"
        elif one["name"] == "l2_share_without_hints":
            yield f"l2_share without hints: {one['value']:.3g}"


def _by_case(rows: Records) -> dict[str, Records]:
    found: dict[str, Records] = defaultdict(list)
    for row in rows:
        layout = {"channels-first": "NCHW", "channels-last": "NHWC"}.get(row["layout"], "")
        label = " ".join(filter(None, (row["shape"], layout, row["epilogue"])))
        found[label].append(row)
    return found


# For each step, the most important first: the most lines that it may have, and a function that
# makes them.
SECTIONS: dict[str, tuple[int, Callable[[Records], object]]] = {
    "right": (7, _right),
    "gpu-tests": (4, _tests),
    "strategies": (18, _strategies),
    "rivals": (14, _rivals),
    "training": (3, _training),
    "constants": (7, _constants),
    "machine": (4, _machine),
    "host": (2, _host),
    "tests": (4, _tests),
    "compile": (3, _compile),
}

"""`python -m benchmarks.report` measures everything and writes JSON, a table and a plot.

Parts run in order of importance while the time budget lasts. A part that fails is printed and
listed, the others go on, and the exit status is 1. A part that takes two minutes counts as hanging
and ends the run; the JSON holds what was found before.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import fastbn
from fastbn.kernels.device import H100

from .command_line import in_one_line, parse_with_out
from .environment import environment, title
from .inputs import input_sets
from .measure import Machine, Row, measure
from .plans import device_plan, plan_entry
from .rivals import COMPILED, RIVALS, fused, kernels_only, no_compiler
from .shapes import Case, cases
from .summary import summarise
from .table import markdown
from .timing import copy_bandwidth

# So many seconds are kept for the table and the plot.
WRITING = 15.0

# After so many seconds a part counts as hanging. A kernel that waits for ever can't be stopped, so
# that the process ends; what was found before is on disk.
HANGING = 120.0


class Report:
    """What has been found so far, and the time left to find more.

    Args:
        device: to measure on.
        budget: seconds from now.
        clock: in seconds.
    """

    def __init__(
        self, device: torch.device, budget: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.device = device
        self.environment = environment(device)
        self.bandwidth: float | None = None
        self.rows: list[Row] = []
        self.plans: list[dict] = []
        self.failures: list[dict[str, str]] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.running: str | None = None
        self._clock, self._start, self._budget = clock, clock(), budget
        self._longest = 0.0
        self._lost = False

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Does a piece of work, and prints and lists its failure if it fails."""
        try:
            work()
        except Exception as problem:
            traceback.print_exc(file=sys.stdout)
            self._fail(name, problem)
            # The frames of the exception may hold most of the memory, so they are freed.
            problem.__traceback__ = None
            gc.collect()
            try:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as lost:
                self._lost = True
                self._fail("the device, lost after that failure", lost)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Does the same as `attempt`, or skips a part that might not end within the budget."""
        elapsed = self._clock() - self._start
        if self._lost or elapsed + self._longest + WRITING > self._budget:
            self.skipped.append(name)
            return
        print(f"[{elapsed:6.1f} s] {name}", flush=True)
        faulthandler.dump_traceback_later(HANGING, exit=True, file=sys.__stderr__)
        try:
            self.attempt(name, work)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._longest = max(self._longest, self._clock() - self._start - elapsed)

    def _fail(self, name: str, problem: Exception) -> None:
        print(f"FAILED {name}: {in_one_line(problem)}", flush=True)
        self.failures.append({"part": name, "error": in_one_line(problem)})

    def as_dict(self) -> dict:
        """Returns what goes into the JSON."""
        return {
            "title": title(self.environment),
            "environment": self.environment,
            "copy_bandwidth": self.bandwidth and {"gb_per_s": self.bandwidth / 1e9},
            "summary": summarise(self.rows),
            "failures": self.failures,
            "skipped": self.skipped,
            "notes": self.notes,
            "running": self.running,
            "rows": [asdict(row) for row in self.rows],
            "plans": self.plans,
        }

    def write(self, folder: Path) -> None:
        """Writes report.json, report.md and report.png."""
        self.attempt("plot", lambda: self._draw(folder / "report.png"))
        self.attempt("table", lambda: self._write_table(folder / "report.md"))
        self.write_json(folder)

    def write_json(self, folder: Path) -> None:
        (folder / "report.json").write_text(json.dumps(self.as_dict(), indent=1))

    def _write_table(self, path: Path) -> None:
        path.write_text(markdown(self.as_dict(), self.rows))

    def _draw(self, path: Path) -> None:
        from .plot import draw  # it needs matplotlib, and the figures don't

        draw(title(self.environment), self.rows, path)


def run(report: Report, folder: Path, quick: bool) -> None:
    """Runs all parts, the most important first."""
    device, gpu = report.device, report.device.type == "cuda"
    rivals = list(RIVALS)

    def part(name: str, work: Callable[[], None]) -> None:
        report.running = name
        report.write_json(folder)
        report.part(name, work)
        report.running = None

    def bandwidth() -> None:
        report.bandwidth = copy_bandwidth(device)

    def compiler() -> None:
        reason = no_compiler(device)
        if reason is not None:
            rivals[:] = [name for name in rivals if name not in COMPILED]
            report.skipped.append(f"torch.compile, which does not work here: {reason}")

    def h100() -> None:
        report.plans.extend(device_plan(case, H100) for case in cases(gpu=True, quick=quick))

    part("copy bandwidth", bandwidth)
    if not gpu:
        rivals.remove("cooperative")
        part("plans for an H100", h100)
    part("torch.compile", compiler)
    for case in cases(gpu, quick):
        part(str(case), lambda case=case: _one_case(report, case, rivals))


def _one_case(report: Report, case: Case, rivals: list[str]) -> None:
    machine = Machine(report.device, report.bandwidth)
    sets = input_sets(case, report.device)

    def rival(name: str) -> None:
        for row in measure(case, name, sets, machine, report.notes.append):
            report.rows.append(row)

    def plan() -> None:
        norm = fused(case, report.device).norm
        found = fastbn.explain(norm, sets[0].x, sets[0].residual)
        report.plans.append(plan_entry(case, found.plan, found.device))

    with kernels_only(report.device):
        for name in rivals:
            report.attempt(f"{case}, {name}", lambda name=name: rival(name))
        if machine.gpu:
            report.attempt(f"{case}, plan", plan)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, one dtype")
    parser.add_argument(
        "--budget",
        type=float,
        default=540.0,
        help="seconds after which nothing new is begun (%(default)s)",
    )
    options = parse_with_out(parser, arguments, "report.json, report.md and report.png")
    # A run that ends early must not leave an earlier run's files.
    for name in ("report.md", "report.png"):
        (options.out / name).unlink(missing_ok=True)
    torch.manual_seed(0)
    report = Report(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.budget)
    print(title(report.environment))
    for name, value in report.environment.items():
        print(f"  {name}: {value}", flush=True)
    if report.device.type == "cpu":
        report.notes.append("On a CPU fastbn is PyTorch's own batch norm: speed-ups say nothing.")
    run(report, options.out, options.quick)
    report.write(options.out)

    for note in report.notes:
        print(note)
    summary = report.as_dict()["summary"]
    for one in summary["geometric_means"]:
        print(
            f"{one['epilogue']:12} {one['direction']:17} {one['method']:6}"
            f" {one['speed_up']:5.2f}x {one['against']} ({one['cases']} cases)"
        )
    print(
        f"{len(summary['slower'])} slower, {len(report.skipped)} skipped,"
        f" {len(report.failures)} failed; see {options.out / 'report.md'}"
    )
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

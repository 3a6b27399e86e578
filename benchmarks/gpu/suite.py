"""Runs a part of the test suite in parallel until the time is up."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

from .session import ROOT
from .step import Context

# Seconds that pytest and its workers need to end.
ENDING = 3.0


class Reporter:
    """Counts outcomes, and reports failures at once."""

    def __init__(self, context: Context) -> None:
        self.context, self.counts = context, Counter()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail(report.nodeid, report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fail(f"{report.nodeid} ({report.when})", report.longreprtext)
        elif report.when == "call" or report.skipped:
            self.counts[report.outcome] += 1

    def _fail(self, test: str, text: str) -> None:
        self.counts["failed"] += 1
        errors = [line[2:] for line in text.splitlines() if line.startswith("E ")]
        self.context.record("failure", part=test, error=(errors or [text])[0].strip()[:300])


def run_tests(context: Context, *options: str) -> None:
    """Runs the tests that pytest's options select, until the step's time is up."""
    reporter = Reporter(context)
    workers = min(12, os.cpu_count() or 1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, context.left() - ENDING))
    status = pytest.main(
        [
            f"--rootdir={ROOT}", "-n", str(workers), "-q", "--tb=short", "-p", "no:cacheprovider",
            "--continue-on-collection-errors", *options,
        ],
        plugins=[reporter],
    )  # fmt: skip
    signal.setitimer(signal.ITIMER_REAL, 0)
    context.record(
        "tests", counts=dict(reporter.counts), ended=status != pytest.ExitCode.INTERRUPTED
    )

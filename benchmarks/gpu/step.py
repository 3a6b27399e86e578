"""The program of a step's process, which runs the step's module and passes its records on.

    python -m benchmarks.gpu.step MODULE DESCRIPTOR SECONDS [--rehearse] < known.json

Records are lines of JSON that go to an inherited file descriptor, so that they don't mix with what
libraries print. Standard input holds what earlier steps found.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from .. import timing
from ..command_line import in_one_line

T = TypeVar("T")


class Context:
    """What a step is given, and how it reports.

    Args:
        descriptor: the file descriptor that records go to.
        seconds: seconds until the step should have ended.
        rehearse: whether the run is on a CPU, at tiny sizes.
        known: what earlier steps found, by name.
    """

    def __init__(self, descriptor: int, seconds: float, rehearse: bool, known: dict) -> None:
        self.rehearse, self.known = rehearse, known
        self.device = torch.device("cpu" if rehearse else "cuda")
        self._deadline = time.monotonic() + seconds
        self._descriptor = descriptor

    def left(self) -> float:
        """Returns the seconds until the step should have ended."""
        return self._deadline - time.monotonic()

    def record(self, kind: str, **values: Any) -> None:
        """Reports a finding."""
        line = json.dumps({"kind": kind, **values}, default=str) + "\n"
        os.write(self._descriptor, line.encode())

    def know(self, **values: Any) -> None:
        """Reports findings that later steps need, which then have them in `known`."""
        self.known.update(values)
        self.record("known", **values)

    def attempt(self, part: str, work: Callable[[], object]) -> bool:
        """Does a part of the step and says whether it went well; a failure is a record.

        Raises:
            Exception: the failure, if the device is lost with it.
        """
        try:
            work()
            return True
        except Exception as problem:
            traceback.print_exc()
            self.record("failure", part=part, error=in_one_line(problem))
            # The frames of the exception may hold most of the memory, so they are freed.
            problem.__traceback__ = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return False

    def while_time_is_left(self, items: Iterable[T], keep: float = 0.0) -> Iterator[T]:
        """Yields items as long as one that takes as long as the longest so far would end in time.

        The number of items that are left is recorded.

        Args:
            items: what to work on, the most important first.
            keep: seconds of the step's time that are kept for what follows.
        """
        items = list(items)
        longest = 0.0
        for done, item in enumerate(items):
            if self.left() - keep < longest:
                self.record("skipped", count=len(items) - done, first=str(item))
                return
            before = time.monotonic()
            yield item
            longest = max(longest, time.monotonic() - before)


def main(arguments: list[str]) -> int:
    """Runs a step and returns its exit status: 0, or 1 if it raised."""
    module, descriptor, seconds, *options = arguments
    context = Context(
        int(descriptor), float(seconds), "--rehearse" in options, json.load(sys.stdin)
    )
    if context.rehearse:
        timing.WINDOW, timing.ROUNDS = 0.0, (2, 2)
    try:
        importlib.import_module(module).run(context)
    except Exception as problem:
        traceback.print_exc()
        context.record("failure", part="the step", error=in_one_line(problem))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

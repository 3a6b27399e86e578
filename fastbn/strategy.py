"""The strategy in force, which says how the kernels pass over the data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from .backend import one_of

STRATEGIES = ("two-pass", "ticketed", "resident")
_NAMES = ("auto", *STRATEGIES)

_strategy = one_of(_NAMES, os.environ.get("FASTBN_STRATEGY", "auto"), "FASTBN_STRATEGY")


def get_strategy() -> str:
    """Returns the strategy in force, or "auto" if the planner chooses."""
    return _strategy


@contextlib.contextmanager
def use_strategy(name: str) -> Iterator[None]:
    """Makes the kernels take one strategy, in all threads, for the length of a `with` block.

    It is meant for bug reports and benchmarks, since the planner's choice is predicted to be the
    fastest. A call that the strategy can't serve takes two passes, and with fixed statistics
    there is only one strategy; `explain` says which one runs.

    Args:
        name: "two-pass", "ticketed" or "resident", or "auto" for the planner's choice. The
            environment variable FASTBN_STRATEGY says what holds outside of such blocks.

    Raises:
        ValueError: the name is none of these; the strategy stays as it was.
    """
    global _strategy
    before = _strategy
    _strategy = one_of(_NAMES, name, "strategy")
    try:
        yield
    finally:
        _strategy = before

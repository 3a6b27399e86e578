"""What each strategy takes: was the planner's choice the fastest, and its prediction right?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import fastbn

from .forced import forced
from .inputs import Inputs
from .measure import Machine, measure
from .rivals import fused
from .shapes import Case


def measure_strategy(
    case: Case, strategy: str, sets: list[Inputs], machine: Machine, note: Callable[[str], None]
) -> Iterator[dict]:
    """Checks and times fastbn with one strategy forced; nothing if it serves neither direction.

    Yields:
        A row's entries; "strategy", the forced one; "forward" and "backward",
        what served them (where one strategy can't, another does; None if not
        run); "predicted_us", of what served.

    Raises:
        ArithmeticError: the result is wrong. Its rows, marked, come first.
    """
    with forced(strategy):
        norm = fused(case, machine.device).norm
        plan = fastbn.explain(norm, sets[0].x, sets[0].residual).plan
        if strategy not in (plan.forward.strategy, plan.backward.strategy):
            return
        for row in measure(case, "fastbn", sets, machine, note, methods=("graph",)):
            served = [plan.forward]
            if row.direction == "forward+backward":
                served.append(plan.backward)
            elif plan.forward.strategy != strategy:
                continue  # another strategy's forward
            yield {
                **asdict(row),
                "strategy": strategy,
                "forward": plan.forward.strategy,
                "backward": plan.backward.strategy if len(served) > 1 else None,
                "predicted_us": sum(schedule.seconds for schedule in served) * 1e6,
            }

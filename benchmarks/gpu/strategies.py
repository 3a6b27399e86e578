"""What each strategy takes: was the planner's choice the fastest, and its prediction right?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import fastbn
from fastbn.strategy import STRATEGIES

from ..inputs import Inputs, input_sets
from ..measure import Machine, measure
from ..rivals import fused
from ..shapes import Case
from .cases import strategy_cases
from .step import Context


def run(context: Context) -> None:
    machine = Machine(context.device, context.known.get("bandwidth"))

    def note(text: str) -> None:
        context.record("note", text=text)

    with fastbn.use_backend("triton"):
        for case in context.while_time_is_left(strategy_cases(context.rehearse)):
            sets = input_sets(case, context.device)

            def work(strategy: str, case: Case = case, sets: list[Inputs] = sets) -> None:
                for entry in measure_strategy(case, strategy, sets, machine, note):
                    context.record("strategy", **entry)

            for strategy in STRATEGIES:
                context.attempt(f"{case}, {strategy}", lambda strategy=strategy: work(strategy))
            del sets


def measure_strategy(
    case: Case, strategy: str, sets: list[Inputs], machine: Machine, note: Callable[[str], None]
) -> Iterator[dict]:
    """Checks and times fastbn by one strategy; nothing if it serves neither direction.

    Without a GPU, which alone has graphs, it times ordinary calls.

    Yields:
        A row's entries; "strategy", the one asked for; "forward" and "backward",
        what served them (where one strategy can't, another does; None if not
        run); "chosen", what the planner would have taken for the two directions;
        "predicted_us", of what served.

    Raises:
        ArithmeticError: the result is wrong. Its rows, marked, come first.
    """

    def planned():
        return fastbn.explain(fused(case, machine.device).norm, sets[0].x, sets[0].residual).plan

    choice = planned()
    with fastbn.use_strategy(strategy):
        plan = planned()
        if strategy not in (plan.forward.strategy, plan.backward.strategy):
            return
        method = "graph" if machine.gpu else "calls"
        for row in measure(case, "fastbn", sets, machine, note, methods=(method,)):
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
                "chosen": (choice.forward.strategy, choice.backward.strategy),
                "predicted_us": sum(schedule.seconds for schedule in served) * 1e6,
            }

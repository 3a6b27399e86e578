"""Times each strategy, to see if the planner chose the fastest and predicted its time."""

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
    """Checks and times fastbn by one strategy, if that serves either direction.

    It times CUDA graphs, or ordinary calls without a GPU.

    Yields:
        The entries of a row, and besides: "strategy", the strategy asked for; "forward" and
        "backward", the strategies that served them, which differ from the one asked for where it
        can't serve (None for a backward that was not run); "chosen", the planner's choice for the
        two directions; and "predicted_us", the predicted time of the strategies that served.

    Raises:
        ArithmeticError: the result is wrong. Its rows come first, with "correct" False.
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
                continue  # another strategy served this forward
            yield {
                **asdict(row),
                "strategy": strategy,
                "forward": plan.forward.strategy,
                "backward": plan.backward.strategy if len(served) > 1 else None,
                "chosen": (choice.forward.strategy, choice.backward.strategy),
                "predicted_us": sum(schedule.seconds for schedule in served) * 1e6,
            }

"""Times forward and backward of eager PyTorch, `torch.compile` and fastbn for each case."""

from __future__ import annotations

from dataclasses import asdict

from ..inputs import input_sets
from ..measure import Machine, measure
from ..rivals import COMPILED, RIVALS, kernels_only, no_compiler
from .cases import rival_cases
from .step import Context

DIRECTIONS = ("forward+backward",)


def run(context: Context) -> None:
    names = list(RIVALS)
    reason = no_compiler(context.device)
    if reason is not None:
        context.record("note", text=f"no torch.compile here: {reason}")
    without = COMPILED if reason is not None else COMPILED[1:] if context.rehearse else ()
    names = [name for name in names if name not in without]
    machine = Machine(context.device, context.known.get("bandwidth"))

    def note(text: str) -> None:
        context.record("note", text=text)

    with kernels_only(context.device):
        for case in context.while_time_is_left(rival_cases(context.rehearse)):
            sets = input_sets(case, context.device)

            def work(name: str, case=case, sets=sets) -> None:
                for row in measure(case, name, sets, machine, note, directions=DIRECTIONS):
                    context.record("row", **asdict(row))

            for name in names:
                context.attempt(f"{case}, {name}", lambda name=name: work(name))
            del sets

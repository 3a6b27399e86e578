"""The steps in their order, and how many seconds of the default budget each may take."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 540.0


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: the name by which `--only` chooses it.
        module: the module whose `run(context)` does the work.
        seconds: its share of the default budget; later steps get the time that it leaves.
        what: what it finds out, in a few words.
        kernels: whether a rehearsal runs its kernels in Triton's interpreter.
    """

    name: str
    module: str
    seconds: float
    what: str
    kernels: bool = False


STEPS = (
    Step("machine", "benchmarks.gpu.machine", 20, "versions, clocks, copy bandwidth"),
    Step("compile", "benchmarks.gpu.compile_ahead", 60, "kernels that later steps need"),
    Step("right", "benchmarks.gpu.right", 60, "results against float64, repeats", kernels=True),
    Step("gpu-tests", "benchmarks.gpu.gpu_tests", 60, "the tests that need a GPU"),
    Step("strategies", "benchmarks.gpu.strategies", 80, "which one is fastest", kernels=True),
    Step("constants", "benchmarks.gpu.constants", 40, "what the planner assumes", kernels=True),
    Step("rivals", "benchmarks.gpu.rivals", 80, "eager and torch.compile beside fastbn"),
    Step("training", "benchmarks.gpu.training", 60, "ResNet-50's training step"),
    Step("host", "benchmarks.gpu.host", 20, "host time of a call"),
    Step("tests", "benchmarks.gpu.all_tests", 60, "the rest of the test suite"),
)

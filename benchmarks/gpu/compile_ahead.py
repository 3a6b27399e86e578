"""Compiles what later steps launch, in as many processes as there are cores.

`tests.compile_kernels` compiles fastbn's kernels into Triton's cache and launches nothing. What
`torch.compile` generates goes into Inductor's cache. If Inductor times several configurations of
a kernel, it does so in a later step, when nothing else runs.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

import fastbn
from fastbn.kernels.device import H100, Device
from fastbn.strategy import STRATEGIES
from tests import compile_kernels

from ..command_line import in_one_line
from ..rivals import COMPILED, RIVALS, no_compiler
from ..shapes import Case
from . import cases, right
from .step import Context


@dataclass(frozen=True)
class Launches:
    """The launches of one call, by one strategy or by the planner's choice."""

    shape: tuple[int, ...]
    channels_last: bool
    dtype: str
    activation: str
    residual: bool
    strategy: str | None = None


@dataclass(frozen=True)
class Rival:
    """A case that `torch.compile` compiles."""

    case: Case
    name: str


def run(context: Context) -> None:
    jobs: list[Launches | Rival] = launches(context.rehearse)[: 2 if context.rehearse else None]
    reason = no_compiler(context.device) if context.rehearse else None
    if reason is None:
        jobs += rivals(context.rehearse)
    else:
        context.record("note", text=f"no torch.compile here: {reason}")
    device = Device(**context.known["device"]) if "device" in context.known else H100
    capability = context.known.get("environment", {}).get("compute_capability", "9.0")
    arch = int(capability.replace(".", ""))
    # There is a worker for each core, so that Inductor need not start processes of its own.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    workers = multiprocessing.get_context("spawn")
    counts = {Launches: 0, Rival: 0}
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=workers)
    futures: dict[Future, Launches | Rival] = {
        pool.submit(_compile, job, arch, device, context.device.type): job for job in jobs
    }
    try:
        for future in as_completed(futures, timeout=max(0.0, context.left())):
            try:
                counts[type(futures[future])] += future.result()
            except Exception as problem:
                context.record(
                    "failure", part=f"compile {futures[future]}", error=in_one_line(problem)
                )
    except TimeoutError:
        left = [job for future, job in futures.items() if not future.done()]
        context.record("skipped", count=len(left), first=str(left[0]))
    context.record("compiled", launches=counts[Launches], rivals=counts[Rival])
    pool.shutdown(wait=False, cancel_futures=True)


def launches(rehearse: bool) -> list[Launches]:
    """Returns all calls whose kernels later steps launch, in the order of the steps."""
    found = [
        Launches(
            case.shape, case.channels_last, str(case.dtype).removeprefix("torch."),
            case.activation, case.residual, strategy,
        )
        for case in right.all_cases(rehearse)
        for strategy in STRATEGIES
    ]  # fmt: skip
    found += [
        _launches(case, strategy)
        for case in cases.strategy_cases(rehearse)
        for strategy in STRATEGIES
    ]
    if not rehearse:
        found += [_launches(case) for case in (*cases.rival_cases(False), *cases.training_cases())]
    return list(dict.fromkeys(found))


def rivals(rehearse: bool) -> list[Rival]:
    """Returns what `torch.compile` compiles."""
    if rehearse:
        return [Rival(cases.rival_cases(True)[0], COMPILED[0])]
    return [Rival(case, name) for case in cases.rival_cases(False) for name in COMPILED]


def _launches(case: Case, strategy: str | None = None) -> Launches:
    activation = "relu" if case.epilogue.relu else "none"
    last = case.layout == "channels-last"
    return Launches(case.size, last, case.dtype, activation, case.epilogue.residual, strategy)


def _compile(job: Launches | Rival, arch: int, device: Device, type: str) -> int:
    """Returns how many launches, or rivals, were compiled."""
    if isinstance(job, Rival):
        return _compile_rival(job, torch.device(type))
    return compile_launches(job, arch, device)


def compile_launches(job: Launches, arch: int, device: Device) -> int:
    """Compiles the launches of a call and returns how many there were."""
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
    case = compile_kernels.Case(
        job.shape, job.channels_last, short[job.dtype], job.activation, job.residual
    )

    def compile() -> int:
        target = GPUTarget("cuda", arch, 32)
        return len(compile_kernels.compile_launches(case, target, device))

    if job.strategy is None:
        return compile()
    with fastbn.use_strategy(job.strategy):
        return compile()


def _compile_rival(job: Rival, device: torch.device) -> int:
    """Compiles both directions without running them."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    with mock.patch.object(CachingAutotuner, "run", return_value=None):
        RIVALS[job.name](job.case, device)
    return 1

"""Checks every strategy against float64, in repeated calls, in streams and in graphs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import fastbn
from fastbn.activations import saved_for
from fastbn.kernels import plan
from fastbn.runtime.device import device_facts
from fastbn.runtime.layout import problem_of
from fastbn.strategy import STRATEGIES
from tests import gpu_checks, oracle
from tests.oracle import Case

from .cases import SHAPES
from .step import Context

# Pairs of activation and residual, the most used first.
EPILOGUES = (("relu", False), ("relu", True), ("none", False), ("silu", True))

# Sizes that no tile divides, in several dtypes.
AWKWARD = (
    Case((37, 33, 31, 29), torch.float16),
    Case((3, 5, 7, 9, 11), torch.float32),
    Case((1025, 1000), torch.float32),
    Case((5, 130, 1, 257), torch.float64),
)

# The networks whose calls are repeated 200 times.
REPEATED = ("MLP", "MobileNetV2", "ResNet-18/CIFAR")
TIMES = 200
FEW_TIMES = 3

# So many seconds are kept for the repetitions.
FOR_REPEATS = 18.0

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run(context: Context) -> None:
    if context.rehearse:
        from tests.interpreter import mend  # the import needs Triton's interpreter

        mend()
    if context.device.type == "cuda":
        for strategy in STRATEGIES:
            with fastbn.use_strategy(strategy):
                for check in (gpu_checks.graph_replays, gpu_checks.streams_agree):
                    part = f"{check.__name__}, {strategy}"
                    if context.attempt(part, check):
                        context.record("held", part=part)
        for last in (False, True):
            part = f"past 2^31 elements, {'channels-last' if last else 'channels-first'}"
            if context.attempt(part, lambda last=last: gpu_checks.past_2_31(last)):
                context.record("held", part=part)
            torch.cuda.empty_cache()
    keep = 0.0 if context.rehearse else FOR_REPEATS
    for case in context.while_time_is_left(all_cases(context.rehearse), keep):
        context.attempt(_name(case), lambda case=case: _check(context, case))
    for case in context.while_time_is_left(repeated_cases(context.rehearse)):
        context.attempt(f"repeated {_name(case)}", lambda case=case: _repeat(context, case))


def all_cases(rehearse: bool) -> list[Case]:
    """Returns all cases to check: one epilogue after the other, with all shapes and layouts."""
    if rehearse:
        plain = [Case((2, 8, 3, 5), torch.bfloat16), Case((16, 8), torch.float32)]
        return [_of(case, epilogue) for case in plain for epilogue in EPILOGUES[:2]]
    plain = [*AWKWARD, *(Case(size, torch.bfloat16) for _, size in SHAPES)]
    return [
        _of(replace(case, channels_last=last), epilogue)
        for epilogue in EPILOGUES
        for case in plain
        for last in ((False, True) if len(case.shape) > 2 else (False,))
    ]


def repeated_cases(rehearse: bool) -> list[Case]:
    """Returns the cases to repeat many times."""
    if rehearse:
        return all_cases(True)[:1]
    sizes = [size for network, size in SHAPES if network in REPEATED]
    sizes.append((256, 2048, 7, 7))
    return [
        _of(Case(size, torch.bfloat16, channels_last=last), epilogue)
        for size in sizes
        for last in ((False, True) if len(size) > 2 else (False,))
        for epilogue in EPILOGUES[:2]
    ]


def _of(case: Case, epilogue: tuple[str, bool]) -> Case:
    activation, residual = epilogue
    return replace(case, activation=activation, residual=residual)


def _name(case: Case) -> str:
    layout = "channels-last" if case.channels_last else "contiguous"
    dtype = str(case.dtype).removeprefix("torch.")
    epilogue = ("+add" if case.residual else "") + (
        "" if case.activation == "none" else f"+{case.activation}"
    )
    return f"{'x'.join(map(str, case.shape))} {layout} {dtype} BN{epilogue}"


def _check(context: Context, case: Case) -> None:
    """Holds all strategies to the tests' rule, and repeated calls to the same bits."""
    arguments = oracle.make_arguments(case, context.device)
    expected = oracle.expect(arguments)
    held = []
    for strategy in serving(arguments):

        def work(strategy: str = strategy) -> None:
            with fastbn.use_strategy(strategy):
                results = _call(arguments)
                oracle.assert_right(results, arguments, expected)
                _hold_bits(arguments, results, FEW_TIMES - 1)

        if context.attempt(f"{_name(case)}, {strategy}", work):
            held.append(strategy)
    context.record("right", case=_name(case), strategies=held)


def _repeat(context: Context, case: Case) -> None:
    arguments = oracle.make_arguments(case, context.device)
    times = FEW_TIMES if context.rehearse else TIMES
    for strategy in serving(arguments):
        with fastbn.use_strategy(strategy):
            _hold_bits(arguments, _call(arguments), times - 1)
        context.record("repeated", case=_name(case), strategy=strategy, times=times)


def serving(arguments: oracle.Arguments) -> list[str]:
    """Returns the strategies that can serve a direction of a call."""
    case, x = arguments.case, arguments.input
    problem = problem_of(x, True, case.residual, saved_for(case.activation, case.residual))
    served = {
        strategy
        for backward in (False, True)
        for strategy in plan.schedules(problem, device_facts(x.device), backward)
    }
    return [strategy for strategy in STRATEGIES if strategy in served]


def _call(arguments: oracle.Arguments) -> dict[str, Tensor]:
    """Runs forward and backward on copies of what they update, so that the arguments stay."""
    return oracle.run_fastbn(
        replace(
            arguments,
            running_mean=arguments.running_mean.clone(),
            running_var=arguments.running_var.clone(),
            num_batches_tracked=arguments.num_batches_tracked.clone(),
        )
    )


def _hold_bits(arguments: oracle.Arguments, results: dict[str, Tensor], times: int) -> None:
    """Runs a call so many times and holds the results' bits to those of the first run."""
    differs = torch.zeros((), dtype=torch.bool, device=arguments.input.device)
    for _ in range(times):
        for name, again in _call(arguments).items():
            bits = _BITS[again.element_size()]
            # The comparison runs on the GPU, so that the host waits only after the last run.
            differs |= (again.view(bits) != results[name].view(bits)).any()
    assert not differs.item(), f"{times} runs differ in their bits"
    gpu_checks.workspaces_rest()

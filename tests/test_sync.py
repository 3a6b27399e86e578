"""Statistics that processes share: a batch in parts gives what one process makes of the whole."""

from __future__ import annotations

import pytest
import torch

import fastbn
from fastbn import FusedSyncBatchNormAct

from .oracle import Arguments, Case, assert_right, expect, make_arguments, poisoned
from .processes import run

# How many rows of a batch each process gets.
SPLITS = {2: [(4, 4), (7, 1), (0, 8)], 3: [(3, 2, 3), (0, 7, 1)], 4: [(2, 2, 2, 2), (0, 5, 0, 3)]}

CASES = [
    Case((8, 3, 6, 7), torch.float64),
    Case((8, 5, 6, 7), torch.float64, activation="relu", residual=True, channels_last=True),
    Case((8, 3, 5), torch.float64, activation="gelu", residual=True),
    Case((8, 12), torch.float64, activation="silu", momentum=None),
    Case((8, 3, 2, 3, 4), torch.float64, activation="leaky_relu", channels_last=True),
    Case((8, 5, 6, 7), mean=3.0, channels_last=True, biased_running_var=True),
    Case((8, 20, 3, 3), torch.bfloat16, None, True, True, "relu", residual=True, momentum=None),
    Case((8, 12, 4, 4), torch.float16, channels_last=True, statistics=False),
    Case((8, 5, 1, 1), activation="tanh", weight=False, bias=False),
]


def module_of(arguments: Arguments) -> FusedSyncBatchNormAct:
    """A module with the parameters and buffers of a case."""
    case = arguments.case
    module = FusedSyncBatchNormAct(
        case.shape[1], case.eps, case.momentum, case.weight, case.statistics,
        act_layer=case.activation, biased_running_var=case.biased_running_var,
    )  # fmt: skip
    for name in ("weight", "bias"):
        if getattr(arguments, name) is not None:
            setattr(module, name, torch.nn.Parameter(getattr(arguments, name)))
    if case.statistics:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(module, name, getattr(arguments, name))
    return module


def results_of_part(rank: int, split: tuple[int, ...], case: Case, device: torch.device) -> dict:
    """What a process computes of its part of the batch, by the names that the oracle gives it."""
    torch.manual_seed(0)
    arguments = make_arguments(case, device)
    module = module_of(arguments)

    def part(t):
        return None if t is None else t.split(split)[rank].detach()

    x, dy, residual = map(part, (arguments.input, arguments.grad_output, arguments.residual))
    leaves = {"input": x, "residual": residual}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items() if t is not None}
    with poisoned():
        y = module(*leaves.values())
        parameters = dict(module.named_parameters())
        grads = torch.autograd.grad(y, [*leaves.values(), *parameters.values()], dy)
    found = {f"grad_{name}": grad for name, grad in zip([*leaves, *parameters], grads)}
    buffers = dict(module.named_buffers()) if case.statistics else {}
    return {"output": y.detach(), **found, **buffers}


def parity(rank: int, splits: list, cases: list[Case], backend: str, device: torch.device) -> list:
    with fastbn.use_backend(backend):
        return [results_of_part(rank, s, case, device) for s in splits for case in cases]


def joined(parts: list[dict]) -> dict:
    """The results of one process on the whole batch, from those of all parts."""
    found = {}
    for name in parts[0]:
        of_ranks = [part[name] for part in parts]
        if name in ("output", "grad_input", "grad_residual"):
            found[name] = torch.cat([t for t in of_ranks if len(t)])
        elif name.startswith("grad_"):
            found[name] = sum(of_ranks)
        else:
            assert all(t.equal(of_ranks[0]) for t in of_ranks), f"{name} differs between processes"
            found[name] = of_ranks[0]
    return found


@pytest.mark.parametrize(
    ("world", "backend"), [*((world, "torch") for world in SPLITS), (2, "triton"), (3, "triton")]
)
def test_parts_give_what_one_process_makes_of_the_whole(world, backend, device):
    """Outputs, gradients, running statistics and counters, by the rule for one process."""
    # The interpreter is slow.
    cases = CASES if backend == "torch" else CASES[:7] if world == 2 else CASES[:2]
    found = run(world, parity, SPLITS[world], cases, backend, device)
    for i, split in enumerate(SPLITS[world]):
        for j, case in enumerate(cases):
            torch.manual_seed(0)
            arguments = make_arguments(case, device)
            actual = joined([of_rank[i * len(cases) + j] for of_rank in found])
            expected = expect(arguments)
            if not case.statistics:
                actual["num_batches_tracked"] = expected.native["num_batches_tracked"]
            print(split)
            assert_right(actual, arguments, expected)

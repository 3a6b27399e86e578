"""Counts the bytes that kernels load and store, to compare them with the plan's.

    python -m tests.traffic

The kernels run in Triton's interpreter, where an element counts if its mask is true, however a GPU
gathers elements to sectors. The interpreter has no cache: the first access to an element counts as
one to memory, and all later ones as accesses to the cache. A GPU is likely to find them there if
little else was read in between. Two passes don't rely on that, and their plans count both readings
as ones from memory.

What plans leave out is counted apart: parameters, statistics, partial results, counters, and the
sample, which is three values for each column or plane of a run whose moments are computed, and for
each channel whose moments are merged.

The interpreter serves one ticket after the other. A GPU serves many at the same time, which adds
that many tickets to the distance between two accesses of an element.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from unittest import mock

if __name__ == "__main__":
    # Triton reads the variable when the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

import fastbn
from fastbn.activations import saved_for
from fastbn.kernels import plan
from fastbn.kernels.device import INTERPRETER, Device
from fastbn.kernels.schedules import Schedule
from fastbn.kernels.tiling import MASK_BITS, Problem
from fastbn.runtime import execution_plan, plan_cache
from fastbn.runtime.launcher import Launcher
from fastbn.runtime.layout import problem_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The arguments that are as large as the input, or are a packed mask; all others are small.
# READ_AGAIN names those that the second phase reads again.
LARGE = ("X", "R", "Y", "Mask", "DY", "DX", "DR")
READ_AGAIN = {"forward": ("X",), "backward": ("DY", "X", "R", "Mask")}


@dataclass(frozen=True)
class Case:
    """A forward and its backward, and the strategy by which both are planned."""

    shape: tuple[int, ...]
    channels_last: bool
    strategy: str
    dtype: str = "fp32"
    activation: str = "none"
    residual: bool = False

    @property
    def epilogue(self) -> str:
        activation = "" if self.activation == "none" else f"+{self.activation}"
        return "BN" + "+add" * self.residual + activation


class Traffic:
    """All accesses of one direction of a call.

    Attributes:
        problem, schedule: what was planned.
        sizes: bytes of each tensor, by its argument's name.
        moved: bytes of each tensor that were loaded or stored, however often.
        fresh: bytes of each tensor that were accessed for the first time.
    """

    def __init__(self, direction: str, problem: Problem, device: Device) -> None:
        self.direction, self.problem = direction, problem
        self.schedule: Schedule = plan.make_schedule(problem, device, direction == "backward")
        self.sizes: dict[str, int] = {}
        self.moved: Counter[str] = Counter()
        self.fresh: Counter[str] = Counter()
        self._arguments: list[tuple[str, int, int]] = []
        # `_accesses` has the tensor and the fresh bytes of each access, `_touched` the number of
        # the last access to each element. `_again` has a pair for each access to elements that were
        # accessed before: the access, and the earliest of those that last touched its elements.
        self._accesses: list[tuple[str, int]] = []
        self._touched: dict[str, np.ndarray] = {}
        self._again: list[tuple[int, int]] = []

    def launch(self, launcher: Launcher, tensors: tuple) -> None:
        """Notes the tensors of a launch, to which all accesses belong from now on."""
        self._arguments = [
            (name, tensor.data_ptr(), tensor.nbytes)
            for name, tensor in zip(launcher.kernel.arg_names, tensors)
            if tensor is not None
        ]
        self.sizes |= {name: bytes for name, _, bytes in self._arguments}

    def access(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        """Counts a load or a store."""
        pointers = pointers[np.broadcast_to(mask.astype(bool), pointers.shape)]
        if not pointers.size:
            return
        name, start = next(
            (name, start)
            for name, start, bytes in self._arguments
            if start <= pointers.min() and pointers.max() < start + bytes
        )
        if name not in self._touched:
            self._touched[name] = np.full(self.sizes[name] // itemsize, -1)
        touched = self._touched[name]
        elements = (pointers - start) // itemsize
        before = touched[elements]
        touched[elements] = now = len(self._accesses)
        fresh = np.unique(elements[before < 0]).size * itemsize
        self._accesses.append((name, fresh))
        self.fresh[name] += fresh
        self.moved[name] += pointers.size * itemsize
        if name in LARGE and (before >= 0).any():
            self._again.append((now, before[before >= 0].min()))

    @property
    def units(self) -> float:
        """All loads and stores but the sample's, each tensor in units of its size as in plans."""
        return self._units(self.moved - Counter(X=self.sample))

    @property
    def units_of_memory(self) -> float:
        """The same as `units`, for first accesses alone."""
        return self._units(self.fresh)

    @property
    def sample(self) -> int:
        """Bytes loaded for the sample."""
        if self.direction == "backward" or self.schedule.strategy in ("resident", "fixed-stats"):
            return 0
        reduce, problem = self.schedule.reduce, self.problem
        tile, groups = reduce.tile, reduce.groups(problem)
        lanes = reduce.programs(problem) * (1 if tile.layout == "planes" else tile.q)
        merges = -(-reduce.width // problem.s // tile.merge_channels)
        return 3 * problem.itemsize * (lanes + groups * merges * tile.merge_channels)

    @property
    def other(self) -> float:
        """What plans leave out, as a fraction of what they count."""
        small = sum(bytes for name, bytes in self.moved.items() if name not in LARGE)
        return (small + self.sample) / (sum(self.moved.values()) - small - self.sample)

    @property
    def other_of_memory(self) -> float:
        """The same as `other`, for first accesses alone."""
        small = sum(bytes for name, bytes in self.fresh.items() if name not in LARGE)
        return small / (sum(self.fresh.values()) - small)

    @property
    def slice_bytes(self) -> float:
        """Bytes of a slice that a ticketed launch reads again."""
        columns = self.schedule.slice_groups * self.schedule.reduce.width
        bytes = sum(self.sizes.get(name, 0) for name in READ_AGAIN[self.direction])
        return bytes * columns / (self.problem.c * self.problem.s)

    def distance(self, names: tuple[str, ...] = LARGE) -> int:
        """Returns the most fresh bytes of these tensors between two accesses of an element."""
        fresh = [bytes if name in names else 0 for name, bytes in self._accesses]
        until = np.cumsum([0, *fresh])
        return max((until[now] - until[before] for now, before in self._again), default=0)

    def _units(self, bytes: Counter[str]) -> float:
        # A mask's rows end in whole bytes, but plans count its bits.
        worth = dict.fromkeys(LARGE, 1.0) | {"Mask": 1 / (MASK_BITS * self.problem.itemsize)}
        return sum(worth[name] * bytes[name] / self.sizes[name] for name in LARGE if bytes[name])


def measure(case: Case, device: Device = INTERPRETER) -> tuple[Traffic, Traffic]:
    """Runs a case, planned for a device, and returns the traffic of forward and backward."""
    training, saves = case.strategy != "fixed-stats", saved_for(case.activation, case.residual)
    x = torch.randn(case.shape).to(DTYPES[case.dtype])
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, mean, var = (torch.ones(x.shape[1]) for _ in range(4))
    residual = torch.randn_like(x).requires_grad_() if case.residual else None
    leaves = [t.requires_grad_() for t in (x.clone(), weight, bias)]
    with _planned(case.strategy, device), fastbn.use_backend("triton"):
        problem = problem_of(x, training, case.residual, saves if saves == "mask" else None)
        forward = Traffic("forward", problem, device)
        problem = problem_of(x, training, saves is not None, saves)
        backward = Traffic("backward", problem, device)
        with _counted(forward):
            y = fastbn.batch_norm(
                leaves[0], mean, var, *leaves[1:], training, activation=case.activation,
                residual=residual,
            )  # fmt: skip
        with _counted(backward):
            torch.autograd.grad(y, [*leaves, residual][: 3 + case.residual], x)
    return forward, backward


@contextmanager
def _planned(strategy: str, device: Device) -> Iterator[None]:
    """Within the block, calls are planned for the device and by the strategy."""
    plan_cache.clear()
    with (
        mock.patch.object(plan, "choose", lambda found: found[strategy]),
        mock.patch.object(execution_plan, "device_facts", return_value=device),
    ):
        yield
    plan_cache.clear()


@contextmanager
def _counted(traffic: Traffic) -> Iterator[None]:
    """Within the block, the accesses of all launches are counted."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, launch = InterpreterBuilder.create_atomic_rmw, Launcher.__call__

    def count(pointers, mask):
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        traffic.access(pointers.data, mask.data, itemsize)

    def counted_load(self, pointers, mask, *rest, **named):
        count(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest, **named):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def counted_atomic(self, operation, pointers, value, mask, *rest):
        count(pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def noted_launch(self, tensors, *floats):
        traffic.launch(self, tensors)
        return launch(self, tensors, *floats)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", counted_atomic),
        mock.patch.object(Launcher, "__call__", noted_launch),
    ):
        yield


# A shape and whether its channels are last, for each layout of tiles and for tiles all masked.
LAYOUTS = {
    "planes": ((2, 20, 64, 64), False),
    "channels": ((3, 224, 8, 8), True),
    "columns": ((136, 8, 7, 7), False),
    "masked": ((5, 21, 9, 9), False),
}
STRATEGIES = ("two-pass", "resident", "ticketed", "fixed-stats")
EPILOGUES = (("none", False), ("relu", True), ("silu", True))


def cases() -> Iterator[tuple[str, Case]]:
    """Yields the name of a layout and a case, for all combinations."""
    for strategy, name, dtype, epilogue in product(STRATEGIES, LAYOUTS, DTYPES, EPILOGUES):
        if (strategy, name) != ("resident", "columns"):
            yield name, Case(*LAYOUTS[name], strategy, dtype, *epilogue)


def main() -> None:
    """Prints a line for each case and direction."""
    print(
        "In tensors of the input's size. Planned: reads and writes of memory, and what is to come\n"
        "from the cache. Counted: once what each launch touches, and what it reads again. Apart:\n"
        "slices first touched in between, of what is read again and of everything. Other:\n"
        "statistics, parameters and counters, as a share of memory's traffic and of all.\n"
    )
    print(
        f"{'strategy':<11} {'layout':<8} {'dtype':<5} {'epilogue':<12} {'direction':<9} "
        f"{'planned':>9} {'+cached':>8} {'counted':>9} {'+again':>8} {'apart':>10} "
        f"{'other memory':>13} {'other all':>10}"
    )
    for layout, case in cases():
        for traffic in measure(case):
            schedule, memory = traffic.schedule, traffic.units_of_memory
            apart = ""
            if schedule.strategy == "ticketed":
                kept = traffic.distance(READ_AGAIN[traffic.direction])
                bytes = traffic.slice_bytes
                apart = f"{kept / bytes:.2f} {traffic.distance() / bytes:.2f}"
            print(
                f"{case.strategy:<11} {layout:<8} {case.dtype:<5} {case.epilogue:<12} "
                f"{traffic.direction:<9} {schedule.units:>9g} {schedule.cached_units:>8g} "
                f"{memory:>9g} {traffic.units - memory:>8g} {apart:>10} "
                f"{traffic.other_of_memory:>13.1%} {traffic.other:>10.1%}"
            )


if __name__ == "__main__":
    main()

"""`pytest benchmarks --benchmark-only` compares eager PyTorch, torch.compile and fastbn."""

from functools import lru_cache, partial
from time import perf_counter

import pytest
import torch

from . import rivals
from .check import worst_error
from .inputs import input_sets
from .shapes import cases
from .timing import copy_bandwidth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
WHERE = "" if GPU else "CPU run of small shapes, no statement about any GPU: "
ROUNDS = 20

measured_copy_bandwidth = lru_cache(partial(copy_bandwidth, DEVICE))
no_compiler = lru_cache(partial(rivals.no_compiler, DEVICE))


def synchronised() -> float:
    """Returns the time in seconds after all work given to the device is done."""
    if GPU:
        torch.cuda.synchronize()
    return perf_counter()


@lru_cache(maxsize=1)
def sets_of(case):
    return input_sets(case, DEVICE)


@lru_cache(maxsize=1)
def checked(case, name):
    """Makes a rival and checks its results; this call also compiles its kernels."""
    rival = rivals.RIVALS[name](case, DEVICE)
    assert worst_error(case, rival, sets_of(case)[0]) <= 1
    return rival


@pytest.fixture(autouse=True)
def _kernels_only():
    with rivals.kernels_only(DEVICE):
        yield


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("direction", rivals.DIRECTIONS)
@pytest.mark.parametrize("name", rivals.RIVALS)
@pytest.mark.parametrize("case", cases(GPU, quick=False), ids=str)
def test_batch_norm(case, name, direction, benchmark):
    if name in rivals.COMPILED and no_compiler():
        pytest.skip(f"torch.compile does not work here: {no_compiler()}")
    if name == "cooperative" and not GPU:
        pytest.skip("only kernels for a GPU have cooperative reductions")
    rival, sets = checked(case, name), sets_of(case)
    benchmark.group = f"{WHERE}{len(sets)} calls, {direction}, {case}"
    benchmark.pedantic(rivals.DIRECTIONS[direction], (rival, sets), rounds=ROUNDS, warmup_rounds=2)
    rate = len(sets) * case.floor_bytes(direction) / benchmark.stats.stats.median
    benchmark.extra_info["gb_per_s"] = rate / 1e9
    benchmark.extra_info["fraction_of_copy"] = rate / measured_copy_bandwidth()

"""With a GPU the tests run on it; without one the kernels run in Triton's interpreter."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when the kernels are imported, hence before any test module.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def force_strategy(monkeypatch):
    """Makes the planner choose one strategy wherever there is a choice."""
    from fastbn.kernels import plan

    def force(strategy):
        choose = plan.choose_strategy
        monkeypatch.setattr(
            plan, "choose_strategy", lambda p: strategy if p.training else choose(p)
        )
        plan.make_plan.cache_clear()

    yield force
    plan.make_plan.cache_clear()


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles so small that small tensors take many of them, and many splits to merge."""
    from fastbn.kernels import plan

    monkeypatch.setattr(plan, "TILE_BYTES", 512)
    monkeypatch.setattr(plan, "MERGE_ELEMENTS", 16)
    monkeypatch.setattr(plan, "PROGRAMS_PER_SM", 24)
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()

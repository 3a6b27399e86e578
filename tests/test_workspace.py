"""Tests the workspaces, which hold the counters and partial results of launches."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from fastbn.runtime import workspace
from fastbn.runtime.workspace import GROUPS, PARTIAL_BYTES, get_workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _none_before():
    workspace.discard()
    yield
    workspace.discard()


@pytest.mark.parametrize("groups", [1, 2, 3, GROUPS - 1, GROUPS, GROUPS + 1, 70001])
def test_counters_are_zero_aligned_and_long_enough(groups):
    arrivals, tickets, *_, served, _ = get_workspace(CPU, groups)
    assert served >= groups
    assert arrivals.dtype == torch.int32
    assert tickets.dtype == torch.int64
    for part in (arrivals, tickets):
        assert len(part) > groups
        assert not part.any()
        # With unaligned counters each launch would go through Triton's slow dispatch.
        assert part.data_ptr() % 16 == 0
    arrivals.fill_(7)
    assert not tickets.any()


def test_one_workspace_serves_all_calls_and_grows():
    first = get_workspace(CPU, 5)
    assert get_workspace(CPU, GROUPS) is first
    more = get_workspace(CPU, GROUPS + 1)
    assert more is not first
    assert get_workspace(CPU, 3) is more
    workspace.discard()
    assert get_workspace(CPU, 3) is not more


@pytest.mark.parametrize("bytes", [0, 8, 12, PARTIAL_BYTES, PARTIAL_BYTES + 4])
def test_partial_results_have_room(bytes):
    found = get_workspace(CPU, 1, bytes)
    assert found.partial_bytes >= bytes
    for dtype, partials in found.partials.items():
        assert partials.dtype == dtype
        assert partials.nbytes >= bytes
        assert partials.data_ptr() % 16 == 0
    assert set(found.partials) == {torch.float32, torch.float64}
    assert not found.arrivals.any()
    for partials in found.partials.values():
        partials.fill_(1.0)
    assert not found.arrivals.any()
    assert not found.tickets.any()


def test_neither_part_shrinks():
    many = get_workspace(CPU, GROUPS + 1)
    large = get_workspace(CPU, 1, 2 * PARTIAL_BYTES)
    assert large is not many
    assert large.groups == GROUPS + 1
    assert get_workspace(CPU, GROUPS + 1, PARTIAL_BYTES) is large
    most = get_workspace(CPU, GROUPS + 2)
    assert most.partial_bytes == 2 * PARTIAL_BYTES


@pytest.fixture
def gpu(monkeypatch):
    """Returns a fake GPU with what workspaces ask for: its stream, and whether it captures."""
    made = SimpleNamespace(stream=1, capturing=False, current=0, threads=[], filled_in=[])
    device = SimpleNamespace(type="cuda", index=0)

    @contextlib.contextmanager
    def guard(device):
        before, made.current = made.current, device.index
        yield
        made.current = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: made.capturing and made.current == 0
    )
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: made.stream, raising=False
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.stream)

    @contextlib.contextmanager
    def entered(stream):
        made.filled_in.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "stream", entered)
    make = workspace._make

    def spy(device, *sizes):
        made.threads.append(threading.current_thread())
        return make(CPU, *sizes)

    monkeypatch.setattr(workspace, "_make", spy)
    made.device = type("Device", (), vars(device))()
    return made


def test_each_stream_has_its_own_workspace(gpu):
    first = get_workspace(gpu.device, 5)
    gpu.stream = 2
    second = get_workspace(gpu.device, 5)
    assert second.tickets.data_ptr() != first.tickets.data_ptr()
    gpu.stream = 1
    assert get_workspace(gpu.device, 5) is first
    # Each workspace is filled in its own stream, so that the launch that follows finds it filled.
    assert gpu.filled_in == [1, 2]


@pytest.mark.parametrize("current", [0, 1])
def test_a_graph_has_its_own_workspace(gpu, current):
    """The graph may be replayed in any stream, while launches run in this one."""
    eager = get_workspace(gpu.device, 5)
    gpu.capturing, gpu.current = True, current
    captured = get_workspace(gpu.device, 5)
    assert captured is not eager
    assert get_workspace(gpu.device, 5) is not captured
    gpu.capturing = False
    assert get_workspace(gpu.device, 5) is eager


def test_what_lasts_is_allocated_by_another_thread(gpu):
    """The calling thread may be about to capture a graph, whose memory nothing may keep."""
    get_workspace(gpu.device, 5)
    gpu.capturing = True
    get_workspace(gpu.device, 5)
    assert [thread is threading.current_thread() for thread in gpu.threads] == [False, True]

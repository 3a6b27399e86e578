"""Tests the probes of benchmarks/gpu, and the constants that follow from their times."""

from itertools import product

import pytest
import torch

from benchmarks.gpu import constants, probes
from benchmarks.gpu.constants import Constants, Copy, Effort
from benchmarks.plans import problem_of
from benchmarks.shapes import cases
from fastbn.kernels import plan
from fastbn.kernels.device import H100, Device
from fastbn.strategy import STRATEGIES

from .test_benchmarks_cases import CPU

L2_BYTES = 2**18


def numbers(*sizes, device):
    return torch.randint(-1000, 1000, sizes, dtype=torch.int32, device=device)


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("visits", [1, 2])
def test_slices_are_read_one_after_the_other(width, visits, device):
    matrix = numbers(512, 64, device=device)
    rows, columns = probes.TILE_BYTES // width, width // probes.ITEMSIZE
    tiles = matrix.view(512 // rows, rows, 64 // columns, columns)
    expected = tiles.sum((1, 3)).T.flatten().repeat(visits)
    assert probes.read_slices(matrix, width, visits).tolist() == expected.tolist()


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_slices_are_copied_and_read_as_often_as_asked(reads, device):
    source = numbers(4 * 3 * probes.TILE, device=device)
    target = torch.zeros_like(source)
    sums = probes.copy_slices(source, target, 3 * probes.TILE_BYTES, reads)
    expected = source.view(4, 1, 3, probes.TILE).sum(-1).expand(-1, reads, -1)
    assert sums.tolist() == expected.flatten().tolist()
    assert target.equal(source)


def test_touch_sets_every_flag(device):
    flags = torch.zeros(5, dtype=torch.int32, device=device)
    probes.touch(flags)
    assert flags.tolist() == [1] * 5


@pytest.mark.parametrize("atomic", [False, True])
def test_each_program_draws_one_ticket(atomic, device):
    tickets = torch.zeros(1, dtype=torch.int64, device=device)
    for generation in (1, 2):
        drawn = torch.zeros(7, dtype=torch.int32, device=device)
        probes.draw(tickets, drawn, atomic)
        assert drawn.tolist() == [1] * 7
        assert tickets.tolist() == [generation << 32 if atomic else 0]


def test_flags_are_raised_one_after_the_other(device):
    tickets = torch.zeros(1, dtype=torch.int64, device=device)
    flags = torch.zeros(6, dtype=torch.int64, device=device)
    for generation in (1, 2):
        probes.relay(tickets, flags)
        assert flags.tolist() == [generation] * 6


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_a_list_is_followed(steps, device):
    next = torch.tensor([3, 0, 4, 2, 1], dtype=torch.int32, device=device)
    end = torch.zeros(1, dtype=torch.int32, device=device)
    probes.chase(next, end, steps)
    assert end.item() == [3, 2, 4, 1, 0][steps % 5]


@pytest.mark.parametrize(("splits", "rows"), [(16, 16), (64, 32), (5, 8)])
def test_partial_results_are_merged(splits, rows, device):
    data = torch.randn(splits, 64, 4, device=device, dtype=torch.float64)
    means = data.mean(1).float()
    m2s = (data.var(1, correction=0) * 64).float()
    merged = probes.merge(means, m2s, 64, rows)
    exact = torch.stack([data.mean((0, 1)), data.var((0, 1), correction=0)]).float()
    torch.testing.assert_close(merged, exact)


class FakeGPU(Constants):
    """A GPU that reads 1e12 bytes a second from memory, and four times that from the cache.

    Rows of 32 bytes are read at a quarter of that speed and rows of 64 bytes at half; rows of 128
    bytes seem faster than whole rows. Slices stay in the cache up to 0.6 of its size, or 0.3
    without hints. A launch takes 3 us, a load 0.6 us from memory or 0.2 us from the cache, and a
    ticket 2 ns.
    """

    def __init__(self, monkeypatch):
        super().__init__(CPU, 7, L2_BYTES, Effort(copy_bytes=2**21, places=2**16, steps=8))
        self.launches = []
        for name in ("read_slices", "copy_slices", "chase", "draw"):
            monkeypatch.setattr(probes, name, getattr(self, name))
        monkeypatch.setattr(probes, "touch", self.launches.append)

    def read_slices(self, matrix, width, visits=1):
        bytes = visits * matrix.numel() * probes.ITEMSIZE
        cached = matrix.numel() * probes.ITEMSIZE <= L2_BYTES / 2
        speed = 4 if cached else {32: 0.25, 64: 0.5, 128: 1.01}.get(width, 1)
        return bytes / speed / 1e12

    def copy_slices(self, source, target, slice_bytes, reads, hints):
        again = 0.25 if slice_bytes <= (0.6 if hints else 0.3) * L2_BYTES else 1
        return source.numel() * probes.ITEMSIZE * (2 + (reads - 1) * again) / 1e12

    def chase(self, next, end, steps):
        assert sorted(next.tolist()) == list(range(len(next)))
        cached = next.nbytes <= L2_BYTES / 2
        return 5e-6 + steps * (0.2e-6 if cached else 0.6e-6)

    def draw(self, tickets, drawn, atomic):
        return drawn.numel() * (2e-9 if atomic else 0.5e-9)

    def seconds(self, play):
        self.launches.clear()
        took = play()
        return len(self.launches) * 3e-6 if self.launches else took


class Recorded:
    """The context of a step, which keeps the step's records."""

    def __init__(self, known):
        self.device, self.known, self.records, self.rehearse = CPU, known, [], False

    def record(self, kind, **values):
        self.records.append({"kind": kind, **values})

    def attempt(self, part, work):
        try:
            work()
        except Exception as problem:
            self.record("failure", part=part, error=str(problem))

    def while_time_is_left(self, items):
        return items

    def of(self, kind):
        return [record for record in self.records if record["kind"] == kind]


@pytest.fixture
def fake(monkeypatch):
    found = FakeGPU(monkeypatch)
    monkeypatch.setattr(constants, "Constants", lambda *arguments: found)
    return found


def test_constants_follow_from_the_times_of_probes(fake):
    context = Recorded({"bandwidth": 0.9e12, "environment": {"platform": "Some GPU"}})
    constants.run(context)
    # The fake GPU has no relay and no merge, so that these may fail.
    assert {one["part"] for one in context.of("failure")} <= {"hand_over", "merge_seconds"}
    (line,) = context.of("device")
    assert eval(line["line"]) == Device(
        "Some GPU", 1, constants.TINY_L2, 0.9e12, l2_share=0.5, l2_speed=4.0, launch=3e-6,
        latency=0.6e-6, cache_latency=0.2e-6, ticket=2e-9,
        row_rates=((32, 0.25), (64, 0.5), (128, 1.0), (256, 1.0)),
    )  # fmt: skip
    found = {one["name"]: one["value"] for one in context.of("constant")}
    assert found["program"] == pytest.approx(0.5e-9)
    assert found["l2_share_without_hints"] == 0.25
    copies = {one["hints"]: one["copies"] for one in context.of("copies")}
    assert [copy["share"] for copy in copies[True]] == list(constants.SHARES)
    assert copies[True][0]["twice"] == pytest.approx(1.125 * copies[True][0]["once"])


def test_a_constant_that_cannot_be_had_is_left_out(fake, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(probes, "copy_slices", refuse)
    context = Recorded({})
    constants.run(context)
    failed = [one["part"] for one in context.of("failure")]
    assert failed[0] == "l2_share"
    device = eval(context.of("device")[0]["line"])
    assert (device.bandwidth, device.l2_share) == (None, Device.l2_share)
    assert (device.l2_speed, device.launch) == (4.0, 3e-6)


@pytest.mark.parametrize(
    ("again", "share"),
    [
        ((0.0, 0.1, 0.6), 1.0),  # the cache can't hold a slice larger than itself
        ((-0.1, 0.6, 1.0), 0.5),  # by noise the second reading of the first slice took no time
        ((0.1, 0.7, 0.1), 0.25),  # a fast slice behind a slow one does not count
        ((0.7, 0.7, 0.7), 0.0),
        ((), 0.0),
    ],
)
def test_share_kept_ends_before_the_first_slow_slice(again, share):
    copies = [Copy(of, 2.0, 2.0 + a) for of, a in zip((0.25, 0.5, 1.5), again, strict=False)]
    assert constants.share_kept(copies) == share


def test_every_strategy_serves_some_benchmark_case():
    problems = [problem_of(case) for case in cases(gpu=True, quick=False)]
    found = [plan.schedules(p, H100, backward) for p, backward in product(problems, (False, True))]
    assert {name for schedules in found for name in schedules} == set(STRATEGIES)

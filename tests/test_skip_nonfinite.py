"""With `skip_nonfinite`, batches whose statistics are not finite move no running statistics."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastbn
from fastbn import FusedBatchNorm2d, FusedBatchNormAct2d
from fastbn.runtime.launcher import Launcher

from .oracle import CHANNELS_LAST, Case, check
from .test_overrides import Log
from .test_strategy import KERNELS

NAN, INF = float("nan"), float("inf")
WAYS = ["two-pass", "resident", "ticketed", "pytorch"]


@pytest.fixture(params=WAYS)
def way(request, force_strategy, monkeypatch):
    """Makes one strategy's kernels compute, or PyTorch, and checks that no other strategy did."""
    if request.param == "pytorch":
        with fastbn.use_backend("torch"):
            yield request.param
        return
    force_strategy(request.param)
    launched, launch = set(), Launcher.__call__

    def spy(self, tensors, *floats):
        launched.add(self.kernel.fn.__name__)
        return launch(self, tensors, *floats)

    monkeypatch.setattr(Launcher, "__call__", spy)
    with fastbn.use_backend("triton"):
        yield request.param
    forward = {name for name in launched if "fwd" in name}
    assert forward == set(KERNELS[request.param]), "another strategy was tested"


class Exact:
    """Running statistics in float64, computed by the definition."""

    def __init__(self, norm):
        self.norm = norm
        self.mean, self.var = (t.double().clone() for t in (norm.running_mean, norm.running_var))
        self.count = norm.num_batches_tracked.item()

    def add(self, x):
        """Adds a batch, unless its statistics are not finite in the running statistics' dtype."""
        values = x.double().transpose(0, 1).flatten(1)
        mean = values.mean(1)
        var = values.var(1, correction=0 if self.norm.biased_running_var else 1)
        if all(t.to(self.norm.running_var.dtype).isfinite().all() for t in (mean, var)):
            self.count += 1
            share = self.norm.momentum or 1 / self.count
            self.mean = (1 - share) * self.mean + share * mean
            self.var = (1 - share) * self.var + share * var

    def check(self, rtol=1e-5):
        assert self.norm.num_batches_tracked.item() == self.count
        for name, exact in (("running_mean", self.mean), ("running_var", self.var)):
            found = getattr(self.norm, name).double()
            torch.testing.assert_close(found, exact, rtol=rtol, atol=rtol, msg=name)


def step(norm, x, dy):
    """Returns the output and all gradients of a step."""
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    return y.detach(), *torch.autograd.grad(y, [leaf, *norm.parameters()], dy)


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def images(device):
    """Returns a batch in the layout that takes Triton's interpreter the fewest steps."""
    x = torch.randn(4, 9, 5, 3, device=device)
    return x.contiguous(memory_format=torch.channels_last)


def one_value(value):
    def spoil(x):
        x[1, 3, 2, 1] = value

    return spoil


def squares_overflow(x):
    """Makes the variance of one channel infinite, while its mean and all values are finite."""
    x[:, 7] *= 1e25


BAD = {
    "nan": one_value(NAN),
    "inf": one_value(INF),
    "-inf": one_value(-INF),
    "overflow": squares_overflow,
    "all": lambda x: x.fill_(NAN),
}


@torch.no_grad()
@pytest.mark.parametrize(("channels_last", "momentum"), [(False, 0.3), (True, None)])
def test_a_bad_batch_moves_nothing_and_the_next_counts(channels_last, momentum, way, device):
    norm = FusedBatchNorm2d(9, momentum=momentum, skip_nonfinite=True).to(device)
    format = CHANNELS_LAST[4] if channels_last else torch.contiguous_format
    exact = Exact(norm)
    for spoil in (None, *(BAD.values() if channels_last else [BAD["nan"]]), None):
        x = (3 * images(device) + 1).contiguous(memory_format=format)
        buffers = [b.clone() for b in norm.buffers()]
        if spoil is not None:
            spoil(x)
        norm(x)
        exact.add(x)
        exact.check()
        if spoil is not None:
            assert_same_bits(norm.buffers(), buffers)
    assert exact.count == 2


def test_outputs_and_gradients_are_the_same_as_without(way, device):
    norm, plain = (
        FusedBatchNormAct2d(9, act_layer="silu", skip_nonfinite=skips).to(device)
        for skips in (True, False)
    )
    for bad in ("nan", "overflow", None):
        x, dy = images(device), images(device)
        if bad is not None:
            BAD[bad](x)
        assert_same_bits(step(norm, x, dy), step(plain, x, dy))
    assert norm.num_batches_tracked == 1
    assert norm.running_var.isfinite().all()
    assert plain.num_batches_tracked == 3
    assert not plain.running_var.isfinite().all()


def test_one_bad_channel_of_very_many_decides(way, device):
    """The channel is in the first, a middle or the last block that the last program looks at."""
    norm = fastbn.FusedBatchNorm1d(1100, skip_nonfinite=True).to(device)
    exact = Exact(norm)
    for channel, value in ((None, 0.0), (511, 1e30), (512, NAN), (1099, 1e30), (None, 0.0)):
        x = torch.randn(6, 1100, device=device)
        if channel is not None:
            x[2, channel] = value
        norm(x)
        exact.add(x)
        exact.check()
    assert exact.count == 2


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [("two-pass", torch.float32), ("ticketed", torch.float32), ("ticketed", torch.float64)],
    ids=str,
)
def test_the_last_of_many_groups_decides(strategy, dtype, force_strategy, device):
    """The bad value may be in any group, and the counters come from an earlier launch."""
    force_strategy(strategy)
    norm = FusedBatchNorm2d(20, skip_nonfinite=True).to(device, dtype)
    exact = Exact(norm)
    with fastbn.use_backend("triton"):
        for channel in (None, 0, 19, None):
            x = torch.randn(3, 20, 7, 7, device=device, dtype=dtype)
            if channel is not None:
                x[-1, channel, -1, -1] = INF
            norm(x)
            exact.add(x)
            exact.check()
    assert exact.count == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_are_as_finite_as_their_dtype_allows(dtype, way, device):
    """The variance of float16 values overflows if the statistics are of float16 too."""
    for stats in (torch.float32, dtype):
        tolerance = max(1e-5, 8 * torch.finfo(stats).eps)
        norm = fastbn.FusedBatchNorm1d(8, skip_nonfinite=True).to(device, stats)
        exact = Exact(norm)
        for scale, spoil in ((1.0, False), (600.0, False), (1.0, True), (1.0, False)):
            x = (scale * torch.randn(16, 8, device=device)).to(dtype)
            if spoil:
                x[0, 6] = INF
            norm(x)
            exact.add(x)
            exact.check(tolerance)
        assert exact.count == (2 if stats == torch.float16 else 3)


@pytest.mark.parametrize(
    ("shape", "momentum", "biased"), [((6, 8), None, True), ((2, 3, 2, 2), 0.1, False)], ids=str
)
@pytest.mark.parametrize("strategy", ["two-pass", "resident", "ticketed"])
def test_good_batches_are_held_to_the_rule(
    strategy, shape, momentum, biased, force_strategy, device
):
    force_strategy(strategy)
    case = Case(shape, momentum=momentum, biased_running_var=biased, skip_nonfinite=True)
    check(case, device)


def test_a_biased_variance_is_skipped_too(way, device):
    norm = FusedBatchNorm2d(9, skip_nonfinite=True, biased_running_var=True).to(device)
    exact = Exact(norm)
    for bad in (None, "nan", "overflow", None):
        x = torch.randn(2, 9, 3, 2, device=device)
        if bad is not None:
            BAD[bad](x)
        norm(x)
        exact.add(x)
        exact.check()
    assert exact.count == 2


def test_the_function_skips_bad_batches_without_a_count(way, device):
    mean, var = torch.zeros(9, device=device), torch.ones(9, device=device)
    x = images(device)
    expected = fastbn.batch_norm(x, mean.clone(), var.clone(), training=True)
    for spoil in (*BAD.values(), None):
        batch = x.clone()
        if spoil is not None:
            spoil(batch)
        y = fastbn.batch_norm(batch, mean, var, training=True, momentum=0.5, skip_nonfinite=True)
        if spoil is not None:
            assert mean.eq(0).all()
            assert var.eq(1).all()
    assert y.equal(expected)
    torch.testing.assert_close(mean, 0.5 * x.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.5 + 0.5 * x.var((0, 2, 3)))


def test_without_running_statistics_nothing_changes(way, device):
    x = images(device)
    x[0, 0, 0, 0] = NAN
    found = fastbn.batch_norm(x, None, None, training=True, skip_nonfinite=True)
    assert_same_bits([found], [fastbn.batch_norm(x, None, None, training=True)])


def test_fixed_statistics_ignore_skip_nonfinite(device):
    """In eval mode and in frozen norms nothing moves the running statistics anyway."""
    x = images(device)
    x[0, 0, 0, 0] = NAN
    for backend in ("triton", "torch"):
        with fastbn.use_backend(backend):
            for skips in (False, True):
                norm = FusedBatchNorm2d(9, skip_nonfinite=skips).to(device).eval()
                expected = norm(x)
                frozen = fastbn.freeze(torch.nn.Sequential(norm).train())
                assert_same_bits([frozen(x)], [expected])
                assert norm.running_mean.eq(0).all()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_skipping_compiles_to_one_graph(backend, momentum, device):
    norm = FusedBatchNorm2d(9, momentum=momentum, skip_nonfinite=True).to(device)
    exact = Exact(norm)
    with fastbn.use_backend(backend):
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        for bad in (None, "inf", None):
            x = images(device)
            if bad is not None:
                BAD[bad](x)
            compiled(x)
            exact.add(x)
            exact.check()
    assert exact.count == 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_pytorchs_path_asks_no_device_for_a_value(momentum):
    """Uses fake tensors: these have no values, so that reading one is an error."""
    with fastbn.use_backend("torch"), FakeTensorMode():
        norm = FusedBatchNorm2d(9, momentum=momentum, skip_nonfinite=True)
        assert norm(torch.randn(4, 9, 5, 3)).shape == (4, 9, 5, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_cuda_graph_decides_at_each_replay(momentum, way, device):
    norm = FusedBatchNorm2d(9, momentum=momentum, skip_nonfinite=True).to(device)
    x = images(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        norm(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm(x)
    exact = Exact(norm)
    for bad in (None, "nan", None, "overflow", None):
        x.normal_()
        if bad is not None:
            BAD[bad](x)
        graph.replay()
        exact.add(x)
        exact.check()
    assert exact.count == 4


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_mode_sees_skip_nonfinite_of_functions_alone(momentum, way, device):
    """A module decides itself whether a batch counts, and calls the function without the option."""
    norm = FusedBatchNorm2d(9, momentum=momentum, skip_nonfinite=True).to(device)
    exact = Exact(norm)
    with Log() as log:
        for bad in (None, "nan", None):
            x = images(device)
            if bad is not None:
                BAD[bad](x)
            norm(x)
            exact.add(x)
            exact.check()
        x[0, 0, 0, 0] = NAN
        mean, var = norm.running_mean, norm.running_var
        fastbn.batch_norm(x, mean, var, training=True, skip_nonfinite=True)
        exact.check()
    assert [kwargs["skip_nonfinite"] for _, kwargs in log.calls] == [False] * 3 + [True]
    assert log.calls[-1][0][1] is mean


def test_a_refused_call_is_refused_as_without(way, device):
    norms = [FusedBatchNorm2d(9, skip_nonfinite=skips).to(device) for skips in (True, False)]
    calls = [
        lambda norm: norm(torch.randn(1, 9, 1, 1, device=device)),
        lambda norm: norm(torch.randn(2, 8, 2, 2, device=device)),
        lambda norm: norm(torch.ones(2, 9, 2, 2, dtype=torch.int64, device=device)),
    ]
    x = torch.randn(2, 9, 2, 2, device=device)
    for args in (
        {"momentum": None},
        {"momentum": "a"},
        {"eps": -1.0},
        {"running_mean": None},
        {"running_mean": torch.zeros(1, device=device)},
        {"running_var": [1.0]},
    ):

        def call(norm, args=args):
            given = {"running_mean": norm.running_mean, "running_var": norm.running_var} | args
            fastbn.batch_norm(x, training=True, skip_nonfinite=norm.skip_nonfinite, **given)

        calls.append(call)
    for call in calls:
        errors = []
        for norm in norms:
            with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
                call(norm)
            errors.append((caught.type, str(caught.value)))
            assert norm.running_mean.eq(0).all()
            assert norm.running_var.eq(1).all()
            assert norm.num_batches_tracked == 0
        assert errors[0] == errors[1]
    for norm in norms:
        norm(x)  # one call that runs, since the fixture `way` looks for launches


def test_modules_say_that_they_skip():
    for kind in (FusedBatchNorm2d, FusedBatchNormAct2d):
        assert "skip_nonfinite" not in repr(kind(3))
        norm = kind(3, skip_nonfinite=True, biased_running_var=True)
        assert repr(norm).count(", biased_running_var=True, skip_nonfinite=True") == 1
        assert norm.state_dict().keys() == kind(3).state_dict().keys()

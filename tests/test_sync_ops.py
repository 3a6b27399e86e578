"""Moments of parts of a batch, and what the kernels and PyTorch's operations make of them."""

import pytest
import torch

from fastbn.runtime import sync_ops
from fastbn.sync import steps
from fastbn.sync.autograd import SyncBatchNorm

TAKEN = pytest.mark.parametrize("taken", [steps, sync_ops], ids=["torch", "triton"])


def merged(taken, gathered, momentum=0.1, correction=1.0, skip=False):
    """Merges moments, with running statistics of 2 and 3 and a counter of 4.

    Returns mean, variance, count, and what becomes of running statistics and counter. The bias
    has to come out as it went in, unless there are no values.
    """
    channels = gathered.shape[1] // 3
    mean, var = gathered.new_full((2, channels), 2.0).unbind()
    var += 1
    counter = torch.tensor(4, device=gathered.device)
    bias = torch.randn_like(mean)
    written = (mean, var, counter)
    numbers = (momentum, correction, 0.0, skip)
    statistics, count = taken.merge(gathered, bias, *written, *numbers)
    assert count == 0 or statistics[2].equal(bias)
    return statistics[0], statistics[1] ** -2, count, mean, var, counter


@TAKEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 16, 41])
def test_moments_of_many_processes(taken, dtype, ranks, device):
    """Sizes from 0 to 4 rows, and more channels than one program merges."""
    sizes = [rank % 5 for rank in range(ranks)] if ranks > 1 else [7]
    x = (torch.randn(sum(sizes), 70, dtype=torch.float64) * 2 + 5).to(device, dtype)
    # The interpreter is slow, and the moments are the same.
    take = taken.moments if ranks == 1 else steps.moments
    gathered = torch.stack([take(part) for part in x.split(sizes)])
    mean, var, count, running_mean, running_var, counter = merged(taken, gathered, None, 0.0)
    exact = x.double()
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0, "check_dtype": False}
    torch.testing.assert_close(mean, exact.mean(0), **close)
    torch.testing.assert_close(var, exact.var(0, correction=0), **close)
    assert count == sum(sizes)
    # The fifth batch has a fifth of the average.
    torch.testing.assert_close(running_mean, 2 * 0.8 + exact.mean(0) / 5, **close)
    torch.testing.assert_close(running_var, 3 * 0.8 + exact.var(0, correction=0) / 5, **close)
    assert counter == 5


@TAKEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("units", [1e-2, 30, 1e3])
def test_means_far_from_zero_leave_variances_their_digits(taken, dtype, units, device):
    """Deviations are some units of the mean's last digit, and rounding takes half a unit."""
    mean = -1e4
    deviation = units * abs(mean) * torch.finfo(dtype).eps
    x = (torch.randn(64, 9, dtype=torch.float64) * deviation + mean).to(device, dtype)
    gathered = torch.stack([taken.moments(part) for part in x.split([1, 20, 0, 43])])
    found, var, *_ = merged(taken, gathered)
    exact = x.double() - mean
    unit = torch.finfo(dtype).eps
    assert (found.double() - mean - exact.mean(0)).abs().max() <= unit * abs(mean)
    expected = exact.var(0, correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=20 * unit, atol=0)


@TAKEN
def test_moments_that_are_not_finite(taken, device):
    """They stay in their channel, and where squares overflow, so does the variance alone."""
    x = torch.ones(6, 4, device=device)
    x[2, 0], x[:3, 1], x[3:, 1] = float("nan"), 3e38, -3e38
    gathered = torch.stack([taken.moments(part) for part in x.split([3, 3])])
    mean, var, *_ = merged(taken, gathered)
    assert mean.isnan().tolist() == [True, False, False, False]
    assert var[0].isnan()
    assert var[1] == float("inf")
    assert var[2:].eq(0).all()
    x = 3e38 * (1 - 1e-3 * torch.rand(6, 2, device=device))
    mean, var, *_ = merged(taken, torch.stack([taken.moments(part) for part in x.split([3, 3])]))
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)
    assert var.isinf().all()


@TAKEN
def test_a_batch_without_values_changes_the_counter_alone(taken, device):
    moments = taken.moments(torch.zeros(0, 3, 2, device=device))
    *_, count, mean, var, counter = merged(taken, torch.stack([moments, moments]))
    assert (count.item(), counter.item()) == (0, 5)
    assert mean.eq(2).all()
    assert var.eq(3).all()


@TAKEN
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None])
def test_batches_that_are_not_finite_are_skipped_as_a_whole(taken, wrong, device):
    """In one channel of one process, of more than a program merges; averages or not."""
    x = torch.arange(280.0, device=device).view(4, 70)
    if wrong is not None:
        x[3, 69] = wrong
    gathered = torch.stack([taken.moments(part) for part in x.split([2, 2])])
    for momentum in (0.5, None):
        *_, mean, var, counter = merged(taken, gathered, momentum, 0.0, skip=True)
        assert counter == (5 if wrong is None else 4)
        rate = 0.0 if wrong is not None else 0.2 if momentum is None else momentum
        expected = [(1 - rate) * 2 + rate * x.mean(0), (1 - rate) * 3 + rate * 6125]
        if wrong is None:
            torch.testing.assert_close(mean, expected[0])
            torch.testing.assert_close(var, torch.full_like(var, expected[1]))
        else:
            assert mean.eq(2).all()
            assert var.eq(3).all()


@TAKEN
def test_one_value_is_the_mean_and_has_no_unbiased_variance(taken, device):
    empty = taken.moments(torch.zeros(0, 3, device=device))
    gathered = torch.stack([empty, taken.moments(torch.full((1, 3), 7.0, device=device))])
    mean, _, _, _, running_var, _ = merged(taken, gathered)
    assert mean.eq(7).all()
    assert running_var.isnan().all()


def test_running_statistics_must_be_contiguous(device):
    gathered, mean = torch.zeros(2, 7, device=device), torch.zeros(3, 2, device=device)[:, 0]
    with pytest.raises(RuntimeError, match="expected moments and running statistics that are con"):
        sync_ops.merge(gathered, None, mean, mean, None, 0.1, 1.0, 1e-5, False)


@TAKEN
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
def test_gradients_of_a_part(taken, residual, device):
    """Of the part's own sums alone they are those of one process; of others' too, they share."""
    x, dy, r = torch.randn(3, 4, 3, 2, 5, dtype=torch.float64, device=device).unbind()
    weight, bias = torch.rand(2, 3, dtype=torch.float64, device=device).unbind()
    whole = [torch.cat([t, 2 * t]).requires_grad_() for t in (x, r)]
    z = torch.nn.functional.batch_norm(whole[0], None, None, weight, bias, True, 0.1, 1e-5)
    z = torch.nn.functional.silu(z + whole[1] if residual else z)
    expected = torch.autograd.grad(z, whole[: 1 + residual], torch.cat([dy, -dy]))

    gathered = torch.stack([taken.moments(x), taken.moments(2 * x)])
    statistics, count = taken.merge(gathered, bias, None, None, None, 0.1, 1.0, 1e-5, False)
    options = ("silu", 0.0, (True, residual, True, True), None)
    saved = [
        (grad, t, added if residual else None, None, weight, statistics)
        for grad, t, added in ((dy, x, r), (-dy, 2 * x, 2 * r))
    ]
    totals = sum(taken.sums(*of_part, *options)[0] for of_part in saved)
    for i, of_part in enumerate(saved):
        found = taken.gradients(*of_part, totals, count, *options)
        for whole_grad, grad in zip(expected, found):
            torch.testing.assert_close(grad, whole_grad[4 * i : 4 * i + 4])


@TAKEN
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("wanted", ["residual", "weight", "bias"])
def test_a_gradient_without_the_inputs_needs_no_other_process(taken, residual, wanted, device):
    if wanted == "residual" and not residual:
        pytest.skip("there is no residual")
    x, r, grad = torch.randn(3, 4, 3, 5, dtype=torch.float64, device=device).unbind()
    weight, bias = torch.rand(2, 3, dtype=torch.float64, device=device).unbind()
    leaf = {"residual": r, "weight": weight, "bias": bias}[wanted].requires_grad_()
    z = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    z = torch.nn.functional.silu(z + r if residual else z)
    (expected,) = torch.autograd.grad(z, leaf, grad)
    with torch.no_grad():
        moments = taken.moments(x)[None]
        given = (moments, bias, None, None, None, 0.1, 1.0, 1e-5, False)
        statistics, count = taken.merge(*given)
    options = (1e-5, "silu", 0.0, None, taken is sync_ops)
    added = r if residual else None
    y = SyncBatchNorm.apply(x, added, weight, bias, statistics, count, options)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, grad), (expected,))

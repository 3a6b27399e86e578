"""`fastbn.batch_norm` takes part in PyTorch's protocol of `__torch_function__`."""

import pytest
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

import fastbn


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request):
    with fastbn.use_backend(request.param):
        yield


class Log(TorchFunctionMode):
    """Lists the calls of `fastbn.batch_norm`, and answers them by a function if it has one."""

    def __init__(self, answer=None):
        super().__init__()
        self.calls, self.answer = [], answer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not fastbn.batch_norm:
            return function(*args, **(kwargs or {}))
        self.calls.append((args, kwargs))
        return (self.answer or function)(*args, **(kwargs or {}))


def test_a_mode_sees_and_replaces_a_call(device):
    x, residual = torch.randn(2, 4, 3, 5, device=device)
    expected = fastbn.batch_norm(x, None, None, training=True, activation="silu", residual=residual)
    with Log() as log:
        found = fastbn.batch_norm(
            x, None, None, training=True, activation="silu", residual=residual
        )
    assert found.equal(expected)
    ((args, kwargs),) = log.calls
    assert args[0] is x
    assert args[5:] == (True, 0.1, 1e-5)
    given = {"activation": "silu", "residual": residual}
    defaults = {"activation_param": None, "biased_running_var": False, "skip_nonfinite": False}
    assert kwargs == defaults | given
    with Log(answer=lambda x, *args, **kwargs: x + 1):
        assert fastbn.batch_norm(x, None, None, training=True).equal(x + 1)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mode_sees_modules_which_count_their_batches(training, momentum, device):
    kinds = (fastbn.FusedBatchNorm2d, fastbn.FusedBatchNorm2d, nn.BatchNorm2d)
    norms = [kind(3, momentum=momentum).to(device).train(training) for kind in kinds]
    x = torch.randn(4, 3, 5, 5, device=device)
    with Log() as log:
        norms[0](x)
        y = norms[0](x)
    assert len(log.calls) == 2
    for norm in norms[1:]:
        norm(x)
        torch.testing.assert_close(y, norm(x))
        torch.testing.assert_close(norms[0].state_dict(), norm.state_dict())


def test_a_call_that_a_mode_refuses_is_not_counted(device):
    def refuse(*args, **kwargs):
        raise PermissionError

    norm = fastbn.FusedBatchNorm2d(3).to(device)
    with Log(answer=refuse), pytest.raises(PermissionError):
        norm(torch.randn(4, 3, 5, 5, device=device))
    assert norm.num_batches_tracked == 0


class Doubled(torch.Tensor):
    """A tensor whose batch norm is twice that of another."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is fastbn.batch_norm else result


def test_a_subclass_overrides_batch_norm(device):
    x = torch.randn(4, 3, 5, device=device)
    with fastbn.use_backend("torch"):
        expected = 2 * fastbn.batch_norm(x, None, None, training=True)
        for input, residual in ((x.as_subclass(Doubled), None), (x, 0 * x.as_subclass(Doubled))):
            y = fastbn.batch_norm(input, None, None, training=True, residual=residual)
            assert type(y) is Doubled
            torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)

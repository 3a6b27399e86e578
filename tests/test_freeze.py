"""Tests frozen norms: fixed statistics in training mode, and torchvision's checkpoints."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.optim.swa_utils import update_bn
from torchvision.ops import FrozenBatchNorm2d

import fastbn
from fastbn import convert, freeze, fuse, revert, unfreeze

from .models import NET_CALLS, Net, assert_alike, fused_calls, pair


def trained_net():
    net = Net()
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8) * 2 + 1)
    return net


def frozen_like(norm, device):
    """Returns torchvision's frozen norm with this norm's state."""
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(device)
    frozen.load_state_dict(norm.state_dict())
    return frozen


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("parameters", [True, False])
def test_frozen_statistics_stay_and_normalise(parameters, backend, device):
    norm = nn.BatchNorm2d(3, eps=1e-2).to(device)
    for _ in range(3):
        norm(torch.randn(8, 3, 4, 4, device=device) * 3 + 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = frozen_like(norm, device)
    before = copy.deepcopy(norm.state_dict())
    assert freeze(norm, parameters=parameters) is norm
    x = torch.randn(8, 3, 4, 4, device=device)
    with fastbn.use_backend(backend):
        for training in (True, False):
            given = [x.clone().requires_grad_() for _ in range(2)]
            outputs = norm.train(training)(given[0]), expected(given[1])
            torch.testing.assert_close(*outputs)
            for output in outputs:
                output.square().mean().backward()
            torch.testing.assert_close(given[0].grad, given[1].grad)
    after = norm.state_dict()
    assert list(after) == list(expected.state_dict())
    assert all(after[name].equal(before[name]) for name in after)
    assert [name for name, _ in norm.named_parameters()] == (
        [] if parameters else ["weight", "bias"]
    )
    if not parameters:
        z = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 0.01).sqrt()
        norm.zero_grad()
        norm(x).sum().backward()
        torch.testing.assert_close(norm.weight.grad, z.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert "frozen" in repr(norm)


def test_checkpoints_load_into_torchvisions_norms_and_back():
    norm, reference = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 5, 5))
    torchvisions = FrozenBatchNorm2d(3)
    ours = freeze(copy.deepcopy(norm))
    torchvisions.load_state_dict(ours.state_dict())
    ours.load_state_dict(norm.state_dict())
    ours.load_state_dict(torchvisions.state_dict())
    reference.load_state_dict(ours.state_dict())
    for name, value in reference.state_dict().items():
        if name != "num_batches_tracked":
            assert value.equal(norm.state_dict()[name])
    with pytest.raises(RuntimeError, match="running_var"):
        ours.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "running_var"})


def test_unfreezing_gives_everything_back():
    with fastbn.use_backend("torch"):
        model, reference = pair(trained_net)
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fuse(freeze(model))
        assert not any("bn" in name for name, _ in model.named_parameters())
        images = torch.randn(4, 3, 8, 8)
        assert fused_calls(model.train(), images)[1] == NET_CALLS
        state = copy.deepcopy(model.state_dict())
        model(images).square().mean().backward()
        optimizer.step()
        moved = {n for n, t in model.state_dict().items() if not t.equal(state[n])}
        norms = {"stem.1", *(n for n in state if "bn" in n or "downsample.1" in n)}
        assert moved
        assert not moved & norms
        model.load_state_dict(state)
        unfreeze(model)
        assert {n: id(p) for n, p in model.named_parameters()} == {
            n: id(p) for n, p in parameters.items()
        }
        assert all(p.requires_grad for p in model.parameters())
        assert_alike(model, reference, [images])
        assert [type(m) for m in revert(model).modules()] == [type(m) for m in reference.modules()]


def test_moved_and_copied_models_stay_frozen():
    model = freeze(trained_net())
    model = copy.deepcopy(model).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    output = model(images)
    assert model(images[:1]).allclose(output[:1])
    unfreeze(model)
    assert isinstance(model.stem[1].weight, nn.Parameter)
    assert not model(images[:1]).allclose(output[:1])


def test_tools_that_update_statistics_leave_frozen_ones_alone():
    model = freeze(trained_net())
    before = copy.deepcopy(model.state_dict())
    update_bn([torch.randn(4, 3, 8, 8)], model)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


def test_torchvisions_frozen_norms_fuse():
    class FrozenNet(Net):
        def __init__(self):
            super().__init__()
            for module in list(self.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.BatchNorm2d):
                        frozen = FrozenBatchNorm2d(child.num_features)
                        for buffer in frozen.buffers():
                            nn.init.uniform_(buffer, 0.5, 1.5)
                        setattr(module, name, frozen)

    with fastbn.use_backend("torch"):
        model, reference = pair(FrozenNet)
        attributes = [sorted(vars(m)) for m in reference.modules()]
        fuse(model)
        images = torch.randn(4, 3, 8, 8)
        assert fused_calls(model, images)[1] == NET_CALLS
        # torchvision computes in another order, so that results differ by rounding.
        assert_alike(model, reference, [images], exact=False)
        reverted = revert(copy.deepcopy(model))
        assert [type(m) for m in reverted.modules()] == [type(m) for m in reference.modules()]
        assert [sorted(vars(m)) for m in reverted.modules()] == attributes
        norm = unfreeze(model).stem[1]
        assert norm.weight.requires_grad
        mean = norm.running_mean.clone()
        model(images)
        assert not norm.running_mean.equal(mean)
        assert norm.num_batches_tracked == 1


def test_what_can_not_be_frozen_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="without running statistics to fix, 1"):
        freeze(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="can't be frozen, a SyncBatchNorm at 1"):
        freeze(nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)))
    for function in (freeze, unfreeze):
        with pytest.raises(TypeError, match="model must be a module, but got a list"):
            function([])
    assert type(unfreeze(convert(model))[1]) is fastbn.FusedBatchNorm2d

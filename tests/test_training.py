"""Tests what training loops do: averages, checkpoints, scaled losses, new statistics."""

import copy
import threading

import pytest
import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import fastbn
from fastbn import FusedBatchNorm2d, FusedBatchNormAct2d, fuse, update_once

from .models import NET_CALLS, Net, fused_calls, pair


def images():
    return torch.randn(4, 3, 8, 8)


@pytest.fixture(params=["auto", "torch"], autouse=True)
def backend(request):
    with fastbn.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("once", [True, False])
def test_a_checkpoint_may_update_statistics_once(once, momentum, device):
    norm = FusedBatchNormAct2d(3, momentum=momentum).to(device)
    plain = copy.deepcopy(norm)
    x = torch.randn(4, 3, 5, 5, device=device)
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    options = {"context_fn": update_once} if once else {}
    checkpoint(norm, found, use_reentrant=False, **options).square().sum().backward()
    plain(expected).square().sum().backward()
    assert found.grad.equal(expected.grad)
    assert norm.weight.grad.equal(plain.weight.grad)
    if not once:
        # PyTorch updates the statistics in the recomputation too.
        plain(x)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict(), rtol=0, atol=0)
    norm(x)
    assert norm.num_batches_tracked == plain.num_batches_tracked + 1


def test_a_compiled_module_in_a_checkpoint_updates_statistics_once(device):
    """In a thread of its own, where the module is compiled before anything is recomputed."""
    torch._dynamo.reset()
    norm = FusedBatchNormAct2d(3).to(device)
    compiled = torch.compile(norm, backend="aot_eager")
    counts = []

    def train():
        for _ in range(3):
            x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
            y = checkpoint(compiled, x, use_reentrant=False, context_fn=update_once)
            y.square().sum().backward()
            counts.append(norm.num_batches_tracked.item())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert counts == [1, 2, 3]


def test_gradients_are_accumulated_before_a_step():
    model, reference = pair(Net)
    fuse(model)
    for net in (model, reference):
        torch.manual_seed(0)
        for _ in range(3):
            net(images()).square().mean().backward()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_moving_averages_and_new_statistics_agree():
    model, reference = pair(Net)
    fuse(model)
    batches = [images() for _ in range(3)]
    averages = []
    for net in (model, reference):
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in batches:
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
            average.update_parameters(net)
        averages.append(average)
    assert fused_calls(averages[0], batches[0])[1] == NET_CALLS
    limits = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(averages[0].state_dict(), averages[1].state_dict(), **limits)
    for average in averages:
        update_bn(batches, average)
    torch.testing.assert_close(averages[0].state_dict(), averages[1].state_dict(), **limits)
    assert averages[0].module.stem[1].num_batches_tracked == 3


def test_functional_calls_agree():
    model, reference = pair(Net)
    fuse(model)
    batch = images()
    weights = {name: p * 1.5 for name, p in reference.named_parameters()}
    found = torch.func.functional_call(model, weights, (batch,))
    expected = torch.func.functional_call(reference, weights, (batch,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_autocast_with_scaled_losses_agrees(device):
    model, reference = pair(lambda: Net().to(device))
    fuse(model)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    batch = images().to(device)
    for net in (model, reference):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = net(batch).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(model.parameters(), reference.parameters()):
        assert q.grad.norm() > 0
        assert (p.grad - q.grad).norm() <= 0.3 * q.grad.norm() + 1e-3
    with torch.autocast(device.type, torch.bfloat16):
        assert fused_calls(model, batch)[1] == NET_CALLS


def test_two_forwards_before_one_backward_agree():
    model, reference = pair(Net)
    fuse(model)
    first, second = images(), images()
    for net in (model, reference):
        (net(first) * net(second)).sum().backward()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.1, None])
def test_cuda_graphs_of_fused_models_agree(momentum):
    model, reference = pair(lambda: Net().cuda())
    fuse(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    for norm in reference.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    batch = images().cuda()
    before = copy.deepcopy(model.state_dict())
    graphed = torch.cuda.make_graphed_callables(model, (batch,))
    model.load_state_dict(before)
    for net in (graphed, reference):
        for _ in range(3):
            net(batch).square().mean().backward()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4)
    assert isinstance(model.stem[1], FusedBatchNorm2d)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-3, atol=1e-4)

"""Training with shared statistics: what wraps, compiles, recomputes or accumulates still agrees."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import time
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

import fastbn
from fastbn import FusedSyncBatchNorm, FusedSyncBatchNormAct, convert_sync_batchnorm
from fastbn.sync import modules

from .processes import run

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


class Net(nn.Module):
    """Norms with an activation, with a residual, and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x)) + x)
        return self.norm3(x).mean((2, 3))


def net() -> Net:
    torch.manual_seed(1)
    return Net().double().to(memory_format=torch.channels_last)


def batch(step: int = 0) -> torch.Tensor:
    """The same images in all processes."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64)
    return images.contiguous(memory_format=torch.channels_last)


def part(rank: int, whole: torch.Tensor) -> torch.Tensor:
    """Four rows for the first process, two for the second."""
    return whole[:4] if rank == 0 else whole[4:]


def loss(output: torch.Tensor) -> torch.Tensor:
    """A sum over images, so that the whole batch's loss is the sum of all processes'."""
    return (output * output.sin()).sum()


def gradients(model: nn.Module, total: bool = False) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for grad in found.values() if total else ():
        dist.all_reduce(grad)
    return found


def assert_close(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


def accumulated_of_one_process() -> tuple[nn.Module, dict]:
    model = net()
    for step in range(2):
        loss(model(batch(step))).backward()
    return model, gradients(model)


def ddp_accumulates(rank: int) -> None:
    """Two batches, of which the first one's gradients stay local; fused and not."""
    reference, expected = accumulated_of_one_process()
    for prepare in (fastbn.fuse, fastbn.convert, lambda model: model):
        model = convert_sync_batchnorm(prepare(net()))
        ddp = DistributedDataParallel(model)
        for step in range(2):
            with ddp.no_sync() if step == 0 else contextlib.nullcontext():
                # DistributedDataParallel takes the mean of the processes' gradients.
                (2 * loss(ddp(part(rank, batch(step))))).backward()
        assert_close(gradients(model), expected)
        assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def two_forwards_then_one_backward(rank: int) -> None:
    _, expected = accumulated_of_one_process()
    model = convert_sync_batchnorm(net())
    sum(loss(model(part(rank, batch(step)))) for step in range(2)).backward()
    assert_close(gradients(model, total=True), expected)


def checkpoints(rank: int) -> None:
    reference = net()
    loss(reference(batch())).backward()
    model = convert_sync_batchnorm(fastbn.fuse(net()))
    for reentrant in (False, True):
        model.zero_grad()
        x = part(rank, batch()).requires_grad_()
        loss(checkpoint(model, x, use_reentrant=reentrant)).backward()
        assert_close(gradients(model, total=True), gradients(reference))


def shards(rank: int) -> None:
    """FSDP2, whose parameters are parts too."""
    reference = net()
    loss(reference(batch())).backward()
    # FSDP2 refuses parameters in other layouts.
    model = convert_sync_batchnorm(net().to(memory_format=torch.contiguous_format))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    (2 * loss(model(part(rank, batch())))).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_close(found, gradients(reference))


def compiles(rank: int) -> None:
    """Without a graph break, forward and backward."""
    whole = batch()
    reference = fastbn.FusedBatchNormAct2d(3, momentum=None, dtype=torch.float64)
    expected = reference(whole, whole)
    loss(expected).backward()
    for backend in ("torch", "triton"):
        model = FusedSyncBatchNormAct(3, momentum=None, dtype=torch.float64)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = part(rank, whole)
        with fastbn.use_backend(backend):
            output = compiled(x, x)
            loss(output).backward()
        torch.testing.assert_close(output, part(rank, expected))
        assert_close(gradients(model, total=True), gradients(reference))
        assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def differentiates_twice(rank: int) -> None:
    def penalty(x, model, residual):
        value, bias = loss(model(x, residual).flatten(1)), model.bias.detach().clone()
        # The derivatives are those of the bias as it was.
        model.bias.data.fill_(float("nan"))
        grads = torch.autograd.grad(value, (x, residual), create_graph=True)
        model.bias.data.copy_(bias)
        return grads[0].square().sum() + grads[1].pow(3).sum()

    for act in (nn.Identity, nn.ReLU, nn.SiLU):
        reference = fastbn.FusedBatchNormAct2d(3, act_layer=act, dtype=torch.float64)
        model = FusedSyncBatchNormAct(3, act_layer=act, dtype=torch.float64)
        found = []
        for module, select in ((reference, lambda t: t), (model, lambda t: part(rank, t))):
            leaves = [select(batch(step)).clone().requires_grad_() for step in range(2)]
            with fastbn.use_backend("torch" if module is reference else fastbn.get_backend()):
                grads = torch.autograd.grad(
                    penalty(leaves[0], module, leaves[1]),
                    [*leaves, module.weight, module.bias],
                    materialize_grads=True,
                )
            found.append(grads)
        for whole, own in zip(found[0][:2], found[1][:2]):
            torch.testing.assert_close(own, part(rank, whole))
        for whole, own in zip(found[0][2:], found[1][2:]):
            dist.all_reduce(own)
            torch.testing.assert_close(own, whole)


def one_message_each_way(rank: int) -> None:
    sent = Counter()

    def spy(name):
        original = getattr(dist, name)

        def call(*tensors, **options):
            sent[name, tensors[-1].numel()] += 1
            return original(*tensors, **options)

        return mock.patch.object(dist, name, call)

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    norm = FusedSyncBatchNormAct(3, act_layer="silu", dtype=torch.float64)
    with spy(gather), spy("all_reduce"):
        for _ in range(2):
            x = part(rank, batch()).requires_grad_()
            norm(x, x).sum().backward()
        told = str(fastbn.explain(norm, x, x))
        assert "Statistics are shared by 2 processes" in told
        assert ("two-pass, 2 launches" in told) == (fastbn.get_backend() == "triton")
        assert sent == {(gather, 3 * 3 + 1): 2, ("all_reduce", 2 * 3): 2}
        # No gradient of the input is wanted, and nobody is asked.
        norm(part(rank, batch())).sum().backward()
        assert sent["all_reduce", 2 * 3] == 2
        norm.eval()(x)
        assert "processes" not in str(fastbn.explain(norm, x, x))
        norm.train().process_group = [dist.new_group([r]) for r in range(2)][rank]
        y = norm(x)
        assert sum(sent.values()) == 5
    plain = fastbn.FusedBatchNormAct2d(3, act_layer="silu", dtype=torch.float64)
    assert plain(x).equal(y)


def is_refused(rank: int) -> None:
    """Before anything is written, and by all processes alike."""
    norm = FusedSyncBatchNorm(3, dtype=torch.float64)
    state = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.zeros(1 - rank, 3, 1, 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        norm(torch.zeros(0, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="batch_norm eps must be positive"):
        FusedSyncBatchNorm(3, eps=-1.0)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        norm(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"can't be shared between processes while torch\.func"):
        torch.func.grad(lambda x: norm(x).sum())(batch())
    other = FusedSyncBatchNorm(3, process_group=[dist.new_group([r]) for r in range(2)][1 - rank])
    with pytest.raises(ValueError, match="process_group must hold this process, rank"):
        other(batch())
    for name, t in norm.state_dict().items():
        assert t.equal(state[name]), name
    # A batch that is empty everywhere counts, as in PyTorch, and changes nothing else.
    x = torch.zeros(0, 3, 2, dtype=torch.float64, requires_grad=True)
    norm(x).sum().backward()
    assert norm.num_batches_tracked == 1
    assert norm.running_var.equal(state["running_var"])
    assert norm.weight.grad.equal(torch.zeros(3).double())


def each(rank: int, functions: list, backend: str) -> None:
    with fastbn.use_backend(backend):
        for function in functions:
            function(rank)


@BACKENDS
def test_training_of_two_processes(backend):
    functions = [ddp_accumulates, two_forwards_then_one_backward, checkpoints, shards]
    run(2, each, functions, backend)


@BACKENDS
def test_derivatives_messages_and_refusals(backend):
    run(2, each, [differentiates_twice, one_message_each_way, is_refused], backend)


def test_no_graph_break():
    run(2, each, [compiles], "auto")


def groups(rank: int) -> None:
    """Each half of the processes has statistics of its own."""
    halves = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    model = convert_sync_batchnorm(net(), halves[rank // 2])
    loss(model(part(rank % 2, batch(rank // 2)))).backward()
    reference = net()
    loss(reference(batch(rank // 2))).backward()
    found = gradients(model)
    for grad in found.values():
        dist.all_reduce(grad, group=halves[rank // 2])
    assert_close(found, gradients(reference))
    assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_groups_of_a_batch():
    run(4, each, [groups], "torch")


def three_steps(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, share: float) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (share * F.cross_entropy(model(images), labels, reduction="sum")).backward()
        optimizer.step()
    return {name.removeprefix("module."): t.detach() for name, t in model.state_dict().items()}


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(5, 3, 24, 24, dtype=torch.float64), torch.arange(5)


def resnet() -> nn.Module:
    torch.manual_seed(3)
    return resnet18(num_classes=5).double()


def three_steps_of_a_part(rank: int) -> dict:
    model = convert_sync_batchnorm(fastbn.fuse(resnet()))
    images, labels = (t[:3] if rank == 0 else t[3:] for t in images_and_labels())
    spy = mock.patch.object(modules, "sync_batch_norm", wraps=modules.sync_batch_norm)
    with spy as calls, fastbn.use_backend("torch"):
        found = three_steps(DistributedDataParallel(model), images, labels, 2.0)
    fused = Counter((call.args[8], call.args[10] is not None) for call in calls.call_args_list)
    assert fused == {("relu", False): 27, ("relu", True): 24, ("none", False): 9}
    return found


def test_resnet_equals_one_process_on_the_whole_batch():
    """Three steps of SGD under DistributedDataParallel, with all activations fused."""
    expected = three_steps(resnet(), *images_and_labels(), 1.0)
    for found in run(2, three_steps_of_a_part):
        assert found.keys() == expected.keys()
        for name in found:
            # Each step multiplies what rounding leaves, of which float64 has enough.
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-8)


def stays_away(rank: int) -> None:
    if rank == 1:
        time.sleep(12)
    else:
        FusedSyncBatchNorm(3)(torch.randn(4, 3))


def dies(rank: int) -> None:
    norm = FusedSyncBatchNorm(3)
    output = norm(torch.randn(4, 3, requires_grad=True))
    if rank == 1:
        os._exit(0)
    output.sum().backward()


def has_other_channels(rank: int) -> None:
    FusedSyncBatchNorm(3 + rank)(torch.randn(4, 3 + rank))


def has_other_channels_and_is_debugged(rank: int) -> None:
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    FusedSyncBatchNorm(3 + rank, process_group=dist.new_group())(torch.randn(4, 3 + rank))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (stays_away, "[Tt]imed out"),
        (dies, "[Cc]onnection|[Tt]imed out"),
        # Gloo itself ends the process that gets more than it expects.
        (has_other_channels, None),
        (has_other_channels_and_is_debugged, "shape|mismatch"),
    ],
)
def test_a_peer_that_fails_is_an_error(function, message):
    """Within the group's timeout: nobody hangs."""
    found = run(2, function, timeout=5, ends=True)
    if message is None:
        assert any(isinstance(end, RuntimeError) or end == -signal.SIGABRT for end in found)
    else:
        assert isinstance(found[0], RuntimeError)
        assert re.search(message, str(found[0]))

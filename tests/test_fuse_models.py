"""`fuse` on well-known networks, under compilers, in wrappers, and over the kernels."""

import copy
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn as nn

import fastbn
from benchmarks.models import KINDS, NETWORKS, CountedCalls, step
from fastbn import explain, fuse, revert

from .models import NET_CALLS, Net, assert_alike, fused_calls, pair


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_networks(network):
    """All norms that can be are fused, on paper and in a call, and the results are the same."""
    torch.manual_seed(0)
    with fastbn.use_backend("torch"):
        model = network.make()
        reference = copy.deepcopy(model)
        fuse(model)
        counts = Counter(explain(model).kinds.values())
        assert tuple(counts[kind] for kind in KINDS) == network.norms
        x = torch.randn(2, *network.shape)
        with CountedCalls() as calls:
            output, gradients = step(model, x)
        own, act, *others = network.norms
        assert calls.norms == (own + act, *others)
        expected, expected_gradients = step(reference, x)
        assert output.equal(expected)
        # Where an input feeds several branches, its gradients are added in another order.
        limits = {"rtol": 1e-4, "atol": 1e-6} if "repvgg" in network.name else dict(rtol=0, atol=0)
        torch.testing.assert_close(gradients, expected_gradients, **limits)
        torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)
        kinds = [type(m) for m in revert(model).modules()]
        assert kinds == [type(m) for m in reference.modules()]


class Detector(nn.Module):
    """The backbone and the feature pyramid of torchvision's detection models."""

    def __init__(self, norm):
        super().__init__()
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        self.backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5
        )

    def forward(self, x):
        return sum(feature.mean() for feature in self.backbone(x).values())[None]


def test_a_detectors_backbone():
    with fastbn.use_backend("torch"):
        model, reference = pair(lambda: Detector(nn.BatchNorm2d))
        fuse(model)
        images = torch.randn(2, 3, 64, 64)
        assert fused_calls(model, images)[1] == {"relu": 9, "add+relu": 8, "none": 3}
        assert_alike(model, reference, [images])


def kernels_alike(make, images, calls):
    """Holds a network over the kernels to the same network over PyTorch."""
    model, reference = pair(make)
    fuse(model)
    with fastbn.use_backend("triton"):
        output, found = fused_calls(model, images, restore=False)
        assert found == calls
        output.square().mean().backward()
    with fastbn.use_backend("torch"):
        expected = reference(images)
        expected.square().mean().backward()
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-3, atol=1e-4)
    # The argument of a ReLU may fall on either side of 0, which changes gradients a little.
    for p, q in zip(model.parameters(), reference.parameters()):
        assert (p.grad - q.grad).norm() <= 0.02 * q.grad.norm() + 1e-6


def test_a_network_of_torchvision_over_the_kernels(device):
    import torchvision

    images = torch.randn(4, 3, 32, 32, device=device)
    calls = {"relu": 9, "add+relu": 8, "none": 3}
    kernels_alike(lambda: torchvision.models.resnet18(weights=None).to(device), images, calls)


def test_a_network_of_timm_over_the_kernels(device):
    import timm

    images = torch.randn(4, 3, 32, 32, device=device)
    calls = {"hardswish": 18, "relu": 5, "add": 7, "none": 4}
    kernels_alike(lambda: timm.create_model("mobilenetv3_small_050").to(device), images, calls)


@pytest.fixture
def graphs():
    """A backend of `torch.compile`, and the forward graphs that it saw."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def see(graph, example_inputs):
        calls = Counter()
        for node in graph.graph.nodes:
            text = str(node.args) + str(node.kwargs)
            if "forward_train" in f"{node.target}{text}":
                name = "add+" * (node.kwargs["residual"] is not None) + node.kwargs["activation"]
                calls[name] += 1
        seen.append(dict(calls))
        return graph

    torch._dynamo.reset()
    yield aot_autograd(fw_compiler=see, bw_compiler=lambda graph, _: graph), seen
    torch._dynamo.reset()


@pytest.mark.parametrize(("momentum", "dynamic"), [(0.1, None), (None, True)])
def test_compiled_fused_models_are_one_graph(graphs, momentum, dynamic):
    backend, seen = graphs
    model, reference = pair(Net)
    for m in (*model.modules(), *reference.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    fuse(model)
    with fastbn.use_backend("triton"):
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        for size in (4, 4, 5, 6):
            images = torch.randn(size, 3, 8, 8)
            output, expected = compiled(images), reference(images)
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    # Of one size, and of any, or of any from the start: a third size compiles nothing.
    assert seen == [NET_CALLS] * (1 if dynamic else 2)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_compiled_form_with_an_activation_fuses_it(graphs):
    backend, seen = graphs
    model = fastbn.FusedBatchNormAct2d(3, act_layer="silu")
    with fastbn.use_backend("triton"):
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 3, 4, 4))
    assert seen == [{"silu": 1}]


def test_exported_models_hold_standard_operators():
    model, reference = pair(Net)
    fuse(model).eval()
    images = torch.randn(4, 3, 8, 8)
    program = torch.export.export(model, (images,))
    assert not any("fastbn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(images), reference.eval()(images))


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist, torch.nn as nn
import fastbn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from tests.models import NET_CALLS, Net, assert_alike, fused_calls, pair

fastbn.set_backend("torch")
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
images = torch.randn(4, 3, 8, 8)

model, reference = pair(Net)
wrapped = nn.parallel.DistributedDataParallel(fastbn.fuse(model))
assert fused_calls(wrapped, images)[1] == NET_CALLS
assert_alike(wrapped, nn.parallel.DistributedDataParallel(reference), [images])

model, reference = pair(Net)
fastbn.fuse(model)
mesh = init_device_mesh("cpu", (1,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
for again in (False, True):
    if again:
        fastbn.fuse(model)
    assert all(isinstance(block, FSDPModule) for block in model.blocks)
    calls = []
    original = fastbn.modules.tracked_batch_norm
    fastbn.modules.tracked_batch_norm = lambda *given: (
        calls.append((given[9], given[11] is not None)), original(*given)
    )[1]
    output = model(images)
    fastbn.modules.tracked_batch_norm = original
    assert sorted(calls) == [("none", False), *[("relu", False)] * 3, *[("relu", True)] * 2]
    assert output.equal(reference(images))
    for net in (model, reference):
        net(images).square().mean().backward()
    for found, right in zip(model.parameters(), reference.parameters()):
        assert found.grad.full_tensor().equal(right.grad)
dist.destroy_process_group()
"""


def test_models_in_the_wrappers_of_distributed_training(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, tmp_path / "rendezvous"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_of_a_fused_model_holds_standard_nodes(tmp_path):
    import onnx

    model, reference = pair(Net)
    fuse(model).eval()
    images = torch.randn(4, 3, 8, 8)
    nodes = []
    for net in (model, reference.eval()):
        torch.onnx.export(net, (images,), tmp_path / "model.onnx", dynamo=False, verbose=False)
        nodes.append([node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node])
    assert sorted(nodes[0]) == sorted(nodes[1])


def test_timms_checkpoints_set_after_fusing():
    import timm

    with fastbn.use_backend("torch"):
        model, reference = pair(lambda: timm.create_model("resnet18", num_classes=5))
        fuse(model)
        images = torch.randn(2, 3, 32, 32)
        for checkpoints in (True, False):
            for net in (model, reference):
                net.set_grad_checkpointing(checkpoints)
            assert_alike(model, reference, [images])
            # The network's own forward then runs, in which a checkpoint can't be recorded.
            stem = checkpoints
            calls = fused_calls(model.train(), images)[1]
            assert calls == {"relu": 9 - stem, "add+relu": 8, "none": 3 + stem}


def test_a_detector_trains_fused():
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    def make():
        return fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
        )

    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1])}
    with fastbn.use_backend("torch"):
        model, reference = pair(make)
        fuse(model)
        losses = []
        for net in (model, reference):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
            for step in range(2):
                torch.manual_seed(step)
                images = [torch.rand(3, 64, 64)]
                loss = sum(net(images, [target]).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        assert torch.stack(losses[:2]).equal(torch.stack(losses[2:]))
        torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)
        kinds = Counter(explain(model).kinds.values())
        assert kinds["act"] == 31
        assert kinds["add"] == 10

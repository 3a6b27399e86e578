"""What tools that know nothing of fastbn do with its modules is right, or an error."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastbn
from fastbn import FusedBatchNorm2d, FusedBatchNormAct2d


@pytest.fixture(params=["triton", "torch"], autouse=True)
def backend(request):
    with fastbn.use_backend(request.param):
        yield


def network(device):
    """Returns a network whose norms have seen data, so that none of them is the identity."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        FusedBatchNormAct2d(4, eps=1e-2),
        nn.MaxPool2d(2),
        FusedBatchNorm2d(4),
        FusedBatchNormAct2d(4, act_layer="silu"),
    ).to(device)
    for _ in range(3):
        network(1 + 2 * torch.randn(8, 3, 8, 8, device=device))
    return network


@pytest.fixture
def x(device):
    return torch.randn(4, 3, 8, 8, device=device)


class WithResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = FusedBatchNormAct2d(3)

    def forward(self, x):
        return self.norm(x, x) + self.norm(x)


class NoLeaf(torch.fx.Tracer):
    """A tracer that by itself treats no module as a leaf, and traces into each."""

    def is_leaf_module(self, module, name):
        return False


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx_traces_modules_as_leaves(training, x, device):
    ours = network(device).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(ours))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == list("01234")
    assert not [node for node in traced.graph.nodes if node.op == "call_function"]
    before = copy.deepcopy(traced.state_dict())
    assert before["1.num_batches_tracked"] == ours[1].num_batches_tracked
    assert traced(x).equal(ours(x))
    torch.testing.assert_close(traced.state_dict(), ours.state_dict(), rtol=0, atol=0)
    # A leaf module follows the mode that is set after the trace.
    assert traced.train(not training)(x).equal(ours.train(not training)(x))


def test_a_tracer_that_knows_no_leaves_records_residuals_too(x, device):
    ours = WithResidual().to(device).eval()
    graph = NoLeaf().trace(ours)
    assert [node.op for node in graph.nodes].count("call_module") == 2
    assert torch.fx.GraphModule(ours, graph)(x).equal(ours(x))


def test_fx_refuses_what_it_would_trace_wrongly(device):
    ours = network(device)
    with pytest.raises(torch.fx.proxy.TraceError, match="can't be traced alone"):
        torch.fx.symbolic_trace(ours[1])
    ours[1].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(torch.fx.proxy.TraceError, match="FusedBatchNormAct2d has hooks"):
        torch.fx.symbolic_trace(ours)


def test_torchvision_extracts_features(x, device):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    ours = network(device).eval()
    extract = extraction.create_feature_extractor(ours, {"1": "first", "3": "second"})
    found = extract(x)
    assert found["first"].equal(ours[:2](x))
    assert found["second"].equal(ours[:4](x))


def test_fx_folding_keeps_the_activation(x, device):
    ours = network(device).eval()
    assert optimization.fuse(ours)(x).equal(ours(x))
    # `optimization.fuse` folds norms of the class `nn.BatchNorm2d` only, so this one is made plain.
    ours[3].__class__ = nn.BatchNorm2d
    alone = nn.Sequential(nn.Conv2d(4, 4, 1).to(device), ours[3]).eval()
    z = ours[:3](x)
    folded = optimization.fuse(alone)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(z), alone(z), rtol=1e-4, atol=1e-5)


TAKE_IT_FOR_A_NORM = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "fuse_conv_bn_eval": lambda net: fuse_conv_bn_eval(net[0].eval(), net[1].eval()),
    "timm's SyncBatchNorm": lambda net: timm().layers.convert_sync_batchnorm(net),
    "timm's FrozenBatchNorm": lambda net: timm().layers.freeze_batch_norm_2d(net),
}


def timm():
    return pytest.importorskip("timm", reason="it tests what timm does")


@pytest.mark.parametrize("tool", TAKE_IT_FOR_A_NORM)
def test_a_tool_that_would_drop_the_activation_gets_an_error(tool, device):
    ours = network(device)
    with pytest.raises(RuntimeError, match="they would drop its ReLU"):
        TAKE_IT_FOR_A_NORM[tool](ours)


def fold(conv, norm):
    """Folds a norm into a convolution as many tools do, in code that fastbn can't recognise."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = copy.deepcopy(conv)
    folded.weight.data = conv.weight * scale.view(-1, 1, 1, 1)
    folded.bias.data = norm.bias + (conv.bias - norm.running_mean) * scale
    return folded


def test_an_unknown_tool_causes_a_warning(x, device):
    ours = network(device).eval()
    with pytest.warns(RuntimeWarning, match="eps of a FusedBatchNormAct2d was read") as found:
        fold(ours[0], ours[1])
    assert found[0].filename == __file__
    plain = ours[1].without_activation()
    for folded in (fold(ours[0], plain), fuse_conv_bn_eval(ours[0], plain)):
        torch.testing.assert_close(ours[1].act(folded(x)), ours[:2](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [{"apply_act": False}, {"act_layer": None}])
def test_without_an_activation_nothing_can_be_lost(layers, x, device):
    conv, norm = nn.Conv2d(3, 4, 3).to(device), FusedBatchNormAct2d(4, **layers).to(device)
    norm(conv(x))
    norm.eval()
    torch.testing.assert_close(fuse_conv_bn_eval(conv.eval(), norm)(x), norm(conv(x)))
    norm.drop = nn.Dropout()
    with pytest.raises(RuntimeError, match="drop its Dropout"):
        fuse_conv_bn_eval(conv, norm)


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 1e-2}],
    ids=str,
)
def test_the_norm_without_activation_shares_its_tensors(options, device):
    ours = FusedBatchNormAct2d(3, **options).to(device)
    plain = ours.without_activation()
    assert type(plain) is nn.BatchNorm2d
    assert plain.training
    z = torch.randn(4, 3, 5, 5, device=device)
    torch.testing.assert_close(plain(z).relu(), copy.deepcopy(ours)(z))
    assert dict(plain.named_parameters()) == dict(ours.named_parameters())
    for name, buffer in ours.named_buffers():
        assert buffer is plain.get_buffer(name)
    assert not ours.eval().without_activation().training


def test_eps_is_set_kept_and_shown(x, device):
    ours = network(device).eval()
    torch.testing.assert_close(
        ours[1](z := ours[0](x)),
        nn.functional.batch_norm(
            z, ours[1].running_mean, ours[1].running_var, ours[1].weight, ours[1].bias, eps=1e-2
        ).relu(),
    )
    assert "eps=0.01, momentum=0.1" in repr(ours[1])
    ours[1].eps = 3.0
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert again(x).equal(ours(x))
        assert again[1].without_activation().eps == 3.0
    with fastbn.use_backend("torch"):
        torch.testing.assert_close(
            ours[1](z), ours[1].without_activation()(z).relu(), rtol=0, atol=0
        )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torch_jit_traces_pytorchs_path(x, device):
    """No check of fastbn's becomes a part of the trace or causes a warning."""
    ours = network(device).eval()
    with fastbn.use_backend("torch"):
        traced = torch.jit.trace(ours, x)
    other = torch.randn(1, 3, 12, 9, device=device)
    torch.testing.assert_close(traced(other), ours(other), rtol=1e-4, atol=1e-5)
    assert str(traced.inlined_graph).count("aten::batch_norm") == 3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [True, False], ids=["new", "old"])
def test_onnx_gets_standard_nodes(dynamo, x, device):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    ours = network(device).eval()
    file = io.BytesIO()
    torch.onnx.export(ours, (x,), file, dynamo=dynamo, verbose=False)
    model = onnx.load_from_string(file.getvalue())
    # The exporters fold the first norm into the convolution.
    operators = [node.op_type for node in model.graph.node if node.op_type != "Identity"]
    assert operators[:4] == ["Conv", "Relu", "MaxPool", "BatchNormalization"], operators
    assert all(node.domain == "" for node in model.graph.node)
    (output,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(output), ours(x).cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_fuses_a_norm_that_was_made_plain(x, device):
    from torch.ao.quantization import fuse_modules

    ours = nn.Sequential(nn.Conv2d(3, 4, 3), FusedBatchNorm2d(4), nn.ReLU()).to(device)
    ours(x)
    with pytest.raises(AssertionError, match=r"did not find fuser method .*FusedBatchNorm2d"):
        fuse_modules(ours.eval(), [["0", "1", "2"]])
    expected = ours(x)
    ours[1].__class__ = nn.BatchNorm2d
    folded = fuse_modules(ours, [["0", "1", "2"]])
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


def test_update_bn_finds_the_modules(x, device):
    ours = network(device)
    native = copy.deepcopy(ours)
    for module in native:
        if isinstance(module, FusedBatchNormAct2d):
            module.forward = partial(lambda m, z: m.act(m.without_activation()(z)), module)
    for net in (ours, native):
        torch.optim.swa_utils.update_bn([x, 2 * x], net)
        assert net[1].num_batches_tracked == 2
    torch.testing.assert_close(ours.state_dict(), native.state_dict())

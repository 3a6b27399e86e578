"""Tests the modules that compute batch norm, the sum with a residual, and an activation."""

import copy
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fastbn
from fastbn import FusedBatchNormAct1d, FusedBatchNormAct2d, FusedBatchNormAct3d

FORMS = {
    FusedBatchNormAct1d: (nn.BatchNorm1d, (4, 3, 7)),
    FusedBatchNormAct2d: (nn.BatchNorm2d, (4, 3, 5, 5)),
    FusedBatchNormAct3d: (nn.BatchNorm3d, (2, 3, 4, 3, 5)),
}

LAYERS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hard_swish": F.hardswish,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    nn.ReLU: F.relu,
    nn.SiLU: F.silu,
    nn.Mish: F.mish,
    None: lambda x: x,
    "none": lambda x: x,
    "": lambda x: x,
}


@pytest.fixture(params=["auto", "torch"], autouse=True)
def backend(request):
    with fastbn.use_backend(request.param):
        yield request.param


def assert_same(ours, bn, function, x, residual=None):
    inputs = [x] if residual is None else [x, residual]
    a = [t.clone().requires_grad_() for t in inputs]
    b = [t.clone().requires_grad_() for t in inputs]
    y1 = ours(*a)
    y2 = bn(b[0])
    y2 = function(y2 if residual is None else y2 + b[1])
    torch.testing.assert_close(y1, y2)
    grad = torch.randn_like(y2)
    y1.backward(grad)
    y2.backward(grad)
    for t1, t2 in zip(a, b):
        torch.testing.assert_close(t1.grad, t2.grad)
    torch.testing.assert_close(ours.running_var, bn.running_var)
    assert ours.num_batches_tracked == bn.num_batches_tracked


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_act_layer_computes_its_activation(layer, residual, device):
    ours = FusedBatchNormAct2d(3, act_layer=layer).to(device)
    bn = nn.BatchNorm2d(3).to(device)
    x, r = torch.randn(2, 4, 3, 5, 5, device=device).unbind()
    assert_same(ours, bn, LAYERS[layer], x, r if residual else None)
    assert_same(ours.eval(), bn.eval(), LAYERS[layer], x, r if residual else None)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_pytorch(form, device):
    native, shape = FORMS[form]
    ours, bn = form(3, 1e-3, 0.2).to(device), native(3, 1e-3, 0.2).to(device)
    assert isinstance(ours, native)
    assert list(ours.state_dict()) == list(bn.state_dict())
    bn.load_state_dict(ours.state_dict())
    x, residual = torch.randn(2, *shape, device=device).unbind()
    assert_same(ours, bn, F.relu, x, residual)


def test_act_kwargs_go_to_the_activation(device):
    ours = FusedBatchNormAct2d(
        3, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3}, device=device
    )
    x = torch.randn(4, 3, 5, 5, device=device)
    bn = nn.BatchNorm2d(3).to(device)
    assert_same(ours, bn, lambda z: F.leaky_relu(z, 0.3), x)
    for alpha in (0.5, np.float32(0.5), torch.tensor(0.5)):
        ours = FusedBatchNormAct2d(3, act_layer="elu", act_kwargs={"alpha": alpha}, device=device)
        assert_same(ours, nn.BatchNorm2d(3).to(device), lambda z: F.elu(z, 0.5), x)


def test_apply_act_false_leaves_the_activation_out(device):
    ours = FusedBatchNormAct2d(3, apply_act=False, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    assert_same(ours, nn.BatchNorm2d(3).to(device), lambda z: z, x, torch.randn_like(x))


@pytest.mark.parametrize("drop", [None, nn.Identity()])
def test_layers_may_be_taken_out_later(drop, device):
    ours = FusedBatchNormAct2d(3, drop_layer=nn.Dropout).to(device)
    ours.act, ours.drop = None, drop
    assert_same(ours, nn.BatchNorm2d(3).to(device), lambda x: x, torch.randn(4, 3, 5, 5).to(device))


def test_dropout_stays_without_an_activation(device):
    ours = FusedBatchNormAct2d(3, drop_layer=nn.Dropout).to(device)
    ours.act = None
    assert (ours(torch.randn(4, 3, 5, 5, device=device)) == 0).any()


def test_the_activation_may_be_exchanged_later(device):
    ours = FusedBatchNormAct2d(3, device=device)
    ours.act = nn.SiLU()
    x = torch.randn(4, 3, 5, 5, device=device)
    assert_same(ours, nn.BatchNorm2d(3).to(device), F.silu, x)


def test_subclass_of_an_activation_is_not_mistaken_for_it(device):
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    ours = FusedBatchNormAct2d(3, act_layer=Shifted, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    assert_same(ours, nn.BatchNorm2d(3).to(device), lambda z: F.relu(z) + 1, x)


@pytest.mark.parametrize("act", ["relu", nn.Mish])
def test_a_refused_residual_leaves_the_counter(act, device):
    ours = FusedBatchNormAct2d(3, act_layer=act, device=device)
    with pytest.raises(ValueError, match=r"residual must have the input's shape \(4, 3, 5, 5\)"):
        ours(torch.randn(4, 3, 5, 5, device=device), torch.randn(3, 1, 1, device=device))
    assert ours.num_batches_tracked == 0


X = torch.tensor([-1.0, 2.0]).view(1, 1, 1, 2)


def on(module):
    """Registers a hook on all modules, which adds 10 to the output of one class of them."""
    return nn.modules.module.register_module_forward_hook(
        lambda found, args, output: output + 10 if type(found) is module else None
    )


# Changes that a call of the activation's module would honour. Each has the `act_layer`, a function
# that changes the module, and what the normalised values -1 and 2 then become.
CHANGES = {
    "hook": (nn.ReLU, lambda act, patch: act.register_forward_hook(lambda *a: a[2] + 5), (5, 7)),
    "hook before": (
        nn.ReLU,
        lambda act, patch: act.register_forward_pre_hook(lambda act, args: (-args[0],)),
        (1, 0),
    ),
    "forward of the module": (
        nn.ReLU,
        lambda act, patch: setattr(act, "forward", lambda z: z.abs()),
        (1, 2),
    ),
    "forward of the class": (
        nn.ReLU,
        lambda act, patch: patch.setattr(nn.ReLU, "forward", lambda act, z: 3 * z),
        (-3, 6),
    ),
    "call of all modules": (
        nn.ReLU,
        lambda act, patch: patch.setattr(
            nn.Module, "__call__", lambda m, *z: m.forward(*z) + (7 if m is act else 0)
        ),
        (7, 9),
    ),
    "limit of ReLU6": (nn.ReLU6, lambda act, patch: setattr(act, "max_val", 1.0), (0, 1)),
    "slope": (nn.LeakyReLU, lambda act, patch: setattr(act, "negative_slope", 0.5), (-0.5, 2)),
    "class": (nn.ReLU, lambda act, patch: setattr(act, "__class__", nn.Identity), (-1, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_activation_is_what_a_call_of_its_module_computes(change, device, monkeypatch):
    layer, apply, expected = CHANGES[change]
    ours = FusedBatchNormAct2d(1, act_layer=layer, device=device).eval()
    stock = ours(X.to(device)).flatten().tolist()
    apply(ours.act, monkeypatch)
    found = ours(X.to(device)).flatten().tolist()
    assert found == pytest.approx(expected, rel=1e-4) != stock


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Identity])
def test_hooks_on_all_modules_see_the_layers(layer, device):
    """The hooks see both the activation and the drop layer, which is an Identity by default."""
    ours = FusedBatchNormAct2d(1, act_layer=layer, device=device).eval()
    clean = ours(X.to(device))
    handle = on(layer)
    try:
        # The hook on Identity runs twice if the activation is an Identity like the drop layer.
        torch.testing.assert_close(ours(X.to(device)), clean + (10 if layer is nn.ReLU else 20))
    finally:
        handle.remove()
    assert ours(X.to(device)).equal(clean)


def test_backward_hooks_see_the_activation(device):
    ours = FusedBatchNormAct2d(1, device=device).eval()
    seen = []

    def hook(module, grads, outputs):
        seen.append(module)

    handle = ours.act.register_full_backward_hook(hook)
    x = X.to(device).requires_grad_()
    ours(x).sum().backward()
    assert seen == [ours.act]
    handle.remove()
    handle = nn.modules.module.register_module_full_backward_hook(hook)
    try:
        ours(x).sum().backward()
    finally:
        handle.remove()
    assert seen.count(ours.act) == 2


def test_compiled_module_sees_that_the_activation_changes(device):
    ours = FusedBatchNormAct2d(1, device=device).eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert compiled(X.to(device)).min() == 0
    ours.act.forward = lambda z: z.abs()
    torch.testing.assert_close(compiled(X.to(device)), X.to(device).abs(), rtol=1e-4, atol=0)


def test_a_forward_replaced_before_the_import_is_no_stock_one(backend):
    """Runs in a process of its own, where the change comes before the import of fastbn."""
    if backend != "auto":
        pytest.skip("the process has a backend of its own")
    code = """
import torch, torch.nn as nn
stock = nn.ReLU.forward
nn.ReLU.forward = lambda self, z: stock(self, z) + 1
from fastbn import FusedBatchNormAct2d
assert FusedBatchNormAct2d(1).eval()(-torch.ones(1, 1, 1, 1)) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parameters_of_the_activation_get_gradients(device):
    ours = FusedBatchNormAct2d(3, act_layer=nn.PReLU, device=device).to(device)
    assert "act.weight" in ours.state_dict()
    x = torch.randn(4, 3, 5, 5, device=device)
    ours(x).sum().backward()
    assert ours.act.weight.grad is not None


def test_the_drop_layer_comes_before_the_residual(device):
    class Halve(nn.Module):
        def forward(self, x):
            return x / 2

    ours = FusedBatchNormAct2d(3, drop_layer=Halve, device=device)
    bn = nn.BatchNorm2d(3).to(device)
    x, r = torch.randn(2, 4, 3, 5, 5, device=device).unbind()
    torch.testing.assert_close(ours(x, r), F.relu(bn(x) / 2 + r))


@pytest.mark.parametrize("layer", ["act_layer", "drop_layer"])
@pytest.mark.parametrize("wrong", [nn.ReLU(), 3])
def test_an_instance_for_a_layer_is_refused(wrong, layer):
    with pytest.raises(TypeError, match=f"{layer} must be a module class, but got an instance of"):
        FusedBatchNormAct2d(3, **{layer: wrong})


@pytest.mark.parametrize("layer", ["act_layer", "drop_layer"])
@pytest.mark.parametrize("wrong", [F.relu, torch.relu, lambda: 3, int])
def test_a_function_that_makes_no_layer_is_refused(wrong, layer):
    with pytest.raises(TypeError, match=f"{layer} must be a module class or a function that re"):
        FusedBatchNormAct2d(3, **{layer: wrong})


def test_a_function_may_make_the_layer(device):
    made = functools.partial(nn.LeakyReLU, 0.3)
    for layer in (made, lambda: made()):
        ours = FusedBatchNormAct2d(3, act_layer=layer, device=device)
        x = torch.randn(4, 3, 5, 5, device=device)
        assert_same(ours, nn.BatchNorm2d(3).to(device), lambda z: F.leaky_relu(z, 0.3), x)


def test_a_named_layer_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="unexpected"):
        FusedBatchNormAct2d(3, act_layer="gelu_tanh", act_kwargs={"slope": 1})


def test_gelu_of_an_unknown_kind_is_refused_as_in_pytorch(device):
    ours = FusedBatchNormAct2d(3, act_layer=nn.GELU, act_kwargs={"approximate": "sloppy"})
    x = torch.randn(2, 3, 4, 4, device=device)
    with pytest.raises(RuntimeError) as theirs:
        ours.act(x)
    with pytest.raises(RuntimeError) as found:
        ours.to(device)(x)
    assert str(found.value) == str(theirs.value)


def test_an_unknown_layer_is_refused():
    with pytest.raises(
        ValueError, match=r"act_layer must be None, a module class or one of .*'rellu'"
    ):
        FusedBatchNormAct2d(3, act_layer="rellu")


def test_a_deep_copy_computes_the_same(device):
    ours = FusedBatchNormAct2d(3, act_layer="silu", device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    ours(x)
    torch.testing.assert_close(copy.deepcopy(ours)(x), ours(x))


def test_a_residual_block_agrees_with_channels_last_and_amp(device):
    """Compares a residual block of a network in autocast to bfloat16."""

    class Block(nn.Module):
        def __init__(self, norm, act):
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
            self.bn1, self.bn2, self.act = norm(8), norm(8), act

        def forward(self, x):
            if self.act is None:
                return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)
            return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)

    torch.manual_seed(1)
    native = Block(nn.BatchNorm2d, nn.ReLU()).to(device, memory_format=torch.channels_last)
    fused = Block(FusedBatchNormAct2d, None).to(device, memory_format=torch.channels_last)
    fused.load_state_dict(native.state_dict())
    x = torch.randn(4, 8, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
    losses = []
    for block in (native, fused):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = block(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)
        losses.append(y.float().pow(2).mean())
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)
    for p1, p2 in zip(native.parameters(), fused.parameters()):
        difference = (p1.grad - p2.grad).norm() / p1.grad.norm()
        assert difference < 0.05


def test_a_deleted_counter_is_not_asked_for(device):
    x = torch.randn(3, 4, 5, 5, device=device)
    for module in (nn.BatchNorm2d(4), fastbn.FusedBatchNorm2d(4)):
        del module.num_batches_tracked
        module.to(device).eval()(x)
        module.train().track_running_stats = False
        module(x)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("act", [False, True])
def test_a_biased_running_var_is_the_normalising_variance(act, momentum, device):
    kind = fastbn.FusedBatchNormAct2d if act else fastbn.FusedBatchNorm2d
    norm = kind(3, momentum=momentum, biased_running_var=True).to(device)
    expected = torch.ones(3, dtype=torch.float64, device=device)
    for step in range(3):
        x = torch.randn(2, 3, 1, 2, device=device)
        norm(x)
        share = 1 / (step + 1) if momentum is None else momentum
        expected.lerp_(x.double().var((0, 2, 3), correction=0), share)
        torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-6, atol=0)
    assert "biased_running_var=True" in repr(norm)
    assert norm.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(x[:1, :, :, :1])
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (0, 3, 1, 1)])
def test_an_empty_batch_moves_no_biased_running_var(shape, device):
    norm = fastbn.FusedBatchNorm2d(3, biased_running_var=True).to(device)
    assert norm(torch.empty(shape, device=device)).shape == shape
    assert norm.running_var.eq(1).all()
    assert norm.running_mean.eq(0).all()

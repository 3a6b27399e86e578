"""Gradients of all orders and kinds."""

import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.two_tensor import TwoTensor

import fastbn
from fastbn.activations import ACTIVATIONS
from fastbn.functional import batch_norm
from fastbn.reference import batch_norm as reference_batch_norm
from fastbn.runtime import execution

pytestmark = pytest.mark.usefixtures("kernels_only")


@pytest.fixture
def kernels_only():
    with fastbn.use_backend("triton"):
        yield


def leaves(*shape, device, residual=True):
    """Input, weight, bias and residual, in double precision, away from kinks."""
    c = shape[1]

    def leaf(*size, scale=1.0):
        return (torch.randn(size, dtype=torch.double, device=device) * scale).requires_grad_()

    return leaf(*shape), leaf(c), leaf(c), leaf(*shape) if residual else None


def call(activation="none", training=True):
    def function(x, weight, bias, residual=None):
        c = x.shape[1]
        mean = var = None
        if not training:
            mean = torch.linspace(-0.5, 0.5, c, dtype=x.dtype, device=x.device)
            var = torch.linspace(0.5, 1.5, c, dtype=x.dtype, device=x.device)
        return batch_norm(
            x, mean, var, weight, bias, training, activation=activation, residual=residual
        )

    return function


@pytest.mark.parametrize(
    ("activation", "residual", "training"),
    [
        *((activation, True, True) for activation in ACTIVATIONS),
        *((activation, False, True) for activation in ("none", "relu", "silu")),
        *((activation, True, False) for activation in ("none", "relu", "silu", "elu")),
    ],
)
def test_gradcheck_and_gradgradcheck(activation, residual, training, device):
    inputs = leaves(3, 2, 3, device=device, residual=residual)
    inputs = inputs if residual else inputs[:3]
    assert gradcheck(call(activation, training), inputs, fast_mode=True)
    assert gradgradcheck(call(activation, training), inputs, fast_mode=True)


def test_gradcheck_of_every_element(device):
    inputs = leaves(3, 2, 2, device=device)
    assert gradcheck(call("gelu"), inputs)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_second_order_agrees_with_pytorch(activation, channels_last, device):
    """A gradient penalty: backward of a function of the gradient."""
    x, w, b, r = leaves(4, 11, 3, 3, device=device)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, r = (t.detach().contiguous(memory_format=format).requires_grad_() for t in (x, r))

    def penalty(function):
        y = function(x, w, b, r)
        grads = torch.autograd.grad(y.pow(2).sum(), (x, w, b, r), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, w, b, r))

    def native(x, w, b, r):
        z = F.batch_norm(x, None, None, w, b, True) + r
        return ACTIVATIONS[activation].function(z, ACTIVATIONS[activation].default)

    for ours, theirs in zip(penalty(call(activation)), penalty(native)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "elu"])
def test_third_order(activation, device):
    """PyTorch's batch norm has none; the reference's operations have."""
    inputs = leaves(4, 3, 5, device=device)
    param = ACTIVATIONS[activation].default

    def reference(x, w, b, r):
        return reference_batch_norm(x, None, None, w, b, True, 0.1, 1e-5, activation, param, r)

    def third(function):
        value = function(*inputs).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((g * torch.arange(g.shape[-1], device=device)).sum() for g in grads)
        return grads

    for ours, theirs in zip(third(call(activation)), third(reference)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_second_order_where_the_first_is_constant(activation, residual, device):
    """Frozen statistics and weights: as in PyTorch a penalty has a gradient, if of zeros."""
    x, _, _, r = leaves(4, 3, 5, device=device)
    y = call(activation, training=False)(x, None, None, r.detach() if residual else None)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.any() == (activation == "silu")


@pytest.mark.parametrize("create_graph", [False, True])
def test_slope_times_a_tiny_gradient(create_graph, device):
    """Their product is not rounded to half precision."""
    x, r, grad = torch.randn(3, 64, 4, 4, device=device).half().unbind()
    x.requires_grad_()
    w = torch.ones(4, device=device, requires_grad=True)
    grad = (grad * 1e-5).half()
    y = batch_norm(x, None, None, w, None, True, activation="leaky_relu", residual=r)
    (found,) = torch.autograd.grad(y, w, grad, create_graph=create_graph)
    x_hat = F.batch_norm(x.detach().double(), None, None, training=True)
    slope = torch.where(x_hat + r > 0, 1.0, 0.01)
    expected = (grad * slope * x_hat).sum((0, 2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_create_graph_in_other_precisions(dtype, training, device):
    """The same gradients in the same dtypes, those of parameters in float32."""
    x, w, b, r = (t.detach().float().requires_grad_() for t in leaves(4, 3, 5, device=device))
    x, r = (t.detach().to(dtype).requires_grad_() for t in (x, r))
    mean, var = torch.randn(3, device=device), torch.rand(3, device=device)
    y = batch_norm(x, mean, var, w, b, training, activation="silu", residual=r)
    grad = torch.randn_like(y)
    plain = torch.autograd.grad(y, (x, w, b, r), grad, retain_graph=True)
    again = torch.autograd.grad(y, (x, w, b, r), grad, create_graph=True)
    for a, b in zip(again, plain):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_only_where_asked_for(wanted, activation, training, device):
    tensors = [t.detach() for t in leaves(3, 2, 3, device=device)]
    asked = [bool(wanted >> i & 1) for i in range(4)]
    full = [t.clone().requires_grad_() for t in tensors]
    some = [t.clone().requires_grad_(a) for t, a in zip(tensors, asked)]
    function = call(activation, training)
    grad = torch.randn(3, 2, 3, dtype=torch.double, device=device)
    function(*full).backward(grad)
    function(*some).backward(grad)
    for t, s, a in zip(full, some, asked):
        assert (s.grad is not None) == a
        assert not a or s.grad.equal(t.grad)


def test_no_graph_without_gradients(device):
    x, w, b, _ = leaves(3, 4, 5, device=device)
    with torch.no_grad():
        assert not call()(x, w, b).requires_grad
    assert not call()(x.detach(), w.detach(), b.detach()).requires_grad


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wanted", [None, 0, 1, 2, 3])
def test_a_mask_only_for_a_gradient(wanted, training, device, monkeypatch):
    """In most of inference gradients are enabled, but nothing requires one."""
    masks, forward = [], execution.run_forward

    def spy(*args):
        masks.append(forward(*args)[2])
        return forward(*args)

    monkeypatch.setattr(execution, "run_forward", spy)
    inputs = [t.detach() for t in leaves(3, 8, 8, device=device)]
    if wanted is not None:
        inputs[wanted].requires_grad_()
    for _ in range(2):
        call("relu", training)(*inputs)
    assert [mask is not None for mask in masks] == [wanted is not None] * 2


def test_inference_mode(device):
    bn = fastbn.FusedBatchNorm1d(4).to(device)
    x = torch.randn(3, 4, 5, device=device)
    with torch.inference_mode():
        bn(x)
    assert bn.num_batches_tracked == 1
    with torch.inference_mode():
        inner = fastbn.FusedBatchNorm1d(4).to(device)
        inner(x)
        assert inner.num_batches_tracked == 1


@pytest.mark.parametrize(("which", "activation"), [(1, "relu"), (3, "silu")])
def test_saved_tensors_that_change_are_noticed(which, activation, device):
    """As in PyTorch: backward refuses to run on what was overwritten since."""
    inputs = leaves(3, 4, 5, device=device)
    y = call(activation)(*inputs)
    with torch.no_grad():
        inputs[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_statistics_that_change_are_noticed(device):
    """A training step between an eval forward and its backward."""
    bn = fastbn.FusedBatchNorm1d(4).to(device).eval()
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    y = bn(x)
    bn.train()(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_needs_retain_graph(device):
    x, w, b, _ = leaves(3, 4, 5, device=device)
    y = call()(x, w, b).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert x.grad.equal(2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_backward_does_not_touch_statistics(device):
    bn = fastbn.FusedBatchNorm1d(4).to(device)
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    y = bn(x)
    before = {name: t.clone() for name, t in bn.state_dict().items()}
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), x, create_graph=True)
    for name, t in bn.state_dict().items():
        assert t.equal(before[name]), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_forward_mode(activation, training, device):
    x, w, b, r = leaves(3, 4, 5, device=device)
    tangent = torch.randn_like(x)
    function = call(activation, training)
    _, tangent_out = torch.func.jvp(lambda x: function(x, w, b, r), (x,), (tangent,))
    with fwAD.dual_level():
        dual = fwAD.unpack_dual(function(fwAD.make_dual(x, tangent), w, b, r))
    torch.testing.assert_close(dual.tangent, tangent_out)
    # <J t, g> = <t, J' g>
    grad = torch.randn_like(x)
    (pulled,) = torch.autograd.grad(function(x, w, b, r), x, grad)
    torch.testing.assert_close((tangent_out * grad).sum(), (tangent * pulled).sum())


def test_vmap_in_eval(device):
    bn = fastbn.FusedBatchNormAct2d(4).to(device).eval()
    torch.nn.init.normal_(bn.running_mean)
    x = torch.randn(5, 3, 4, 6, 6, device=device)
    torch.testing.assert_close(torch.vmap(bn)(x), torch.stack([bn(part) for part in x]))


def test_per_sample_gradients(device):
    bn = fastbn.FusedBatchNorm2d(4).to(device).eval()
    parameters = dict(bn.named_parameters())
    x = torch.randn(5, 4, 6, 6, device=device)

    def loss(parameters, sample):
        y = torch.func.functional_call(bn, parameters, (sample[None],))
        return y.pow(2).sum()

    grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        bn.zero_grad()
        bn(sample[None]).pow(2).sum().backward()
        torch.testing.assert_close(grads["weight"][i], bn.weight.grad)
        torch.testing.assert_close(grads["bias"][i], bn.bias.grad)


def test_vmap_in_training_is_refused_as_in_pytorch(device):
    x = torch.randn(5, 3, 4, 6, 6, device=device)
    messages = []
    for module in (fastbn.FusedBatchNorm2d(4), torch.nn.BatchNorm2d(4)):
        module.to(device).num_batches_tracked = None
        with pytest.raises(RuntimeError) as error:
            torch.vmap(module)(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_checkpointing_recomputes_the_same(device):
    """Activation checkpointing runs forward twice; statistics off, results equal."""
    from torch.utils.checkpoint import checkpoint

    bn = fastbn.FusedBatchNormAct1d(4, track_running_stats=False).to(device)
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    (plain,) = torch.autograd.grad(bn(x).pow(2).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(bn, x, use_reentrant=False).pow(2).sum(), x)
    assert plain.equal(again)


RELATED = {
    "residual is input": lambda x, w, b, r: (x, w, b, x),
    "residual from input": lambda x, w, b, r: (x, w, b, (x * 2).sin()),
    "input from residual": lambda x, w, b, r: (r.sin(), w, b, r),
    "weight from input": lambda x, w, b, r: (x, x.mean((0, 2)), b, r),
    "weight is bias": lambda x, w, b, r: (x, w, w, r),
    "all from one": lambda x, w, b, r: (x.sin(), x[0, :, 0].exp(), x[0, :, 1], x * 2),
}


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    ("relation", "training"),
    [*((relation, True) for relation in RELATED), ("all from one", False)],
)
def test_inputs_that_depend_on_one_another(relation, activation, training, device):
    """Each path counts once, whichever way the backward goes."""
    tensors = leaves(3, 3, 2, device=device)
    function = call(activation, training)
    y = function(*RELATED[relation](*tensors))
    grad = torch.randn_like(y)
    kwargs = {"retain_graph": True, "allow_unused": True}
    first = torch.autograd.grad(y, tensors, grad, **kwargs)
    second = torch.autograd.grad(y, tensors, grad, create_graph=True, **kwargs)
    for a, b in zip(first, second):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    if relation == "all from one":
        assert gradgradcheck(
            lambda *t: function(*RELATED[relation](*t)), tensors, fast_mode=True, nondet_tol=1e-9
        )


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("create_graph", [True, False])
def test_saved_tensor_hooks_that_change_strides(create_graph, activation, device):
    """As `save_on_cpu(pin_memory=True)` does: what comes back is contiguous."""
    x, w, b, r = leaves(3, 11, 3, 3, device=device)
    x, r = (
        t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, r)
    )
    grad = torch.randn_like(x)
    plain = torch.autograd.grad(call(activation)(x, w, b, r), (x, w, b, r), grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        y = call(activation)(x, w, b, r)
    packed = torch.autograd.grad(y, (x, w, b, r), grad, create_graph=create_graph)
    for a, b in zip(plain, packed):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
def test_batched_gradients(residual, device):
    """`is_grads_batched` and vectorised Jacobians call the backward with a batch of gradients."""
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    grads = torch.randn(2, 4, 3, 5, device=device)
    act = "relu" if residual else "silu"
    with fastbn.use_backend("triton"):
        y = fastbn.batch_norm(
            x, None, None, training=True, activation=act, residual=x.detach() if residual else None
        )
        one_by_one = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads]
        (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_gradient_of_a_tensor_subclass(device):
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    g = torch.randn(4, 3, 5, device=device)
    with fastbn.use_backend("triton"):
        y = fastbn.batch_norm(x, None, None, training=True, activation="relu")
        (expected,) = torch.autograd.grad(y, x, g, retain_graph=True)
        (twice,) = torch.autograd.grad(y, x, TwoTensor(g, g.clone()))
    torch.testing.assert_close(twice.a, expected)
    torch.testing.assert_close(twice.b, expected)


def around_the_backward(kind, y, inputs, grad):
    """Gradients by a transform of the backward alone."""

    def backward(grad):
        return torch.autograd.grad(y, inputs, grad, retain_graph=True)

    if kind == "vmap":
        return torch.vmap(backward)(torch.stack([grad, 2 * grad + 1]))
    if kind == "zero":
        return backward(torch._efficientzerotensor(y.shape, dtype=y.dtype, device=y.device))
    if kind == "grad":
        return (torch.func.grad(lambda grad: sum(g.square().sum() for g in backward(grad)))(grad),)
    if kind == "jvp":
        return torch.func.jvp(backward, (grad,), (grad.sin(),))[1]
    with fwAD.dual_level():
        return [fwAD.unpack_dual(g).tangent for g in backward(fwAD.make_dual(grad, grad.sin()))]


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("kind", ["vmap", "zero", "forward mode", "grad", "jvp"])
def test_transforms_around_the_backward_alone(kind, activation, residual, device):
    inputs = [t for t in leaves(4, 3, 5, device=device, residual=residual) if t is not None]
    grad = torch.randn(4, 3, 5, dtype=torch.double, device=device)
    found = around_the_backward(kind, call(activation)(*inputs), inputs, grad)
    with fastbn.use_backend("torch"):
        expected = around_the_backward(kind, call(activation)(*inputs), inputs, grad)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_the_bias_may_change_before_the_backward(
    activation, residual, create_graph, training, device
):
    """As behind unfused layers, whose backward doesn't read it."""
    x, w, b, r = leaves(4, 3, 5, device=device)
    inputs = (x, w, b, r) if residual else (x, w, b)
    y, same = (call(activation, training)(*inputs) for _ in range(2))
    grad = torch.randn_like(x)

    def derivatives(y):
        grads = torch.autograd.grad(y, inputs, grad, create_graph=create_graph)
        if create_graph:
            penalty = sum(g.sin().sum() for g in grads)
            grads += torch.autograd.grad(penalty, inputs, materialize_grads=True)
        return grads

    expected = derivatives(y)
    with torch.no_grad():
        b.add_(1)
    for a, b in zip(derivatives(same), expected):
        torch.testing.assert_close(a, b)


CHANGES = {
    "made from a parameter, then doubled": lambda b, p: b.mul_(2),
    "made from a parameter, then zero": lambda b, p: b.zero_(),
    "a constant, then a function": lambda b, p: b.add_(p),
    "a parameter, then NaN": lambda b, p: b.data.fill_(float("nan")),
}


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES)
def test_second_derivatives_are_those_of_the_bias_as_it_was(change, training, residual, device):
    x, w, p, r = leaves(4, 3, 5, device=device, residual=residual)
    inputs = [t for t in (x, w, p, r) if t is not None]
    grad = torch.randn_like(x)

    def derivatives(function, changed):
        b = p.detach().clone() if "constant" in change else p * 1
        if "a parameter, then NaN" in change:
            b = p.detach().clone().requires_grad_()
        y = function(x, w, b, r)
        if changed:
            CHANGES[change](b, p)
        wanted = [b if t is p and b.is_leaf and b.requires_grad else t for t in inputs]
        grads = torch.autograd.grad(y, (x, w), grad, create_graph=True)
        penalty = sum(g.sin().sum() for g in grads)
        return torch.autograd.grad(penalty, wanted, allow_unused=True)

    function = call("silu", training)
    for found, expected in zip(derivatives(function, True), derivatives(function, False)):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


def test_second_derivatives_where_the_bias_is_infinite(device):
    x, w, b, grad = (t.detach().requires_grad_() for t in leaves(4, 3, 5, device=device))
    with torch.no_grad():
        b[1] = -float("inf")

    def derivatives(function):
        grads = torch.autograd.grad(function(x, w, b), (x, w), grad, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w))

    def unfused(x, w, b):
        return F.relu(F.batch_norm(x, None, None, w, b, True))

    for found, expected in zip(derivatives(call("relu")), derivatives(unfused)):
        torch.testing.assert_close(found, expected)


def test_a_bias_that_is_made_of_the_output_later_is_freed(device):
    """The backward keeps the bias, whose history then must not hold the backward."""
    x, w, p, _ = leaves(4, 3, 5, device=device)
    b = p * 1
    b += call("silu")(x, w, b).mean((0, 2))
    b.sum().backward()
    alive = weakref.ref(b)
    del b
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_of_a_bias_alone(dtype, device):
    """In its dtype, though the backward does not read it."""
    x = torch.randn(64, 3, 5, device=device).to(dtype).requires_grad_()
    bias = torch.zeros(3, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    y = batch_norm(x, None, None, None, bias, training=True)
    _, found = torch.autograd.grad(y, (x, bias), grad)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, grad.double().sum((0, 2)).float())


@pytest.mark.parametrize("create_graph", [False, True])
def test_infinite_gradient_where_relu_is_off(create_graph, device):
    """0 there, not 0 times infinity."""
    x, w, b, r = leaves(4, 3, 5, device=device)
    y = call("relu")(x, w, b, r)
    grad = torch.where(y > 0, 1.0, float("inf"))
    (found,) = torch.autograd.grad(y, r, grad, create_graph=create_graph)
    assert found.equal((y > 0).double())


def test_hooks_that_round_the_statistics(device):
    """Mean and rstd in half precision would be wrong gradients."""
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
        y = batch_norm(x, None, None, training=True)
    with pytest.raises(RuntimeError, match=r"of torch\.float32, but hooks made them torch\.b"):
        y.sum().backward()

"""Compares derivatives of all orders, in all of PyTorch's modes, with an elementary formula."""

import weakref
from itertools import product

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.utils.checkpoint import checkpoint

import fastbn

EPS = 0.1

ELEMENTARY = {
    "none": lambda z: z,
    "relu": lambda z: torch.where(z > 0, z, 0.0),
    "silu": lambda z: z / (1 + (-z).exp()),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with fastbn.use_backend(request.param):
        yield


def statistics(x):
    options = {"dtype": x.dtype, "device": x.device}
    c = x.shape[1]
    return torch.linspace(-0.5, 0.5, c, **options), torch.linspace(0.5, 1.5, c, **options)


def fused(x, weight=None, bias=None, residual=None, *, training=True, activation="none"):
    mean, var = (None, None) if training else statistics(x)
    return fastbn.batch_norm(
        x, mean, var, weight, bias, training, eps=EPS, activation=activation, residual=residual
    )


def formula(x, weight=None, bias=None, residual=None, *, training=True, activation="none"):
    """Computes batch norm of a matrix from sums, products and a square root."""
    if training:
        mean = x.sum(0) / len(x)
        var = ((x - mean) * (x - mean)).sum(0) / len(x)
    else:
        mean, var = statistics(x)
    z = (x - mean) / (var + EPS).sqrt()
    z = z if weight is None else z * weight
    z = z if bias is None else z + bias
    return ELEMENTARY[activation](z if residual is None else z + residual)


def dot(tensors, others):
    return sum((t * other).sum() for t, other in zip(tensors, others))


# Each of these functions maps a scalar function of tensors to its derivative in a direction.
def by_grad(function, direction):
    return lambda tensors: dot(torch.func.grad(function)(tensors), direction)


def by_jvp(function, direction):
    return lambda tensors: torch.func.jvp(function, (tensors,), (direction,))[1]


def by_backward(function, direction):
    def derivative(tensors):
        grads = torch.autograd.grad(function(tensors), tensors, create_graph=True)
        return dot(grads, direction)

    return derivative


def by_dual_numbers(function, direction):
    def derivative(tensors):
        with fwAD.dual_level():
            duals = tuple(map(fwAD.make_dual, tensors, direction))
            return fwAD.unpack_dual(function(duals)).tangent

    return derivative


MODES = {"grad": by_grad, "jvp": by_jvp, "backward": by_backward, "dual": by_dual_numbers}


def supported(modes):
    """Says whether PyTorch can nest these modes, of which the first is innermost."""
    forward = [mode for mode in modes if mode in ("jvp", "dual")]
    if "dual" in forward and len(forward) > 1:
        return False
    # `torch.autograd.grad` can't run inside of `jvp`, where no tensor of the caller's is a leaf.
    return "jvp" not in modes[modes.index("backward") + 1 :] if "backward" in modes else True


MIXTURES = [
    modes for order in (1, 2, 3) for modes in product(MODES, repeat=order) if supported(modes)
]


def some(*shape, device):
    return torch.randn(shape, dtype=torch.double, device=device)


@pytest.mark.parametrize(
    ("activation", "affine", "residual", "training"),
    [
        ("none", False, False, True),
        ("none", True, False, True),
        ("relu", True, True, True),
        ("silu", True, False, True),
        ("gelu", True, True, True),
        ("none", True, False, False),
        ("gelu", True, True, False),
    ],
)
def test_every_mixture_of_modes_is_right(activation, affine, residual, training, backend, device):
    tensors = [some(4, 2, device=device)]
    tensors += [some(2, device=device) if affine else None for _ in range(2)]
    tensors += [some(4, 2, device=device) if residual else None]
    present = [i for i, t in enumerate(tensors) if t is not None]
    direction = tuple(torch.randn_like(tensors[i]) for i in present)
    weights = some(4, 2, device=device)

    def derivative(modes, batch_norm):
        def function(given):
            given = dict(zip(present, given))
            y = batch_norm(*map(given.get, range(4)), training=training, activation=activation)
            return (y * weights).sum().sin()

        for mode in modes:
            function = MODES[mode](function, direction)
        return function(tuple(tensors[i].clone().requires_grad_() for i in present))

    for modes in MIXTURES:
        found, expected = derivative(modes, fused), derivative(modes, formula)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=str(modes))


def test_derivatives_have_known_values(backend, device):
    """Derives the third value of a channel by the first one."""
    column = {"dtype": torch.double, "device": device}
    x = torch.tensor([[0.0], [1.0], [3.0]], **column)
    direction = (torch.tensor([[1.0], [0.0], [0.0]], **column),)

    def last(tensors):
        return fused(*tensors)[2, 0]

    def derivative(*modes):
        function = last
        for mode in modes:
            function = MODES[mode](function, direction)
        return function((x.requires_grad_(),)).item()

    assert derivative("jvp", "jvp") == pytest.approx(-0.032907, abs=1e-6)
    for mode in ("grad", "jvp", "backward"):
        assert derivative(mode, mode, mode) == pytest.approx(-0.107883, abs=1e-6)
    tangent = by_dual_numbers(last, direction)((x,))
    (grad,) = torch.autograd.grad(tangent, x)
    assert grad.flatten().tolist() == pytest.approx([-0.0329, 0.0700, -0.0371], abs=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_the_hessian_of_a_gradient_penalty_is_right(activation, training, backend, device):
    """Compares the Hessian with finite differences of the penalty's gradient."""
    x, direction, weights = (some(4, 2, device=device) for _ in range(3))
    x.requires_grad_()

    def gradient(x):
        y = fused(x, training=training, activation=activation)
        (grad,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x, create_graph=True)[0]

    (found,) = torch.autograd.grad(gradient(x), x, direction)
    step = 1e-5 * direction
    expected = (gradient(x + step) - gradient(x - step)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "transform",
    [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian],
    ids=lambda transform: transform.__name__,
)
def test_jacobians_and_hessians_agree_with_the_formula(transform, training, backend, device):
    tensors = (some(3, 2, device=device), some(2, device=device), some(2, device=device))

    def derivatives(batch_norm):
        def function(*tensors):
            return batch_norm(*tensors, training=training, activation="gelu").cos()

        return transform(function, argnums=(0, 1, 2))(*tensors)

    found, expected = derivatives(fused), derivatives(formula)
    for a, b in zip(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_vmap_of_a_gradient_agrees_with_the_formula(training, backend, device):
    batch, weight = some(5, 4, 2, device=device), some(5, 2, device=device)

    def gradients(batch_norm):
        def loss(x, weight):
            return batch_norm(x, weight, training=training, activation="silu").sin().sum()

        return torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(batch, weight)

    for a, b in zip(gradients(fused), gradients(formula)):
        torch.testing.assert_close(a, b)


def test_functional_call_updates_the_statistics_that_it_gets(backend, device):
    norms = [
        kind(2, device=device, dtype=torch.double)
        for kind in (fastbn.FusedBatchNorm1d, torch.nn.BatchNorm1d)
    ]
    x = some(4, 2, device=device)
    grads, buffers = [], []
    for norm in norms:
        given = {name: t.clone() for name, t in norm.named_buffers()}

        def loss(parameters, given, norm=norm):
            return torch.func.functional_call(norm, (parameters, given), (x,)).sin().sum()

        grads.append(torch.func.grad(loss)(dict(norm.named_parameters()), given))
        buffers.append(given)
        assert norm.num_batches_tracked == 0
        assert not norm.running_mean.any()
    for found, expected in (grads, buffers):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual"])
def test_transforms_update_captured_statistics_as_in_pytorch(transform, backend, device):
    x = some(4, 2, device=device)
    results = []
    for kind in (fastbn.FusedBatchNorm1d, torch.nn.BatchNorm1d):
        norm = kind(2, device=device, dtype=torch.double)
        # PyTorch refuses to increment the counter inside of a transform.
        norm.num_batches_tracked = None
        MODES[transform](lambda tensors, norm=norm: norm(*tensors).sin().sum(), (x.cos(),))((x,))
        results.append((norm.running_mean, norm.running_var))
    torch.testing.assert_close(*results)
    assert results[0][0].any()


def test_a_backward_that_stops_at_the_output_frees_its_graph(backend, device):
    """The gradient is differentiable, but its graph doesn't reach batch norm."""
    x = some(4, 2, device=device).requires_grad_()
    inner = x.sin()
    y = fused(inner)
    (grad,) = torch.autograd.grad(y.square().sum(), y, create_graph=True)
    # A later backward through batch norm builds no graph.
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.zeros_like(x))
    torch.autograd.grad(y.square().sum(), y, create_graph=True)
    alive = weakref.ref(inner)
    del inner, y, grad
    assert alive() is None


def test_a_checkpoint_has_two_derivatives(backend, device):
    """The third is an error on PyTorch's path, which would read the checkpoint's tensors twice."""
    x = some(4, 2, device=device).requires_grad_()

    def layer(x):
        return fused(x, activation="silu").sin()

    def recomputed(x):
        return checkpoint(layer, x, use_reentrant=False)

    def derivative(function, order):
        value = function(x).sum()
        for _ in range(order):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.square().sum()
        return grad

    def twice(function):
        (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)

    torch.testing.assert_close(twice(recomputed), twice(layer))
    if fastbn.get_backend() == "torch":
        with pytest.raises(RuntimeError, match="within a checkpoint has no third"):
            derivative(recomputed, 3)
    else:
        torch.testing.assert_close(derivative(recomputed, 3), derivative(layer, 3))


@pytest.mark.parametrize("shape", [(1, 2), (1, 2, 1, 1)])
def test_transforms_refuse_what_pytorch_refuses(shape, backend, device):
    messages = []
    for batch_norm in (fastbn.batch_norm, torch.nn.functional.batch_norm):
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            torch.func.jvp(
                lambda x, f=batch_norm: f(x, None, None, training=True),
                (torch.ones(shape, device=device),),
                (torch.ones(shape, device=device),),
            )
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transforms_keep_results_and_dtypes(dtype, training, backend, device):
    """The output under `jvp` has the values and the dtype of a call without a transform."""
    x = some(64, 2, device=device).to(dtype)
    parameters = [torch.rand(2, device=device) for _ in range(4)]

    def function(x):
        mean, var, weight, bias = (t.clone() for t in parameters)
        return fastbn.batch_norm(x, mean, var, weight, bias, training)

    found, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    assert found.dtype is tangent.dtype is dtype
    torch.testing.assert_close(found, function(x))

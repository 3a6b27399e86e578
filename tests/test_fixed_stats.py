"""Holds the kernels with given statistics to the rule of `oracle.py`."""

import pytest
import torch

import fastbn
from fastbn.activations import ACTIVATIONS

from .oracle import Case, check, compare, make_arguments
from .test_kernels import DTYPES, LAYOUTS, SHAPES, sized


@pytest.mark.parametrize(("shape", "dtype"), sized(SHAPES))
def test_fixed_stats_keep_the_rule_in_all_shapes_and_dtypes(shape, dtype, device):
    check(Case(shape, dtype, training=False, activation="relu"), device)


@pytest.mark.parametrize(("shape", "dtype"), sized(s for s in SHAPES if len(s) >= 4))
def test_fixed_stats_keep_the_rule_with_channels_last(shape, dtype, device):
    case = Case(shape, dtype, channels_last=True, training=False, activation="relu")
    check(case, device)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (5, 3, 12, 9), (4, 40, 4, 4), (2, 1, 19, 19)])
def test_fixed_stats_keep_the_rule_over_many_tiles(shape, channels_last, device):
    case = Case(
        shape, channels_last=channels_last, training=False, activation="relu", residual=True
    )
    check(case, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fixed_stats_keep_the_rule_with_every_epilogue(activation, device):
    check(Case((3, 10, 5, 3), training=False, activation=activation, residual=True), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fixed_stats_keep_the_rule_with_planes_side_by_side(dtype, device):
    case = Case((3, 16, 7, 7), dtype, training=False, activation="silu", residual=True)
    check(case, device)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", ""])
def test_fixed_stats_keep_the_rule_without_parameters(weight, bias, device):
    case = Case((4, 6, 5), weight=weight, bias=bias, training=False, activation="silu")
    check(case, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fixed_stats_keep_the_rule_with_half_parameters(dtype, device):
    check(Case((4, 6, 5, 5), dtype, param_dtype=dtype, training=False), device)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_fixed_stats_keep_the_rule_at_every_eps(eps, device):
    check(Case((8, 3, 4), eps=eps, training=False), device)


@pytest.mark.parametrize("residual", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fixed_stats_keep_the_rule_at_any_strides(layout, residual, device):
    """Gives the input, the residual and the output's gradient strides of their own."""
    case = Case((3, 6, 4, 5), activation="relu", residual=True, training=False)
    arguments = make_arguments(case, device)
    arguments.input = LAYOUTS[layout](arguments.input)
    arguments.residual = LAYOUTS[residual](arguments.residual)
    arguments.grad_output = LAYOUTS["permuted"](arguments.grad_output)
    compare(arguments)


@pytest.mark.parametrize("activation", ["tanh", "elu", "gelu_tanh", "silu", "sigmoid", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_are_accurate_from_tiny_to_huge(activation, dtype, device):
    """Asks for relative accuracy near zero, for no NaN anywhere, and for gradients up to 1e6."""
    magnitudes = torch.logspace(-12, 30, 211, dtype=torch.float64)
    z = torch.cat([-magnitudes.flip(0), magnitudes]).to(device, dtype).reshape(-1, 1)
    ours = z.clone().requires_grad_()
    identity = torch.zeros(1, dtype=dtype, device=device), torch.ones(1, dtype=dtype, device=device)
    with fastbn.use_backend("triton"):
        y = fastbn.batch_norm(ours, *identity, eps=1e-30, activation=activation)
        y.sum().backward()
    exact = z.double().requires_grad_()
    y64 = ACTIVATIONS[activation].function(exact, 1.0)
    y64.sum().backward()
    assert y.isfinite().all()
    small = z.abs() < 1
    rtol = {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(y.double()[small], y64[small], rtol=rtol, atol=0)
    middle = z.abs() < 1e6
    atol = {torch.float32: 4e-7, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(y.double()[middle], y64[middle], rtol=rtol, atol=atol)
    torch.testing.assert_close(ours.grad.double()[middle], exact.grad[middle], rtol=rtol, atol=atol)
    assert ours.grad[middle].isfinite().all()


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "elu", "hardswish"])
def test_the_side_of_a_kink_is_pytorchs(activation, residual, device):
    x = torch.tensor([[-3.0, -0.0, 0.0, 3.0, 6.0]], device=device).T
    mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
    results = []
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        with fastbn.use_backend(backend):
            y = fastbn.batch_norm(
                leaf, mean, var, eps=1e-30, activation=activation,
                residual=torch.zeros_like(x) if residual else None,
            )  # fmt: skip
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_as_in_pytorch(activation, residual, device):
    """Compares outputs and gradients where the activation's argument is not finite."""
    # The dtype is float64, since in float32 PyTorch's own GELU of infinity is NaN on a CPU.
    values = [float("nan"), float("inf"), -float("inf"), 1.0]
    x = torch.tensor(values, dtype=torch.float64, device=device).view(2, 2)
    add = torch.ones_like(x) if residual else None
    results = []
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        with fastbn.use_backend(backend):
            y = fastbn.batch_norm(
                leaf, torch.zeros_like(x[0]), torch.ones_like(x[0]), eps=1e-30,
                activation=activation, residual=add,
            )  # fmt: skip
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, equal_nan=True)

"""Each row of the table of activations agrees with its module, and its parts with each other."""

import pytest
import torch
from torch import nn

import fastbn
from fastbn.activations import ACT_LAYERS, ACTIVATIONS, activation_of

ROWS = pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=ACTIVATIONS)


@ROWS
def test_module_computes_the_function(row):
    module = row.module(**dict(row.options))
    param = None if row.parameter is None else row.default
    assert activation_of(module) == (row.name, param)
    z = torch.randn(100, dtype=torch.float64) * 4
    assert module(z).equal(row.function(z, row.default))


@ROWS
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_derivative_agrees_with_autograd(row, scale):
    z = (torch.randn(100, dtype=torch.float64) * 4).requires_grad_()
    dy, param = torch.randn(100, dtype=torch.float64), scale * row.default
    (expected,) = torch.autograd.grad(row.function(z, param), z, dy)
    torch.testing.assert_close(row.derivative(dy, z.detach(), param), expected)
    if row.saves == "mask":
        assert row.derivative(dy, z.sign().detach(), param).equal(expected)


@pytest.mark.parametrize("name", [*ACT_LAYERS, None, ""])
def test_every_name_makes_its_module(name):
    act = fastbn.FusedBatchNormAct1d(3, act_layer=name).act
    assert activation_of(act)[0] == (ACT_LAYERS[name].name if name else "none")


def test_parameters_are_read_from_modules():
    assert activation_of(nn.LeakyReLU(0.3)) == ("leaky_relu", 0.3)
    assert activation_of(nn.ELU(0.7)) == ("elu", 0.7)


def test_unknown_modules_have_no_row():
    class Shifted(nn.ReLU):
        pass

    other = nn.GELU()
    other.approximate = "sinh"
    for module in (Shifted(), other, nn.Mish()):
        assert activation_of(module) is None

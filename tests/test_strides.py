"""Axes of size 1 may have any stride in the input and in the output's gradient."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.runtime.layout import with_canonical_strides

from .oracle import CHANNELS_LAST

SHAPES = [
    (1, 5, 3, 4),
    (3, 5, 1, 4),
    (3, 5, 3, 1),
    (1, 5, 1, 4),
    (5, 1, 3, 4),
    (1, 5, 2, 3, 4),
    (2, 5, 1, 3, 4),
]


def laid_out(values, channels_last):
    """Returns the values in one of the two layouts, with random strides for axes of size 1."""
    format = CHANNELS_LAST[values.dim()] if channels_last else torch.contiguous_format
    strides = [
        torch.randint(1, 2 * values.numel(), ()).item() if size == 1 else stride
        for size, stride in zip(values.shape, values.contiguous(memory_format=format).stride())
    ]
    return torch.empty_strided(
        values.shape, strides, dtype=values.dtype, device=values.device
    ).copy_(values)


def gradients(batch_norm, x, weight, dy, training):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = torch.zeros_like(weight, requires_grad=True)
    mean, var = torch.full_like(weight, 0.3).detach(), torch.full_like(weight, 2.0).detach()
    y = batch_norm(x, mean, var, weight, bias, training)
    return y, *torch.autograd.grad(y, (x, weight, bias), dy)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_axes_of_size_1_may_have_any_stride(backend, shape, training, device):
    draws = 3 if backend == "torch" else 1  # a draw takes the interpreter a second
    for channels_last, dy_channels_last in draws * list(product([False, True], repeat=2)):
        x, dy = torch.randn(2, *shape, dtype=torch.double, device=device)
        weight = torch.rand(shape[1], dtype=torch.double, device=device)
        expected = gradients(F.batch_norm, x, weight, dy, training)
        x, dy = laid_out(x, channels_last), laid_out(dy, dy_channels_last)
        with fastbn.use_backend(backend):
            found = gradients(fastbn.batch_norm, x, weight, dy, training)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_image_with_the_strides_of_an_array_agrees(backend, training, dtype, device):
    """The image has its axes in the order height, width, channels, as in NumPy and PIL."""
    x = torch.randn(3, 7, 33, dtype=dtype, device=device).permute(2, 0, 1).unsqueeze(0)
    assert x.stride() == (33, 1, 231, 33)
    dy = torch.randn(1, 33, 3, 7, dtype=dtype, device=device)
    weight = torch.rand(33, dtype=dtype, device=device)
    expected = gradients(F.batch_norm, x.contiguous(), weight, dy, training)
    with fastbn.use_backend(backend):
        found = gradients(fastbn.batch_norm, x, weight, dy, training)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_canonical_strides_take_no_copy(device):
    x = torch.randn(3, 7, 33, device=device).permute(2, 0, 1).unsqueeze(0)
    restrided = with_canonical_strides(x)
    assert restrided.data_ptr() == x.data_ptr()
    assert restrided.equal(x)
    assert restrided.is_contiguous(memory_format=torch.channels_last)
    assert restrided.stride() == (693, 1, 231, 33)
    dense = torch.randn(2, 3, 4, 5, device=device)
    assert with_canonical_strides(dense) is dense

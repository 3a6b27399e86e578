"""Triton's interpreter, as the tests mend it, still computes and refuses what it should."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU doesn't interpret")


@triton.jit
def round_kernel(X, Cast, Stored, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Cast + i, x.to(tl.bfloat16).to(tl.float32))
    tl.store(Stored + i, x)


def values(kind):
    if kind == "random":
        return torch.randn(4096)
    if kind == "ties":  # values halfway between two neighbours, of which one is even
        return (torch.arange(0x3F80, 0x4080).repeat(16) << 16 | 0x8000).int().view(torch.float32)
    if kind == "denormal":
        return torch.randint(0, 2**23, (4096,), dtype=torch.int32).view(torch.float32)
    most = torch.finfo(torch.float32).max
    special = [most, -most, float("inf"), -float("inf"), 0.0, -0.0, 3.3895e38, 1e-45]
    return torch.tensor(special).repeat(512)


@pytest.mark.parametrize("kind", ["random", "ties", "denormal", "special"])
def test_bfloat16_is_rounded_to_nearest_even(kind, device):
    x = values(kind).to(device)
    cast, stored = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    round_kernel[(1,)](x, cast, stored, N=4096)
    expected = x.cpu().to(torch.bfloat16)
    assert stored.cpu().view(torch.int16).equal(expected.view(torch.int16))
    assert cast.cpu().view(torch.int32).equal(expected.float().view(torch.int32))


def test_nan_stays_nan(device):
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1] * 4, dtype=torch.int32)
    x = bits.view(torch.float32).to(device)
    cast, stored = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    round_kernel[(1,)](x, cast, stored, N=16)
    assert stored.isnan().all()
    assert cast.isnan().all()


@triton.jit
def compute_kernel(A, B, Out, OPERATION: tl.constexpr):
    i = tl.arange(0, 4)
    a, b = tl.load(A + i), tl.load(B + i)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    else:
        result = a * b
    tl.store(Out + i, result)


@interpreted
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize(
    ("dtype", "a", "b"),
    [
        (torch.int32, 2**30, 2**30),
        (torch.int32, -(2**30), 2**30 + 1),
        (torch.int32, 2**16, 2**15),
        (torch.int32, 2**16, -(2**15)),
        (torch.uint8, 3, 4),
        (torch.uint8, 100, 156),
        (torch.int64, 2**62, 2),
    ],
)
def test_integers_that_overflow_are_an_error(dtype, a, b, operation):
    """Integers of 64 bits wrap around, since Triton's own check leaves them out too."""
    exact = {"add": a + b, "sub": a - b, "mul": a * b}[operation]
    limits = torch.iinfo(dtype)
    tensors = [torch.tensor([0, 1, value, 2], dtype=dtype) for value in (a, b, 0)]
    tensors[1][1::2] = 1
    if dtype is not torch.int64 and not limits.min <= exact <= limits.max:
        with pytest.raises(InterpreterError, match=f"overflows in {operation}"):
            compute_kernel[(1,)](*tensors, operation)
    else:
        compute_kernel[(1,)](*tensors, operation)
        wrapped = (exact - limits.min) % 2**limits.bits + limits.min
        assert tensors[2][2] == wrapped


@triton.jit
def number_kernel(X, Out):
    i = tl.arange(0, 4)
    tl.store(Out + i, tl.load(X + i) * 2)
    tl.store(Out + 4 + i, i * 2.5)
    tl.store(Out + 8 + i, (i + 1) // 2)
    tl.store(Out + 12 + i, (i + 1.0) / 2)


@triton.jit
def broadcast_kernel(X, Y, Out):
    i, j = tl.arange(0, 4)[:, None], tl.arange(0, 2)[None, :]
    tl.store(Out + i * 2 + j, tl.load(X + i) - tl.load(Y + j))


def test_what_was_converted_once_stays_right(device):
    """Numbers that compare equal, and operands of other shapes; twice, as types are remembered."""
    for scale in (1.0, 3.0):
        x, out = scale * torch.ones(4, device=device), torch.empty(16, device=device)
        number_kernel[(1,)](x, out)
        expected = [2 * scale] * 4, [0, 2.5, 5, 7.5], [0, 1, 1, 2], [0.5, 1, 1.5, 2]
        assert out.view(4, 4).tolist() == [*expected]
        x, y = scale * torch.randn(4, device=device), torch.randn(2, device=device)
        broadcast_kernel[(1,)](x, y, out)
        assert out[:8].view(4, 2).equal(x[:, None] - y)


@triton.jit
def bad_shape_kernel():
    tl.zeros((3,), tl.float32)


@interpreted
def test_a_type_of_a_bad_shape_is_an_error_each_time():
    for _ in range(2):
        with pytest.raises(InterpreterError, match="power of 2"):
            bad_shape_kernel[(1,)]()

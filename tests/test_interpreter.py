"""Triton's interpreter, as the tests mend it, rounds to bfloat16 as PyTorch and GPUs do."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def round_kernel(X, Cast, Stored, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Cast + i, x.to(tl.bfloat16).to(tl.float32))
    tl.store(Stored + i, x)


def values(kind):
    if kind == "random":
        return torch.randn(4096)
    if kind == "ties":  # halfway between two neighbours, of which either may be even
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

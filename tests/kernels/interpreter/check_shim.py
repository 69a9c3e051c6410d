"""The interpreter as the shim leaves it: bfloat16 is right or refused, scalars bound loops, memory starts poisoned."""

import pytest
import torch
import triton
import triton.language as tl
from bounds import same_bits
from shim import UNWRITTEN


@triton.jit
def convert_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


@triton.jit
def double_kernel(x_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, x + x)


@triton.jit
def sum_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE))).to(tl.float32))


@triton.jit
def count_kernel(y_ptr, n):
    counted = 0
    for _ in range(0, n, 2):
        counted += 1
    tl.store(y_ptr, counted)


@triton.jit
def sort_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.sort(tl.load(x_ptr + at), descending=True))


def test_conversion_to_bfloat16_rounds_as_torch_does():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-40, 24).repeat(64)
    # ties, a carry into the exponent, overflow, signs of zero, NaN
    special = [1.00390625, 1.01171875, 1.998046875, 3.4e38, -3.4e38, 0.0, -0.0, float("inf"), float("nan"), 1e-40]
    x[: len(special)] = torch.tensor(special)
    y, back = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096)
    convert_kernel[(1,)](x, y, SIZE=4096)
    expected = x.bfloat16()
    number = ~expected.isnan()
    assert same_bits(y[number], expected[number]) and y[~number].isnan().all()
    convert_kernel[(1,)](y, back, SIZE=4096)
    assert same_bits(back[number], y[number].float())


def test_dot_of_bfloat16():
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    y = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, y, SIZE=16)
    torch.testing.assert_close(y, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_dot_has_the_same_bits_wherever_a_row_and_a_column_are():
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    y, moved = torch.empty(32, 32), torch.empty(32, 32)
    dot_kernel[(1,)](a, b, y, SIZE=32)
    dot_kernel[(1,)](a.roll(5, 0).contiguous(), b.roll(3, 1).contiguous(), moved, SIZE=32)
    assert same_bits(moved, y.roll(5, 0).roll(3, 1))


def test_other_arithmetic_on_bfloat16_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="binary_op on bfloat16"):
        double_kernel[(1,)](x, SIZE=16)
    with pytest.raises(Exception, match="reduction of bfloat16"):
        sum_kernel[(1,)](x, torch.empty(1), SIZE=16)
    double_kernel[(1,)](y := torch.ones(16), SIZE=16)
    assert torch.equal(y, torch.full((16,), 2.0))


def test_a_scalar_bounds_a_loop():
    y = torch.empty(1, dtype=torch.int32)
    count_kernel[(1,)](y, 7)
    assert y.item() == 4


def test_sort_agrees_with_torch():
    x = torch.randint(-50, 50, (64,), generator=torch.Generator().manual_seed(0))
    y = torch.empty(64, dtype=torch.int64)
    sort_kernel[(1,)](x, y, SIZE=64)
    assert torch.equal(y, x.sort(descending=True).values)


def test_unwritten_memory_shows():
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(2)).isnan().all()
    assert torch.zeros(2).new_empty(5, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == UNWRITTEN).all()

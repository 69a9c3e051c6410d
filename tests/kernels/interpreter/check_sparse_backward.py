"""The Triton kernels of sparse_backward against their references in float64."""

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor

from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.sparse_backward import sparse_backward, sparse_dots, sparse_outer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# n, k, m, d: one block and less, several blocks and a rest; few features, so that each has several blocks of entries
SIZES = [(3, 1, 5, 1), (7, 16, 9, 256), (11, 17, 6, 40), (2, 5, 4, 300)]


def make(n: int, k: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad, x, values (a third of them zero), indices (never the last feature), w_dec."""
    generator = torch.Generator().manual_seed(0)
    grad, x = torch.randn(2, n, d, generator=generator).to(dtype)
    values = torch.randn(n, k, generator=generator).add(0.4).relu()
    indices = torch.randint(0, max(1, m - 1), (n, k), generator=generator, dtype=torch.int32)
    return grad, x, values, indices, torch.randn(m, d, generator=generator).to(dtype)


def exact(*arguments: Tensor | None, relu: bool) -> list[Tensor | None]:
    wide = [each.double() if each is not None and each.is_floating_point() else each for each in arguments]
    with use("reference"):
        return list(sparse_backward(*wide, relu=relu))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("relu", [False, True])
def test_against_float64(dtype: torch.dtype, size: tuple[int, int, int, int], relu: bool) -> None:
    grad, x, values, indices, w_dec = make(*size, dtype)
    # the slopes are all of one sign: no sum cancels, and an error is seen relative to what was added up
    grad, w_dec = grad.abs(), w_dec.abs()
    for each in (x.abs(), None):
        ours = sparse_backward(grad, each, values, indices, w_dec, relu=relu)
        theirs = exact(grad, each, values, indices, w_dec, relu=relu)
        assert (ours[2] is None) == (each is None)
        for mine, right in zip(ours, theirs, strict=True):
            if mine is not None:
                assert_within(mine, right, OUTPUT[mine.dtype])
        assert not ours[1][-1].any() or size[2] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_the_whole(dtype: torch.dtype) -> None:
    grad, x, values, indices, w_dec = make(7, 19, 5, 70, dtype)
    d_values, d_w_dec, d_w_enc, d_b_enc = sparse_backward(grad, x, values, indices, w_dec, relu=False)
    assert same_bits(sparse_dots(grad, indices, w_dec), d_values)
    assert same_bits(sparse_outer(values, indices, grad, 5, dtype=dtype)[0], d_w_dec)
    outer, total = sparse_outer(d_values, indices, x, 5, dtype=dtype)
    assert same_bits(outer, d_w_enc) and same_bits(total, d_b_enc)


def test_every_run_has_the_same_bits() -> None:
    arguments = make(12, 9, 5, 270, torch.bfloat16)
    first, second = (sparse_backward(*arguments, relu=True) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_nothing_active_gives_zeros(shape: tuple[int, int]) -> None:
    values, indices = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
    x = torch.randn(shape[0], 33)
    d_values, *gradients = sparse_backward(x, x, values, indices, torch.randn(6, 33), relu=True)
    assert d_values.shape == shape
    for each, size in zip(gradients, ((6, 33), (6, 33), (6,)), strict=True):
        assert each.shape == size and not each.any()

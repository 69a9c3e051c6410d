"""lowrank_edit's Triton kernels: bounds against float64, odd sizes, pairs, rows, masks, bits that must not move."""

import pytest
import torch
from bounds import EDIT, OUTPUT, assert_within, same_bits
from torch import Tensor

from hooked_vla.kernels import dispatch
from hooked_vla.kernels.lowrank_edit import lowrank_edit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(n, d, r, n_rows, dtype, m=None, weights=None, seed=0):
    """x, src, a, b, alpha, beta, add: an edit about as large as a token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, src = draw(n, d).to(dtype), draw(m or n, d).to(dtype)
    a, b = (draw(r, d).div(max(1, size) ** 0.5).to(weights or dtype) for size in (d, r))
    alpha, beta = (torch.rand(n_rows, generator=generator) + 0.5 for _ in range(2))
    return [x, src, a, b, alpha, beta, draw(n_rows, d)]


def exact(given: list[Tensor | None], **options) -> Tensor:
    with dispatch.use("reference"):
        return lowrank_edit(*(None if each is None else each.double() for each in given), **options)


def assert_right(given, dtype, **options):
    """The output within its bound, and the edit, in tokens that have one, within its own."""
    y, expected = lowrank_edit(*given, **options), exact(given, **options)
    assert_within(y, expected, OUTPUT[dtype])
    x, mask = given[0].double(), options.get("mask")
    kept = slice(None) if mask is None else mask
    assert_within((y.double() - x)[kept], (expected - x)[kept], EDIT[dtype])
    if mask is not None:
        assert same_bits(y[~mask], given[0][~mask])
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "r", "n_rows"), [(1, 16, 1, 1), (70, 100, 5, 3), (16, 300, 17, 2), (3, 33, 70, 1)])
def test_odd_sizes_pairs_rows_and_masks(dtype, n, d, r, n_rows):
    given = tensors(n, d, r, n_rows, dtype, m=11)
    generator = torch.Generator().manual_seed(1)
    pair = torch.randint(0, 11, (n,), generator=generator, dtype=torch.int32)
    row = torch.randint(0, n_rows, (n,), generator=generator, dtype=torch.int32)
    mask = torch.rand(n, generator=generator) < 0.7
    assert_right(given, dtype, pair=pair, row=row, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [(), ("src",), ("add",), ("src", "add")])
def test_optional_parts(dtype, left_out):
    given = tensors(5, 40, 3, 1, dtype)
    given[1] = None if "src" in left_out else given[1]
    given[6] = None if "add" in left_out else given[6]
    assert_right(given, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_of_narrow_tokens(dtype):
    assert_right(tensors(19, 70, 4, 1, dtype, weights=torch.float32), dtype)


def test_bfloat16_weights_see_more_than_8_bits_of_the_difference():
    """Every element of the edit is right to its own last bit: a difference of 8 bits would be off by the row's."""
    given = tensors(9, 64, 4, 1, torch.bfloat16)
    given[0] = torch.zeros_like(given[0])
    y, expected = lowrank_edit(*given[:6], None).double(), exact([*given[:6], None])
    row = expected.norm(dim=1, keepdim=True) / 8
    assert ((y - expected).abs() <= 2**-7 * expected.abs() + 2e-5 * row).all()
    coarse = (given[5] * given[1].double()).bfloat16().double() @ given[2].double().T @ given[3].double()
    assert not ((coarse - expected).abs() <= 2**-7 * expected.abs() + 2e-5 * row).all()


def test_several_splits_and_blocks_of_columns():
    assert_right(tensors(5, 1100, 3, 1, torch.bfloat16), torch.bfloat16)
    assert_right(tensors(5, 600, 3, 1, torch.float32), torch.float32)


def test_rank_zero_only_adds():
    row = torch.arange(7, dtype=torch.int32) % 2
    assert_right(tensors(7, 50, 0, 2, torch.bfloat16), torch.bfloat16, row=row)
    given = tensors(7, 50, 0, 2, torch.float32)
    assert same_bits(lowrank_edit(*given, row=row), given[0] + given[6][row])
    assert same_bits(lowrank_edit(*given[:6], None, row=row), given[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens_and_zero_strengths_keep_every_bit(dtype):
    given = tensors(70, 48, 5, 2, dtype)[:6]
    given[0][3] = -0.0
    row = torch.arange(70, dtype=torch.int32) % 2
    patched = [given[0], given[0].clone(), *given[2:4], given[4], given[4].clone(), None]
    assert same_bits(lowrank_edit(*patched, row=row), given[0])
    nothing = [*given[:4], torch.zeros(2), torch.zeros(2), torch.zeros(2, 48)]
    assert same_bits(lowrank_edit(*nothing, row=row), given[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_keep_every_bit_and_leak_nothing(dtype):
    given = tensors(70, 48, 5, 1, dtype)
    given[0][4] = float("nan")
    given[0][5] = -0.0
    given[1][6] = float("inf")
    mask = torch.ones(70, dtype=torch.bool)
    mask[[4, 5, 6]] = False
    y = lowrank_edit(*given, mask=mask, validate=False)
    assert same_bits(y[~mask], given[0][~mask])
    assert y[mask].isfinite().all()
    nobody = torch.zeros(70, dtype=torch.bool)
    assert same_bits(lowrank_edit(*given, mask=nobody, validate=False), given[0])


def test_no_tokens():
    given = tensors(0, 24, 3, 1, torch.bfloat16)
    assert lowrank_edit(*given).shape == (0, 24)


def test_same_bits_run_to_run_and_in_any_batch():
    given = tensors(130, 90, 6, 2, torch.bfloat16)
    row = torch.arange(130, dtype=torch.int32) % 2
    y = lowrank_edit(*given, row=row)
    assert same_bits(lowrank_edit(*given, row=row), y)
    for start, stop in ((0, 1), (64, 65), (3, 130)):
        part = [given[0][start:stop].contiguous(), given[1][start:stop].contiguous(), *given[2:]]
        assert same_bits(lowrank_edit(*part, row=row[start:stop].contiguous()), y[start:stop])


def test_gradients_of_the_kernel_are_those_of_the_reference():
    given = tensors(9, 20, 3, 2, torch.float32, m=4)
    options = {"pair": torch.arange(9, dtype=torch.int32) % 4, "row": torch.arange(9, dtype=torch.int32) % 2}
    options["mask"] = torch.arange(9) != 5
    leaves = [each.clone().requires_grad_(True) for each in given]
    grads = torch.autograd.grad(lowrank_edit(*leaves, **options).square().sum(), leaves)
    doubles = [each.double().requires_grad_(True) for each in given]
    with dispatch.use("reference"):
        expected = torch.autograd.grad(lowrank_edit(*doubles, **options).square().sum(), doubles)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_within(ours.flatten(), theirs.flatten(), 1e-5)

"""delta_splice's Triton kernel: bounds against float64, odd sizes, masks, rows, ties, bits that must not move."""

import pytest
import torch
from bounds import EDIT, OUTPUT, assert_within, same_bits

from hooked_vla.kernels import delta_splice, delta_splice_features, dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(n, d, n_features, n_rows, dtype, weights=None, seed=0):
    """x, the features' weights and random edits about as large as a token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = draw(n, d).to(dtype)
    w_enc, w_dec = (draw(n_features, d).div(d**0.5).to(weights or dtype) for _ in range(2))
    b_enc, threshold = draw(n_features) * 0.1, draw(n_features).abs() * 0.3
    scale, shift = draw(n_rows, n_features) * 2, draw(n_rows, n_features) * 2
    lo, hi = torch.full((n_rows, n_features), -1.0), torch.full((n_rows, n_features), 4.0)
    return [x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi]


def exact(given, **options):
    with dispatch.use("reference"):
        return delta_splice_features(*(each.double() for each in given), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "n_features", "n_rows"), [(1, 16, 1, 1), (37, 100, 5, 3), (16, 257, 17, 2), (3, 33, 64, 1)]
)
def test_odd_sizes_masks_and_rows(dtype, n, d, n_features, n_rows):
    given = tensors(n, d, n_features, n_rows, dtype)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(0, n_rows, (n,), generator=generator, dtype=torch.int32)
    mask = torch.rand(n, generator=generator) < 0.7
    y, f = delta_splice_features(*given, row=row, mask=mask)
    expected, features = exact(given, row=row, mask=mask)
    assert_within(y, expected, OUTPUT[dtype])
    assert_within(f, features, OUTPUT[torch.float32])
    edit, x = expected - given[0].double(), given[0].double()
    assert_within((y.double() - x)[mask], edit[mask], EDIT[dtype])
    assert same_bits(y[~mask], given[0][~mask])
    assert same_bits(delta_splice(*given, row=row, mask=mask), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_of_narrow_tokens(dtype):
    given = tensors(19, 70, 4, 1, dtype, weights=torch.float32)
    assert_within(delta_splice(*given), exact(given)[0], OUTPUT[dtype])


def test_several_blocks_of_columns():
    given = tensors(5, 600, 3, 1, torch.bfloat16)
    assert_within(delta_splice(*given), exact(given)[0], OUTPUT[torch.bfloat16])


def test_edit_alone_for_means():
    given = tensors(5, 70, 3, 1, torch.float32, weights=torch.bfloat16)
    edit, _ = torch.ops.hooked_vla.delta_splice(*given, None, None, False, True)
    assert_within(edit, exact(given)[0] - given[0].double(), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_edit_keeps_every_bit(dtype):
    given = tensors(21, 48, 5, 1, dtype)
    given[0][3] = -0.0
    given[0][4] = float("nan")
    n_rows = given[5].shape
    given[5:] = [torch.ones(n_rows), torch.zeros(n_rows), torch.full(n_rows, -torch.inf), torch.full(n_rows, torch.inf)]
    assert same_bits(delta_splice(*given, validate=False), given[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inactive_features_and_masked_tokens_keep_every_bit(dtype):
    given = tensors(21, 48, 5, 1, dtype)
    given[0][3] = -0.0
    given[0][4] = float("nan")
    given[3].fill_(torch.inf)
    given[6].zero_()
    assert same_bits(delta_splice(*given, validate=False), given[0])
    given = tensors(21, 48, 5, 1, dtype)
    given[0][5] = float("inf")
    nobody = torch.zeros(21, dtype=torch.bool)
    assert same_bits(delta_splice(*given, mask=nobody), given[0])


def test_a_feature_at_its_threshold_is_inactive():
    given = tensors(4, 16, 1, 1, torch.float32)
    given[0].fill_(1.0)
    given[1].fill_(0.25)
    given[2].zero_()
    given[3].fill_(4.0)
    _, f = delta_splice_features(*given)
    assert torch.equal(f, torch.zeros(4, 1))
    given[3].fill_(4.0 - 1e-6)
    assert torch.equal(delta_splice_features(*given)[1], torch.full((4, 1), 4.0))


def test_each_token_may_have_its_own_threshold():
    given = tensors(19, 24, 3, 1, torch.bfloat16)
    given[3] = torch.where(torch.arange(19)[:, None] % 2 == 0, given[3], torch.inf).contiguous()
    y, f = torch.ops.hooked_vla.delta_splice(*given, None, None, True, False)
    with dispatch.use("reference"):
        wide = [each.double() for each in given]
        expected, features = torch.ops.hooked_vla.delta_splice(*wide, None, None, True, False)
    assert_within(y, expected, OUTPUT[torch.bfloat16])
    assert_within(f, features, OUTPUT[torch.float32])
    assert (f[1::2] == 0).all() and (f[::2] > 0).any()


@pytest.mark.parametrize(("n", "n_features"), [(0, 3), (5, 0)])
def test_nothing_to_edit(n, n_features):
    given = tensors(n, 24, n_features, 1, torch.bfloat16)
    y, f = delta_splice_features(*given)
    assert same_bits(y, given[0]) and f.shape == (n, n_features)
    assert n == 0 or y.data_ptr() != given[0].data_ptr()


def test_same_bits_run_to_run_and_in_any_batch():
    given = tensors(40, 90, 6, 2, torch.bfloat16)
    row = torch.arange(40, dtype=torch.int32) % 2
    y = delta_splice(*given, row=row)
    assert same_bits(delta_splice(*given, row=row), y)
    for start, stop in ((0, 1), (17, 18), (3, 40)):
        part = [given[0][start:stop].contiguous(), *given[1:]]
        assert same_bits(delta_splice(*part, row=row[start:stop].contiguous()), y[start:stop])


def test_gradients_of_the_kernel_are_those_of_the_reference():
    given = tensors(9, 20, 3, 1, torch.float32)
    leaves = [each.clone().requires_grad_(True) for each in given]
    grads = torch.autograd.grad(delta_splice(*leaves).square().sum(), leaves[:3] + leaves[4:], allow_unused=True)
    doubles = [each.double().requires_grad_(True) for each in given]
    with dispatch.use("reference"):
        total = delta_splice(*doubles).square().sum()
    for ours, theirs in zip(grads, torch.autograd.grad(total, doubles[:3] + doubles[4:]), strict=True):
        assert_within(ours.flatten(), theirs.flatten(), 1e-5)

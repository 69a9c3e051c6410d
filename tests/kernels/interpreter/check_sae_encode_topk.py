"""sae_encode_topk's Triton kernels: the exact choice, ties, NaN, odd sizes, runs of features, bits that stay."""

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor

from hooked_vla.kernels import dispatch
from hooked_vla.kernels.sae_encode_topk import encode_gmax, fused, reference, sae_encode_topk, select_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def encoder(n, d, m, dtype, weights=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator).to(dtype)
    w_enc = torch.randn(m, d, generator=generator).div(d**0.5).to(weights or dtype)
    return x, w_enc, torch.randn(m, generator=generator) * 0.1


def exact_z(x, w_enc, b_enc):
    return reference.encode(x.double(), w_enc.double(), b_enc.double())


def assert_chosen(values: Tensor, indices: Tensor, z: Tensor, k: int, relu: bool = True) -> None:
    """values are those of the indices, in descending order, and nothing larger was left out, but for roundings of z."""
    margin = 1e-5
    assert values.shape == indices.shape == (z.shape[0], k) and indices.dtype == torch.int32
    chosen = z.gather(1, indices.long())
    assert (values.double() - (chosen.relu() if relu else chosen)).abs().max() < margin
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert all(len(set(row.tolist())) == k for row in indices)
    left = z.scatter(1, indices.long(), -torch.inf).amax(1)
    assert (left <= chosen.amin(1) + margin).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "m", "k"), [(1, 16, 1, 1), (5, 100, 300, 7), (2, 70, 129, 64), (3, 33, 40, 40)])
def test_odd_sizes(dtype, n, d, m, k):
    given = encoder(n, d, m, dtype)
    relu = dtype != torch.float32
    values, indices = sae_encode_topk(*given, k, relu=relu)
    assert_chosen(values, indices, exact_z(*given), k, relu)


def test_float32_weights_of_narrow_tokens():
    given = encoder(3, 50, 140, torch.bfloat16, weights=torch.float32)
    assert_chosen(*sae_encode_topk(*given, 9), exact_z(*given), 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 32, 128])
def test_runs_of_features(dtype, group):
    given = encoder(130, 40, 256, dtype)
    z, maxima = encode_gmax(*given, group)
    assert_within(z, exact_z(*given), OUTPUT[torch.float32])
    assert same_bits(maxima, z.view(130, -1, group).amax(2))


def integers(n: int, m: int, seed: int = 0) -> Tensor:
    """z in which most values occur many times, both zeros among them."""
    z = torch.randint(-3, 4, (n, m), generator=torch.Generator().manual_seed(seed)).float()
    return torch.where((z == 0) & (torch.arange(m) % 2 == 0), -0.0, z)


@pytest.mark.parametrize(("m", "group", "k"), [(256, 32, 5), (256, 32, 64), (96, 1, 7), (128, 128, 128), (64, 2, 1)])
def test_ties_go_to_the_smaller_index(m, group, k):
    z = integers(3, m)
    values, indices = select_topk(z, reference.group_maxima(z, group), k)
    expected_values, expected = reference.select(z, k)
    assert torch.equal(indices, expected) and torch.equal(values, expected_values)


def test_nan_is_the_largest_and_infinities_have_their_places():
    z = integers(4, 128)
    z[0, 77] = torch.nan
    z[0, 78] = -torch.nan
    z[1, [5, 90]] = torch.inf
    z[2] = -torch.inf
    z[2, 100] = -1e38
    values, indices = select_topk(z, reference.group_maxima(z, 32), 6, validate=False)
    expected_values, expected = reference.select(z, 6)
    assert torch.equal(indices, expected)
    assert torch.equal(values.nan_to_num(nan=1e30), expected_values.nan_to_num(nan=1e30))
    assert values[0].isnan().sum() == 2


def test_nan_survives_the_encoder_and_relu():
    x, w_enc, b_enc = encoder(3, 20, 70, torch.bfloat16)
    w_enc[50, 3] = torch.nan
    values, indices = sae_encode_topk(x, w_enc, b_enc, 4, validate=False)
    assert values[:, 0].isnan().all() and (indices[:, 0] == 50).all() and values[:, 1:].isfinite().all()


def test_infinite_tokens_choose_among_the_features_there_are():
    """The last block of features is not full, and infinity times its empty places would be NaN, the largest."""
    x, w_enc, b_enc = encoder(2, 20, 70, torch.float32)
    x[0, 3] = torch.inf
    _, indices = sae_encode_topk(x, w_enc, b_enc, 60, validate=False)
    assert torch.equal(indices, reference.select(reference.encode(x, w_enc, b_enc), 60)[1])


def test_relu_keeps_k_values():
    x, w_enc, b_enc = encoder(3, 20, 70, torch.float32)
    values, indices = sae_encode_topk(x, w_enc, b_enc - 100, 5)
    assert torch.equal(values, torch.zeros(3, 5))
    assert torch.equal(indices, sae_encode_topk(x, w_enc, b_enc - 100, 5, relu=False)[1])


def test_more_than_a_program_can_hold_goes_another_way():
    z = integers(2, 16384)
    assert fused.selection(16384, 1, 3) is None and fused.selection(16384, 32, 512) is None
    values, indices = select_topk(z, z, 3)
    assert torch.equal(indices, reference.select(z, 3)[1])


@pytest.mark.parametrize(("m", "k"), [(8192, 16), (16384, 32), (32768, 64), (131072, 128), (1 << 20, 64)])
def test_usual_dictionaries_are_selected_by_the_kernel(m, k):
    assert fused.selection(m, fused.best_group(m, k), k) is not None


def test_blocks_of_tokens_give_the_same(monkeypatch):
    given = encoder(5, 24, 64, torch.float32)
    values, indices = sae_encode_topk(*given, 5)
    monkeypatch.setattr(fused, "Z_BLOCK", 256)
    parts = sae_encode_topk(*given, 5)
    assert same_bits(parts[0], values) and torch.equal(parts[1], indices)


def test_no_tokens():
    values, indices = sae_encode_topk(*encoder(0, 24, 64, torch.bfloat16), 5)
    assert values.shape == indices.shape == (0, 5)


def test_same_bits_run_to_run_and_in_any_batch():
    x, w_enc, b_enc = encoder(130, 70, 256, torch.bfloat16)
    z, maxima = encode_gmax(x, w_enc, b_enc, 32)
    again = encode_gmax(x, w_enc, b_enc, 32)
    assert same_bits(again[0], z) and same_bits(again[1], maxima)
    for start, stop in ((0, 1), (127, 129)):
        part = x[start:stop].contiguous()
        z_part, maxima_part = encode_gmax(part, w_enc, b_enc, 32)
        assert same_bits(z_part, z[start:stop]) and same_bits(maxima_part, maxima[start:stop])
        values, indices = sae_encode_topk(part, w_enc, b_enc, 8, relu=False)
        whole = select_topk(z[start:stop], maxima[start:stop], 8)
        assert same_bits(values, whole[0]) and torch.equal(indices, whole[1])


def test_gradients_of_the_kernel_are_those_of_the_reference():
    given = encoder(4, 18, 40, torch.float32)
    leaves = [each.clone().requires_grad_(True) for each in given]
    grads = torch.autograd.grad(sae_encode_topk(*leaves, 6)[0].square().sum(), leaves)
    doubles = [each.double().requires_grad_(True) for each in given]
    with dispatch.use("reference"):
        expected = torch.autograd.grad(sae_encode_topk(*doubles, 6)[0].square().sum(), doubles)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_within(ours.flatten(), theirs.flatten(), 1e-5)

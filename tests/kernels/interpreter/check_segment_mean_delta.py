"""segment_mean_delta's Triton kernels: bounds against float64, empty segments, tokens outside, and batch invariance."""

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits

from hooked_vla.kernels import dispatch, segment_add, segment_mean, segment_mean_delta

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(n, n_segments, seed=0):
    """Of each token its segment, in no order; some in none."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, n_segments, (n,), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "n_segments"), [(1, 16, 1), (67, 70, 3), (5, 130, 9), (40, 33, 2)])
def test_mean_of_scattered_segments(dtype, n, d, n_segments):
    x, segment = draw(n, d).to(dtype), numbers(n, n_segments)
    with dispatch.use("reference"):
        expected = segment_mean(x.double(), segment, n_segments)
    mean = segment_mean(x, segment, n_segments)
    assert mean.dtype == torch.float32
    assert_within(mean, expected, OUTPUT[torch.float32])


def test_empty_segments_are_zero_and_tokens_elsewhere_do_not_leak():
    x = draw(12, 20)
    segment = torch.tensor([2] * 6 + [-1] * 3 + [0] * 3, dtype=torch.int32)
    x[6:9] = float("nan")
    mean = segment_mean(x, segment, 4)
    assert torch.equal(mean[[1, 3]], torch.zeros(2, 20))
    assert mean.isfinite().all()
    assert segment_mean(x[:0], segment[:0], 2).tolist() == [[0.0] * 20] * 2
    assert segment_mean(x, segment.fill_(-1), 0).shape == (0, 20)


def test_a_mean_does_not_depend_on_where_its_segment_begins():
    x = draw(50, 24)
    alone = segment_mean(x, torch.zeros(50, dtype=torch.int32), 1)
    for before in (1, 31, 1030):
        longer = torch.cat([draw(before, 24, seed=1), x, draw(3, 24, seed=2)])
        segment = torch.tensor([0] * before + [1] * 50 + [-1] * 3, dtype=torch.int32)
        assert same_bits(segment_mean(longer, segment, 2)[1:], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 16), (37, 70), (6, 600)])
def test_add_keeps_bits_where_nothing_is_added(dtype, n, d):
    x, segment, delta = draw(n, d).to(dtype), numbers(n, 3), draw(3, d, seed=1)
    delta[1] = 0
    x[0] = -0.0
    y = segment_add(x, delta, segment)
    with dispatch.use("reference"):
        assert_within(y, segment_add(x.double(), delta.double(), segment), OUTPUT[dtype])
        assert same_bits(y, segment_add(x, delta, segment))
    untouched = (segment == -1) | (segment == 1)
    assert same_bits(y[untouched], x[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_edit(dtype):
    n, d, n_features, n_rows = 45, 80, 4, 3
    x, segment = draw(n, d).to(dtype), numbers(n, 5)
    w_enc, w_dec = (draw(n_features, d, seed=seed).div(d**0.5).to(dtype) for seed in (2, 3))
    tables = [draw(n_rows, n_features, seed=4), draw(n_rows, n_features, seed=5) * 3]
    tables += [torch.full((n_rows, n_features), value) for value in (-2.0, 9.0)]
    features = [w_enc, draw(n_features, seed=6), torch.zeros(n_features), w_dec]
    row = torch.tensor([0, 2, 1, 1, 0], dtype=torch.int32)
    y = segment_mean_delta(x, segment, 5, *features, *tables, row=row)
    with dispatch.use("reference"):
        wide = [each.double() for each in (*features, *tables)]
        expected = segment_mean_delta(x.double(), segment, 5, *wide, row=row)
    assert_within(y, expected, OUTPUT[dtype])
    assert same_bits(y[segment < 0], x[segment < 0])
    assert (y[segment >= 0] != x[segment >= 0]).any()
    assert same_bits(segment_mean_delta(x, segment, 5, *features, *tables, row=row), y)

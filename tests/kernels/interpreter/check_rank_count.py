"""rank_count's Triton kernels: counts against the reference and the top k, ties, NaN, odd sizes."""

import pytest
import torch

from hooked_vla.kernels.rank_count import rank_count
from hooked_vla.kernels.rank_count.reference import rank_count as plain
from hooked_vla.kernels.sae_encode_topk import encode_gmax, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def integers(n, d, m, dtype, seed=0):
    """Small whole numbers: z is exact in every dtype and order, and most of its values occur many times."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (n, d), generator=generator).to(dtype)
    w_enc = torch.randint(-1, 2, (m, d), generator=generator).to(dtype)
    return x, w_enc, torch.randint(-1, 2, (m,), generator=generator).float()


def some(m: int, count: int) -> torch.Tensor:
    """Features in no order, the first and the last among them."""
    return torch.linspace(m - 1, 0, count).round().int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "m", "count"), [(1, 16, 1, 1), (70, 20, 300, 5), (3, 70, 129, 16), (140, 9, 40, 2)])
def test_counts_are_those_of_the_reference(dtype, n, d, m, count):
    given = integers(n, d, m, dtype)
    assert torch.equal(rank_count(*given, some(m, count)), plain(*given, some(m, count)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_below_k_is_among_the_top_k(dtype):
    """Real numbers, and copies of features, of which the earlier comes first."""
    generator = torch.Generator().manual_seed(3)
    x, w_enc = (torch.randn(size, 30, generator=generator).to(dtype) for size in (6, 150))
    w_enc[100:] = w_enc[50:100]
    b_enc, features = torch.zeros(150), some(150, 16)
    z, _ = encode_gmax(x, w_enc, b_enc, 2)
    counts = rank_count(x, w_enc, b_enc, features)
    for k in (1, 9, 64):
        among = (reference.select(z, k)[1][:, :, None] == features).any(1)
        assert torch.equal(counts < k, among)


def test_nan_is_the_largest():
    x, w_enc, b_enc = integers(4, 12, 50, torch.float32)
    b_enc[[3, 30]] = torch.nan
    features = torch.tensor([30, 3, 2, 49], dtype=torch.int32)
    counts = rank_count(x, w_enc, b_enc, features, validate=False)
    assert torch.equal(counts, plain(x, w_enc, b_enc, features))
    assert (counts[:, 0] == 1).all() and (counts[:, 1] == 0).all()


def test_float32_weights_of_narrow_tokens():
    x, w_enc, b_enc = integers(5, 20, 70, torch.float32)
    narrow = rank_count(x.bfloat16(), w_enc, b_enc, some(70, 3))
    assert torch.equal(narrow, plain(x, w_enc, b_enc, some(70, 3)))


@pytest.mark.parametrize(("n", "count"), [(0, 3), (5, 0)])
def test_nothing_to_count(n, count):
    assert rank_count(*integers(n, 12, 40, torch.bfloat16), some(40, count)).shape == (n, count)


def test_same_counts_run_to_run_and_in_any_batch():
    generator = torch.Generator().manual_seed(5)
    x, w_enc = (torch.randn(size, 40, generator=generator).bfloat16() for size in (130, 140))
    b_enc, features = torch.randn(140, generator=generator), some(140, 4)
    counts = rank_count(x, w_enc, b_enc, features)
    assert torch.equal(rank_count(x, w_enc, b_enc, features), counts)
    for start, stop in ((0, 1), (127, 129)):
        part = rank_count(x[start:stop].contiguous(), w_enc, b_enc, features)
        assert torch.equal(part, counts[start:stop])

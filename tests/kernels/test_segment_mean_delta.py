"""The pooled edit on a CPU: what it equals, what it leaves alone, gradients, compilation, and what it refuses."""

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels import delta_splice, segment_add, segment_mean, segment_mean_delta, use

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers(n: int, n_segments: int) -> Tensor:
    """Of each token its segment, in no order; some in none."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, n_segments, (n,), generator=generator, dtype=torch.int32)


def features(n_features: int, d: int, n_rows: int, dtype=torch.float32) -> list[Tensor]:
    """w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w_enc, w_dec = (draw(n_features, d, seed=seed, dtype=dtype) / d**0.5 for seed in (2, 3))
    tables = [draw(n_rows, n_features, seed=seed, dtype=wide) * 2 for seed in (4, 5)]
    tables += [torch.full((n_rows, n_features), value, dtype=wide) for value in (-2.0, 9.0)]
    return [w_enc, draw(n_features, seed=6, dtype=wide), torch.zeros(n_features, dtype=wide), w_dec, *tables]


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_each_segment(path: str, dtype: torch.dtype) -> None:
    x, segment = draw(67, 30, dtype=dtype), numbers(67, 4)
    segment[segment == 2] = -1
    with use(path):
        mean = segment_mean(x, segment, 4)
    for number in (0, 1, 3):
        assert_within(mean[number][None], x[segment == number].double().mean(0)[None], OUTPUT[torch.float32])
    assert mean.dtype == torch.float32 and torch.equal(mean[2], torch.zeros(30))


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_no_tokens_no_segments_and_tokens_that_hold_anything(path: str) -> None:
    x, nobody = draw(6, 5), torch.full((6,), -1, dtype=torch.int32)
    with use(path):
        assert segment_mean(x, nobody, 0).shape == (0, 5)
        assert torch.equal(segment_mean(x[:0], nobody[:0], 2), torch.zeros(2, 5, dtype=torch.float64))
        x[3] = torch.nan
        segment = torch.tensor([0, 0, 1, -1, 1, 1], dtype=torch.int32)
        assert segment_mean(x, segment, 2).isfinite().all()
    assert same_bits(segment_add(x, x[:0], nobody), x)


def test_a_mean_does_not_depend_on_the_rest_of_the_batch() -> None:
    x = draw(50, 24, dtype=torch.float32)
    alone = segment_mean(x, torch.zeros(50, dtype=torch.int32), 1)
    longer = torch.cat([draw(31, 24, seed=1, dtype=torch.float32), x])
    segment = torch.tensor([1] * 31 + [0] * 50, dtype=torch.int32)
    assert same_bits(segment_mean(longer, segment, 2)[:1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_keeps_bits_where_nothing_is_added(dtype: torch.dtype) -> None:
    x, segment, delta = draw(37, 30, dtype=dtype), numbers(37, 3), draw(3, 30, seed=1, dtype=torch.float32)
    delta[1] = 0
    x[segment == 1] *= 0.0
    x[segment == -1] = float("nan")
    y = segment_add(x, delta, segment)
    moved = (segment == 0) | (segment == 2)
    assert same_bits(y[~moved], x[~moved])
    assert_within(y[moved], x[moved].double() + delta[segment[moved]].double(), OUTPUT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_edit_of_the_mean_added_to_its_tokens(dtype: torch.dtype) -> None:
    x, segment, row = draw(45, 32, dtype=dtype), numbers(45, 5), torch.tensor([0, 2, 1, 1, 0], dtype=torch.int32)
    weights = features(4, 32, 3, dtype)
    y = segment_mean_delta(x, segment, 5, *weights, row=row)
    means = torch.stack([x[segment == number].double().mean(0) for number in range(5)])
    edit = delta_splice(means, *(each.double() for each in weights), row=row) - means
    expected = torch.where(segment[:, None] >= 0, x.double() + edit[segment.clamp_min(0)], x.double())
    assert_within(y, expected, OUTPUT[dtype])
    assert same_bits(y[segment < 0], x[segment < 0])
    assert edit.abs().max() > 0.1


def test_identity_edit_keeps_every_bit() -> None:
    x, segment, weights = draw(20, 16, dtype=torch.bfloat16), numbers(20, 2), features(3, 16, 1, torch.bfloat16)
    x[3] = -0.0
    one = torch.ones(1, 3)
    y = segment_mean_delta(x, segment, 2, *weights[:4], one, 0 * one, -torch.inf * one, torch.inf * one)
    assert same_bits(y, x) and y.data_ptr() != x.data_ptr()


@unchecked_shapes()
def test_gradients() -> None:
    x, segment = draw(7, 4).requires_grad_(True), torch.tensor([0, 2, 2, -1, 0, 2, 0], dtype=torch.int32)
    delta = draw(3, 4, seed=1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, segment, 3), x)
    assert torch.autograd.gradcheck(lambda x, delta: segment_add(x, delta, segment), (x, delta))
    weights = features(3, 4, 2, torch.float64)
    leaves = [each.requires_grad_(i != 2) for i, each in enumerate(weights)]
    row = torch.tensor([0, 1, 1], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, *w: segment_mean_delta(x, segment, 3, *w, row=row), (x, *leaves))


@unchecked_shapes()
def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    x, segment, weights = draw(20, 16, dtype=torch.float32), numbers(20, 2), features(3, 16, 1)
    compiled = torch.compile(lambda *args: segment_mean_delta(*args), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert same_bits(compiled(x, segment, 2, *weights), segment_mean_delta(x, segment, 2, *weights))
        segment.copy_(segment.flip(0))


@unchecked_shapes()
def test_registered_as_pytorch_asks() -> None:
    x, segment = draw(6, 4, dtype=torch.float32).requires_grad_(True), numbers(6, 2)
    delta = draw(2, 4, dtype=torch.float32).requires_grad_(True)
    torch.library.opcheck(torch.ops.hooked_vla.segment_mean.default, (x, segment, 2))
    torch.library.opcheck(torch.ops.hooked_vla.segment_add.default, (x, delta, segment))


@unchecked_shapes()
def test_refuses() -> None:
    x, segment, weights = draw(6, 16, dtype=torch.float32), numbers(6, 2), features(3, 16, 1)
    with pytest.raises(ValueError, match=r"segment_mean: segment must have shape \[6\], got \[5\]"):
        segment_mean(x, segment[1:], 2)
    with pytest.raises(TypeError, match=r"segment_mean: segment must be int32, got int64"):
        segment_mean(x, segment.long(), 2)
    with pytest.raises(ValueError, match=r"segment_mean: segment must lie in \[-1, 1\), got 1"):
        segment_mean(x, torch.ones(6, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match=r"segment_mean: n_segments must be at least 0, got -1"):
        segment_mean(x, segment, -1)
    with pytest.raises(ValueError, match=r"segment_add: delta must have shape \[\*, 16\], got \[2, 15\]"):
        segment_add(x, torch.zeros(2, 15), segment)
    with pytest.raises(TypeError, match=r"segment_add: delta must be float32, got bfloat16"):
        segment_add(x, torch.zeros(2, 16).bfloat16(), segment)
    with pytest.raises(ValueError, match=r"segment_add: delta must hold finite values, got nan"):
        segment_add(x, torch.full((2, 16), torch.nan), segment)
    with pytest.raises(ValueError, match=r"segment_mean_delta: row must have shape \[2\], got \[6\]"):
        segment_mean_delta(x, segment, 2, *weights, row=torch.zeros(6, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"segment_mean_delta: w_dec must have shape \[3, 16\], got \[2, 16\]"):
        segment_mean_delta(x, segment, 2, *weights[:3], weights[3][:2], *weights[4:])
    with pytest.raises(ValueError, match=r"segment_mean_delta: x must hold finite values, got nan at \[0, 0\]"):
        segment_mean_delta(x * torch.nan, segment.clamp_min(0), 2, *weights)

"""The Triton kernel of sparse_decode against its reference in float64."""

import numpy as np
import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor

from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.sparse_decode import sparse_decode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# n, k, m, d: one block and less, several blocks and a rest, both ways
SIZES = [(3, 1, 5, 1), (4, 16, 50, 256), (3, 37, 20, 300), (2, 5, 3, 531)]


def make(n: int, k: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, k, generator=generator).abs()
    indices = torch.randint(0, m, (n, k), generator=generator, dtype=torch.int32)
    return values, indices, torch.randn(m, d, generator=generator).to(dtype), torch.randn(n, d, generator=generator)


def exact(values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor | None) -> Tensor:
    with use("reference"):
        return sparse_decode(values.double(), indices, w_dec.double(), None if base is None else base.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    values, indices, w_dec, base = make(*size, dtype)
    for each in (None, base.to(dtype), base[1], base[1].to(dtype)):
        out = sparse_decode(values, indices, w_dec, each)
        assert out.dtype == dtype
        expected = exact(values, indices, w_dec, each)
        # relative to what is added up: the sum itself may cancel
        scale = exact(values, indices, w_dec.abs(), None if each is None else each.abs())
        assert_within(scale + (out.double() - expected), scale, OUTPUT[dtype])


def test_the_base_alone_keeps_its_bits() -> None:
    """No entries, and no tokens."""
    values, indices, w_dec, base = make(3, 0, 4, 70, torch.float32)
    out = sparse_decode(values, indices, w_dec, base)
    assert same_bits(out, base) and out.data_ptr() != base.data_ptr()
    assert same_bits(sparse_decode(values, indices, w_dec), torch.zeros(3, 70))
    assert sparse_decode(values[:0], indices[:0], w_dec, base[0]).shape == (0, 70)


def test_a_token_does_not_depend_on_the_others() -> None:
    values, indices, w_dec, base = make(9, 21, 30, 290, torch.bfloat16)
    together = sparse_decode(values, indices, w_dec, base)
    for part in (slice(0, 1), slice(4, 9)):
        assert same_bits(sparse_decode(values[part], indices[part], w_dec, base[part]), together[part])
    assert same_bits(sparse_decode(values, indices, w_dec, base), together)


def test_offsets_do_not_overflow() -> None:
    """A row that begins at element 2^31; numpy's zeros take no memory where nobody looks."""
    m, d = (1 << 16) + 1, 1 << 15
    w_dec = torch.from_numpy(np.zeros((m, d), np.float16))
    w_dec[-1] = torch.randn(d)
    out = sparse_decode(torch.full((1, 1), 2.0), torch.tensor([[m - 1]], dtype=torch.int32), w_dec)
    assert torch.equal(out[0], w_dec[-1] * 2)


def test_gradients_are_the_references() -> None:
    values, indices, w_dec, base = make(5, 19, 12, 270, torch.float32)
    slope = torch.randn(5, 270)
    results = []
    for path, dtype in (("fused", torch.float32), ("reference", torch.float64)):
        inputs = [each.clone().to(dtype).requires_grad_() for each in (values, w_dec, base)]
        with use(path):
            sparse_decode(inputs[0], indices, inputs[1], inputs[2]).backward(slope.to(dtype))
        results.append([each.grad for each in inputs])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm(dim=-1).max() <= 2e-6 * theirs.norm(dim=-1).max()

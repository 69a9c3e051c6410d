"""Choices of features and their derivatives, against dense definitions."""

import pytest
import torch
from torch import Tensor

from hooked_vla.sae.activations import (
    Code,
    choose,
    choose_in_batch,
    chosen_values,
    decoded,
    jump_relu,
    spread,
    step,
)

N, D, M, K = 40, 12, 96, 5


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((N, D), (M, D), (M,)))  # pyright: ignore


def alone(values: Tensor) -> Tensor:
    return values


def dense_batch_topk(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    z = (x @ w.T + b).relu()
    return torch.where(z >= z.flatten().topk(len(x) * k).values[-1], z, 0)


def test_batch_topk_takes_the_largest_of_all_tokens() -> None:
    """Also where one token has far more than its share."""
    x, w, b = tensors()
    x[7] *= 30
    code, least = choose_in_batch(x, w, b, K, alone)
    found = spread(code, M)
    torch.testing.assert_close(found, dense_batch_topk(x, w, b, K), rtol=1e-5, atol=1e-5)
    assert int((found != 0).sum()) == N * K
    # more than was looked at first
    assert int((found[7] != 0).sum()) > 3 * K
    torch.testing.assert_close(least, found[found > 0].min())


def test_batch_topk_of_few_positive_values_takes_them_all() -> None:
    x, w, b = tensors()
    b = b - 9
    code, least = choose_in_batch(x, w, b, K, alone)
    z = (x @ w.T + b).relu()
    assert 0 < int((z > 0).sum()) < N * K
    torch.testing.assert_close(spread(code, M), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(least, z[z > 0].min(), rtol=1e-5, atol=1e-5)
    nothing, least = choose_in_batch(x, w, b - 100, K, alone)
    assert not bool(nothing.values.any()) and bool(least.isinf())


def test_batch_topk_over_processes_is_that_of_the_whole_batch() -> None:
    """Each process sees the candidates of all."""
    x, w, b = tensors()
    x[:20] *= 3
    whole, least = choose_in_batch(x, w, b, K, alone)
    parts = []
    for own, other in ((x[:20], x[20:]), (x[20:], x[:20])):
        # what the other process would gather, at whatever width is asked for
        def gather(values: Tensor, other: Tensor = other) -> Tensor:
            if values.ndim < 2:
                return torch.ones_like(values)
            return torch.cat([values, choose(other, w, b, values.shape[1], True).values])

        code, found = choose_in_batch(own, w, b, K, gather)
        torch.testing.assert_close(found, least)
        parts.append(spread(code, M))
    torch.testing.assert_close(torch.cat(parts), spread(whole, M))


@pytest.mark.parametrize("relu", [True, False])
def test_code_and_decoder_have_the_gradients_of_dense_products(relu: bool) -> None:
    x, w_enc, b_enc = tensors()
    # so far below zero that some of what is chosen is
    b_enc = b_enc - 9
    _, w_dec, _ = tensors(1)
    base, offset = torch.randn(D), torch.randn(D)
    inputs = [each.requires_grad_() for each in (x, offset, w_enc, b_enc, w_dec, base)]
    centred = x - offset.detach()
    code = choose(centred, w_enc, b_enc, K, relu)
    values = chosen_values(centred, offset, w_enc, b_enc, code, relu)
    out = decoded(Code(values, code.indices), w_dec, base)
    towards = torch.randn(N, D, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((out * towards).sum(), inputs)
    z = (x - offset) @ w_enc.T + b_enc
    kept = torch.zeros(N, M).scatter_(1, code.indices.long(), 1.0)
    f = z * kept
    f = f.relu() if relu else f
    dense = f @ w_dec + base
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-4)
    assert relu or bool((f < 0).any())
    expected = torch.autograd.grad((dense * towards).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_a_threshold_moves_by_what_is_near_it() -> None:
    z = torch.tensor([[0.9, 0.5], [1.05, 0.6], [1.2, 3.0]], requires_grad=True)
    threshold = torch.tensor([1.0, 0.5], requires_grad=True)
    upward = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    on = step(z, threshold, 0.2)
    assert on.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    none, d_threshold = torch.autograd.grad((on * upward).sum(), (z, threshold), allow_unused=True)
    assert none is None
    # within 0.1: 1.05 of the first (0.9 lies on the edge), 0.5 of the second (0.6 lies on the edge)
    torch.testing.assert_close(d_threshold, -torch.tensor([3.0, 2.0]) / 0.2)
    f = jump_relu(z, threshold, 0.2)
    torch.testing.assert_close(f, z.detach() * on.detach())
    d_z, d_threshold = torch.autograd.grad((f * upward).sum(), (z, threshold))
    torch.testing.assert_close(d_z, upward * on.detach())
    torch.testing.assert_close(d_threshold, -threshold.detach() * torch.tensor([3.0, 2.0]) / 0.2)

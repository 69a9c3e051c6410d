"""Defines sae_encode_topk, encode_gmax and select_topk in plain PyTorch.

Sums are float32, or float64 for float64 tokens: b_enc's dtype. NaN is the largest value; -0.0 equals 0.0.
"""

import torch
from torch import Tensor
from torch.nn import functional


def encode(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
    """z = x·w_encᵀ + b_enc."""
    return functional.linear(x.to(b_enc.dtype), w_enc.to(b_enc.dtype), b_enc)


def group_maxima(z: Tensor, group: int) -> Tensor:
    """The largest of each run of `group` features; the last run may be shorter."""
    return functional.pad(z, (0, -z.shape[1] % group), value=-torch.inf).unflatten(1, (-1, group)).amax(-1)


def select(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest in descending order, ties to the smaller index, and their indices."""
    values, indices = z.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].int().contiguous()


def encode_gmax(x: Tensor, w_enc: Tensor, b_enc: Tensor, group: int) -> tuple[Tensor, Tensor]:
    z = encode(x, w_enc, b_enc)
    return z, group_maxima(z, group)


def select_topk(z: Tensor, maxima: Tensor, group: int, k: int) -> tuple[Tensor, Tensor]:
    """`select`; the maxima only make it faster."""
    return select(z, k)


def sae_encode_topk(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """The k largest of z and where they are; with relu, those below zero are raised to it once they are chosen."""
    values, indices = select(encode(x, w_enc, b_enc), k)
    return values.relu() if relu else values, indices

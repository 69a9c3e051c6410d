"""Defines lowrank_edit in plain PyTorch. Sums are float32, or float64 for float64 tokens: alpha's dtype."""

import torch
from torch import Tensor


def lowrank_edit(
    x: Tensor,
    src: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor,
    add: Tensor | None,
    pair: Tensor | None,
    row: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """y = x + mask·(((beta·src[pair] - alpha·x)·aᵀ)·b + add)."""
    wide, tokens = alpha.dtype, x.to(alpha.dtype)

    def per_token(values: Tensor) -> Tensor:
        return values if row is None else values[row]

    difference = -per_token(alpha)[:, None] * tokens
    if src is not None:
        # both products are rounded before the subtraction: where they are equal nothing is left
        difference = per_token(beta)[:, None] * (src if pair is None else src[pair]).to(wide) + difference
    delta = difference @ a.to(wide).T @ b.to(wide)
    if add is not None:
        delta = delta + per_token(add)
    if mask is not None:
        # not a product: a token outside the mask may hold NaN
        delta = torch.where(mask[:, None], delta, 0)
    # x + 0 is not x where x is -0.0
    return torch.where(delta == 0, x, (tokens + delta).to(x.dtype))
